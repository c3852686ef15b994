"""Releases the resident pages of a memory-mapped file: a hint to the kernel on Linux, and nothing elsewhere.

onnxruntime maps a bundle's weights, packs most of them into other memory, and keeps the mapping for those that another
operator reads too (an embedding shared with the head). Pages that were read once would stay resident; those needed
again are read from the file automatically.
"""

from __future__ import annotations

from pathlib import Path

from llm_edge.runtime.backend import smaps

_MADV_DONTNEED = 4


def release(path: Path) -> int:
    """Release this process's clean pages of a mapped file (madvise(2)).

    Returns:
        bytes released; never raises.
    """
    try:
        name = str(path.resolve())
    except (OSError, RuntimeError):
        return 0
    regions = [region for region in smaps.parse(smaps.read()) if region.name == name and not region.dirty]
    return sum(region.resident for region in regions if smaps.advise(region.start, region.size, _MADV_DONTNEED))
