"""Moves weights into huge pages: a hint to the kernel on Linux 6.1 or newer, and nothing elsewhere.

Decoding reads all weights for every token; with pages of 4 KiB much of that time is address translation
(bench/RESULTS.md). onnxruntime allocates its packed weights in ordinary memory, so the kernel is asked to collapse it
into pages of 2 MiB (madvise(2), MADV_COLLAPSE).
"""

from __future__ import annotations

from pathlib import Path

from llm_edge.runtime.backend import smaps

PAGE = 2 << 20
_MADV_COLLAPSE = 25
_SETTING = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_FULL = 0.9  # fraction of a region that must be resident: collapsing allocates the rest


def collapse_pages() -> int:
    """Collapse this process's private memory into huge pages, if the system's settings allow it.

    Returns:
        bytes moved to huge pages; never raises.
    """
    try:
        if "[never]" in _SETTING.read_text(encoding="ascii"):
            return 0
    except OSError:
        return 0
    return sum(size for start, size in _regions(smaps.read()) if smaps.advise(start, size, _MADV_COLLAPSE))


def _regions(text: str) -> list[tuple[int, int]]:
    """Start and size, in whole huge pages, of resident private memory in the text of /proc/self/smaps (proc(5))."""
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
