"""Memory hints to the kernel (madvise(2)); Linux only, elsewhere nothing happens.

Decoding reads all weights for every token; with pages of 4 KiB much of that time is address translation
(bench/RESULTS.md), so `collapse_pages` moves onnxruntime's packed weights to huge pages (MADV_COLLAPSE, Linux 6.1).
"""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

PAGE = 2 << 20
_MADV_COLLAPSE = 25
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_FULL = 0.9  # fraction of a region that must be resident: collapsing allocates the rest
# Private memory without a file, and how much of it is in memory, in /proc/self/smaps (proc(5)).
_PRIVATE = re.compile(
    r"^([0-9a-f]+)-([0-9a-f]+) rw-p \S+ 00:00 0 *(?:\[heap\])?\n(?:(?!Rss:).*\n)*Rss: +(\d+) kB", re.MULTILINE
)


def collapse_pages() -> int:
    """Collapse private memory into huge pages if the system allows it; returns how many bytes, and never raises."""
    try:
        if "[never]" in _SETTING.read_text(encoding="ascii"):
            return 0
        smaps = Path("/proc/self/smaps").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return 0
    return sum(size for start, size in _regions(smaps) if _advise(start, size, _MADV_COLLAPSE))


def _regions(smaps: str) -> list[tuple[int, int]]:
    """Start and size, in whole huge pages, of resident private memory in the content of /proc/self/smaps."""
    found: list[tuple[int, int]] = []
    for first, end, resident in _PRIVATE.findall(smaps):
        start, stop = -(-int(first, 16) // PAGE) * PAGE, int(end, 16) // PAGE * PAGE
        if stop > start and int(resident) * 1024 >= _FULL * (int(end, 16) - int(first, 16)):
            found.append((start, stop - start))
    return found


def _advise(start: int, size: int, advice: int) -> bool:
    """Call madvise(2); returns whether it succeeded."""
    try:
        madvise = ctypes.CDLL(None).madvise
    except (OSError, AttributeError, TypeError):  # Windows refuses None
        return False
    madvise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return bool(madvise(start, size, advice) == 0)
