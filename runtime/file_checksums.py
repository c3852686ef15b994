"""`file_sha256`, and `cached_sha256`, which reads a file only once: the user's cache keeps its checksum and identity.

The identity is device, inode, size, and the times of the last change of content and attributes; programs cannot set the
latter. The cache is trusted like the package itself.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import time
from pathlib import Path

from llm_edge.runtime.safe_io import MIB, write_atomically
from llm_edge.runtime.user_cache import derived_files

_BLOCK = 16 * MIB
_MAX_ENTRIES = 64
_SETTLED_SECONDS = 2.0  # a later change within the clock's resolution would leave the same times


def file_sha256(path: Path) -> str:
    """The sha256 of a file, read in blocks so large that a thread rarely waits for the interpreter's lock."""
    digest = hashlib.sha256()
    with path.open("rb", buffering=0) as file:
        block = memoryview(bytearray(min(_BLOCK, path.stat().st_size + 1)))
        while read := file.readinto(block):
            digest.update(block[:read])
    return digest.hexdigest()


def cached_sha256(path: Path) -> str:
    """The sha256 of a file, from the cache if the file has not changed since it was computed."""
    folder = derived_files("checksums") if os.name == "posix" else None  # elsewhere no time shows every change
    if folder is None:
        return file_sha256(path)
    identity = _identity(path)
    entry = folder / hashlib.sha256(os.fsencode(path.resolve())).hexdigest()
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError):
        stored = json.loads(entry.read_bytes())
        if stored["identity"] == identity:
            os.utime(entry)  # the entries that were not used for the longest time are removed
            return str(stored["sha256"])
    digest = file_sha256(path)
    if _identity(path) == identity and time.time() - max(identity[-2:]) / 1e9 > _SETTLED_SECONDS:
        with contextlib.suppress(OSError):
            _store(entry, {"identity": identity, "sha256": digest})
    return digest


def _identity(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns]


def _store(entry: Path, content: dict[str, object]) -> None:
    entry.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(entry, json.dumps(content).encode())
    entries = sorted(entry.parent.iterdir(), key=lambda file: file.stat().st_mtime)
    for old in entries[:-_MAX_ENTRIES]:
        old.unlink(missing_ok=True)
