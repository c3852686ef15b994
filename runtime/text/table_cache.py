"""Tables of vocabularies in the user's cache, with which large tokenizers load at once; see `LazyTokenizer`.

A table is made after the first load, by a process of its own: `python -m …table_cache`. The name of its file is a hash
of what it was made from, so a table is never outdated. The cache is trusted like the package itself.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path

import tokenizers

from llm_edge.runtime.errors import BundleError
from llm_edge.runtime.safe_io import MIB, read_bytes, write_atomically
from llm_edge.runtime.text.lazy_tokenizer import Backend, LazyTokenizer, loads_slowly, table_of
from llm_edge.runtime.text.tokenizer_files import load_checked
from llm_edge.runtime.text.vocabulary_table import VocabularyTable
from llm_edge.runtime.user_cache import derived_files

_MAX_TABLES = 8
_MAX_BYTES = 256 * MIB  # of a tokenizer.json


def cached_tokenizer(path: Path, named: Mapping[str, str], vocab_size: int | None) -> Backend:
    """The tokenizer in a tokenizer.json: a table from the cache, or the whole, from which a table is then made.

    Raises:
        BundleError: the file cannot be used.
    """
    data = read_bytes(path, _MAX_BYTES)
    key = _key(data, named, vocab_size)
    folder = cache_folder()
    if folder is not None and (table := _read_table(folder / key)) is not None:
        return LazyTokenizer(table, functools.partial(_load_again, path, key, named, vocab_size))
    whole = _load(data, path, named, vocab_size)
    if folder is not None and loads_slowly(whole):
        _make_table_later(path, key, named, vocab_size)
    return whole


def cache_folder() -> Path | None:
    """The folder of the tables in the user's cache; see `derived_files`."""
    return derived_files("tokenizers")


def _key(data: bytes, named: Mapping[str, str], vocab_size: int | None) -> str:
    digest = hashlib.sha256(json.dumps([tokenizers.__version__, sorted(named.items()), vocab_size]).encode())
    digest.update(data)
    return digest.hexdigest()


def _load(data: bytes, path: Path, named: Mapping[str, str], vocab_size: int | None) -> tokenizers.Tokenizer:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BundleError(f"{path}: not UTF-8 text (byte {error.start})") from error
    return load_checked(text, path, named, vocab_size)


def _load_again(path: Path, key: str, named: Mapping[str, str], vocab_size: int | None) -> tokenizers.Tokenizer:
    """The whole tokenizer, if the file is still that of the key."""
    data = read_bytes(path, _MAX_BYTES)
    if _key(data, named, vocab_size) != key:
        raise BundleError(f"{path} was modified since it was loaded: load the bundle again")
    return _load(data, path, named, vocab_size)


def _read_table(path: Path) -> VocabularyTable | None:
    try:
        table = VocabularyTable(path.read_bytes())
    except (OSError, ValueError):
        return None
    with contextlib.suppress(OSError):
        os.utime(path)  # the files that were not used for the longest time are removed
    return table


def _make_table_later(path: Path, key: str, named: Mapping[str, str], vocab_size: int | None) -> None:
    """Make a table in another process, which does not hold this interpreter's lock for seconds."""
    arguments = [str(path), key, json.dumps(dict(named)), json.dumps(vocab_size)]
    with contextlib.suppress(OSError):
        process = subprocess.Popen(  # noqa: S603 (this module)
            [sys.executable, "-m", "llm_edge.runtime.text.table_cache", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        threading.Thread(target=process.wait, name="llm-edge-table", daemon=True).start()


def make_table(path: Path, key: str, named: Mapping[str, str], vocab_size: int | None) -> None:
    """Write the table of a tokenizer.json to the cache, unless it is there."""
    folder = cache_folder()
    if folder is None or (folder / key).exists():
        return
    data = table_of(_load_again(path, key, named, vocab_size))
    if data is None:
        return
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / key, data)
    tables = sorted(folder.iterdir(), key=lambda file: file.stat().st_mtime)
    for old in tables[:-_MAX_TABLES]:
        old.unlink(missing_ok=True)


if __name__ == "__main__":
    with contextlib.suppress(AttributeError):
        os.nice(10)
    make_table(Path(sys.argv[1]), sys.argv[2], json.loads(sys.argv[3]), json.loads(sys.argv[4]))
