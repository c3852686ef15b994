"""This process's memory, region by region, and hints to the kernel about it. Knows nothing of models or of files.

Linux alone tells of regions (/proc/self/smaps, proc(5)) and takes such hints (madvise(2)); elsewhere there are none.
"""

from __future__ import annotations

import ctypes
import re
from dataclasses import dataclass
from pathlib import Path

_HEADER = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) (\S+) \S+ (\S+) (\d+) *(.*)$")


@dataclass(slots=True)
class Region:
    """A part of the address space.

    Attributes:
        start: its first address.
        size: bytes.
        access: letters for read, write, execute, and private or shared: `rw-p`.
        device: of the mapped file; `00:00` where there is none.
        inode: of the mapped file; 0 where there is none.
        name: path of the mapped file, `[heap]` and the like, or nothing.
        resident: bytes that are in memory.
        dirty: bytes in memory that this process alone has changed.
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
    """The kernel's text about this process; nothing where it tells nothing."""
    try:
        return Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def parse(smaps: str) -> list[Region]:
    """Regions out of the kernel's text."""
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
    """Give the kernel a hint about some bytes of memory; whether it took it."""
    try:
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return False
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return bool(madvise(start, size, advice) == 0)
