"""The memory regions of this process (/proc/self/smaps, proc(5)) and hints about them (madvise(2)); Linux only."""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path

_HEADER = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ (\S+) (\d+) *(.*)$")


@dataclass(slots=True)
class Region:
    """A region of the address space.

    Attributes:
        start: first address.
        size: bytes.
        access: permissions and whether it is private or shared, such as `rw-p`.
        device: of the mapped file; `00:00` if there is none.
        inode: of the mapped file; 0 if there is none.
        name: path of the mapped file, a name such as `[heap]`, or empty.
        resident: bytes in memory.
        dirty: private bytes in memory that were modified.
    """

    start: int
    size: int
    access: str
    device: str
    inode: int
    name: str
    resident: int = 0
    dirty: int = 0


def read() -> str:
    """The content of /proc/self/smaps; empty where there is none."""
    try:
        return Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def parse(smaps: str) -> list[Region]:
    """The regions in the content of /proc/self/smaps."""
    found: list[Region] = []
    for line in smaps.splitlines():
        header = _HEADER.match(line)
        if header is not None:
            start, end = int(header[1], 16), int(header[2], 16)
            found.append(Region(start, end - start, header[3], header[4], int(header[5]), header[6]))
        elif found and line.startswith("Rss:"):
            found[-1].resident = int(line.split()[1]) * 1024
        elif found and line.startswith("Private_Dirty:"):
            found[-1].dirty = int(line.split()[1]) * 1024
    return found


def advise(start: int, size: int, advice: int) -> bool:
    """Call madvise(2); returns whether it succeeded."""
    try:
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return False
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return bool(madvise(start, size, advice) == 0)
