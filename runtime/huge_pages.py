"""Weights in large pages of memory. A hint to the kernel, on Linux alone; knows nothing of models.

Decoding sweeps all weights once a token; in pages of 4 KiB a good part of that goes into address translation
(bench/RESULTS.md). onnxruntime keeps its packed weights in ordinary memory, so the kernel is asked to gather what
has been allocated into pages of 2 MiB: madvise(2), MADV_COLLAPSE, Linux 6.1 or newer. Elsewhere nothing happens.
"""

from __future__ import annotations

import ctypes
import re
import sys
from pathlib import Path

PAGE = 2 << 20
_MADV_COLLAPSE = 25
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_REGION = re.compile(r"^([0-9a-f]+)-([0-9a-f]+) rw-p [0-9a-f]+ 00:00 0 *(\[heap\])?$")
_FULL = 0.9  # of a region must be in use: gathering fills it up


def gather() -> int:
    """Ask for large pages in this process's own memory, where the machine's settings allow them.

    Returns:
        bytes that lie in large pages now thanks to this call; never raises.
    """
    if sys.platform != "linux":
        return 0
    try:
        if "[never]" in _SETTING.read_text(encoding="ascii"):
            return 0
        regions = _regions(Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace"))
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError):
        return 0
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return sum(size for start, size in regions if madvise(start, size, _MADV_COLLAPSE) == 0)


def _regions(smaps: str) -> list[tuple[int, int]]:
    """Start and size of private memory that is in use, in whole large pages, out of /proc/self/smaps (proc(5))."""
    found: list[tuple[int, int]] = []
    start = end = 0
    for line in smaps.splitlines():
        region = _REGION.match(line)
        if region is not None:
            start, end = int(region[1], 16), int(region[2], 16)
        elif "-" in line.partition(" ")[0]:
            start = end = 0  # a region of another kind
        elif end and line.startswith("Rss:"):
            used = int(line.split()[1]) * 1024
            first, size = -(-start // PAGE) * PAGE, 0
            size = end // PAGE * PAGE - first
            if size > 0 and used >= _FULL * (end - start):
                found.append((first, size))
    return found
