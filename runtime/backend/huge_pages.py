"""Weights in large pages of memory. A hint to the kernel, on Linux alone; knows nothing of models.

Decoding sweeps all weights once a token; in pages of 4 KiB a good part of that goes into address translation
(bench/RESULTS.md). onnxruntime keeps its packed weights in ordinary memory, so the kernel is asked to gather what
has been allocated into pages of 2 MiB: madvise(2), MADV_COLLAPSE, Linux 6.1 or newer. Elsewhere nothing happens.
"""

from __future__ import annotations

from pathlib import Path

from llm_edge.runtime.backend import smaps

PAGE = 2 << 20
_MADV_COLLAPSE = 25
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_FULL = 0.9  # of a region must be in use: gathering fills it up


def collapse_pages() -> int:
    """Ask for large pages in this process's own memory, where the machine's settings allow them.

    Returns:
        bytes that lie in large pages now thanks to this call; never raises.
    """
    try:
        if "[never]" in _SETTING.read_text(encoding="ascii"):
            return 0
    except OSError:
        return 0
    return sum(size for start, size in _regions(smaps.read()) if smaps.advise(start, size, _MADV_COLLAPSE))


def _regions(text: str) -> list[tuple[int, int]]:
    """Start and size of private memory that is in use, in whole large pages, out of /proc/self/smaps (proc(5))."""
    found: list[tuple[int, int]] = []
    for region in smaps.parse(text):
        own = region.access == "rw-p" and (region.device, region.inode) == ("00:00", 0)
        if not own or region.name not in ("", "[heap]") or region.resident < _FULL * region.size:
            continue
        first = -(-region.start // PAGE) * PAGE
        size = (region.start + region.size) // PAGE * PAGE - first
        if size > 0:
            found.append((first, size))
    return found
