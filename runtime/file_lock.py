"""Locks of folders, held by the process that writes them, so that others can tell abandoned folders from live ones."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_ABANDONED = 24 * 3600  # seconds without a change after which a folder counts as abandoned where there are no locks


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Try to lock a folder within the block; yields whether no other process holds its lock.

    A lock ends with its process and stays with the folder if that is renamed. Where folders cannot be locked (Windows),
    the answer depends on the age of the folder.
    """
    fcntl = _fcntl()
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        yield False
        return
    except OSError:  # folders cannot be opened here
        descriptor = -1
    if fcntl is None or descriptor < 0:
        if descriptor >= 0:
            os.close(descriptor)
        yield _is_old(folder)
        return
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
        except OSError:  # a file system without locks
            yield _is_old(folder)
        else:
            yield folder.exists()  # another process may have removed it before it was locked
    finally:
        os.close(descriptor)


def has_locks() -> bool:
    """Whether this system can lock folders."""
    return _fcntl() is not None


def _fcntl() -> Any:
    """The module, or None where the system has none."""
    try:
        import fcntl
    except ImportError:
        return None
    return fcntl


def _is_old(folder: Path) -> bool:
    try:
        return time.time() - folder.stat().st_mtime > _ABANDONED
    except OSError:
        return False
