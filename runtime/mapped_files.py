"""Gives back memory that holds copies of a file's pages. A hint to the kernel, on Linux alone.

onnxruntime maps a bundle's weights, packs most of them into memory of its own, and leaves those mapped that another
operator reads too (an embedding shared with the head): they were read once and would stay. What is needed again comes
back from the file by itself.
"""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

_MADV_DONTNEED = 4
_REGION = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) \S+ \S+ \S+ \d+ *(.*)$")


def release(path: Path) -> int:
    """Drop this process's copies of the pages of a mapped file, where nothing was written to them (madvise(2)).

    Returns:
        bytes that were dropped; never raises.
    """
    if sys.platform != "linux":
        return 0
    try:
        regions = _regions(Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace"), str(path.resolve()))
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return 0
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return sum(used for start, size, used in regions if madvise(start, size, _MADV_DONTNEED) == 0)


def _regions(smaps: str, path: str) -> list[tuple[int, int, int]]:
    """Start, size and resident bytes of a file's mappings without changes of our own, out of smaps (proc(5))."""
    found: list[tuple[int, int, int]] = []
    start = end = used = 0
    for line in smaps.splitlines():
        region = _REGION.match(line)
        if region is not None:
            mine = region[3] == path
            start, end = (int(region[1], 16), int(region[2], 16)) if mine else (0, 0)
        elif end and line.startswith("Rss:"):
            used = int(line.split()[1]) * 1024
        elif end and line.startswith("Private_Dirty:") and line.split()[1] == "0":
            found.append((start, end - start, used))
    return found
