"""All conversations in one file: a zip with a JSON document of `transcript` for each, which can be imported."""

from __future__ import annotations

import re
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

from llm_edge.chat.history import transcript
from llm_edge.chat.history.conversation import Conversation
from llm_edge.chat.history.store import Store
from llm_edge.runtime.errors import InputError

_NAME = re.compile(r"conversation-\d+\.json")
_PAGE = 200  # conversations that are listed at a time
_MAX_TOTAL = 4 * transcript.MAX_FILE  # bytes of JSON


def write_archive(path: Path, store: Store) -> int:
    """Write all conversations to a zip; returns their number.

    Raises:
        OSError: the file cannot be written.
    """
    count = 0
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        while listed := store.recent(_PAGE, count):
            for each in listed:
                archive.writestr(f"conversation-{each.id}.json", transcript.to_json(store.load(each.id)))
            count += len(listed)
    return count


def is_archive(path: Path) -> bool:
    """Whether a file is a zip of `write_archive`."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(_NAME.fullmatch(name) for name in archive.namelist())
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        return False


def read_archive(path: Path) -> Iterator[Conversation]:
    """The conversations of a zip, the oldest first.

    Raises:
        InputError: it is damaged or too large; the message names the file.
    """
    left = _MAX_TOTAL
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name for name in archive.namelist() if _NAME.fullmatch(name)}
            for name in sorted(names, key=lambda name: int(re.sub(r"\D", "", name)[:18])):
                # With other compressions, zipfile decompresses whole blocks of any size.
                if archive.getinfo(name).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise InputError(f"{path}: {name} uses an unsupported compression: compress it with deflate")
                with archive.open(name) as part:
                    data = part.read(min(transcript.MAX_FILE, left) + 1)
                left -= len(data)
                if len(data) > transcript.MAX_FILE or left < 0:
                    raise InputError(f"{path}: {name} is too large: import its conversations one by one")
                try:
                    yield transcript.from_json(data.decode("utf-8-sig"))
                except (UnicodeDecodeError, InputError) as e:
                    raise InputError(f"{path}: {name}: {e}") from e
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as e:
        raise InputError(f"{path}: an unreadable zip ({e}): export it again") from e
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror or e})") from e
