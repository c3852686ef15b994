"""Gives back memory that holds copies of a file's pages. A hint to the kernel, on Linux alone.

onnxruntime maps a bundle's weights, packs most of them into memory of its own, and leaves those mapped that another
operator reads too (an embedding shared with the head): they were read once and would stay. What is needed again comes
back from the file by itself.
"""

from __future__ import annotations

from pathlib import Path

from llm_edge.runtime.backend import smaps

_MADV_DONTNEED = 4


def release(path: Path) -> int:
    """Drop this process's copies of the pages of a mapped file, where nothing was written to them (madvise(2)).

    Returns:
        bytes that were dropped; never raises.
    """
    try:
        name = str(path.resolve())
    except (OSError, RuntimeError):
        return 0
    regions = [region for region in smaps.parse(smaps.read()) if region.name == name and not region.dirty]
    return sum(region.resident for region in regions if smaps.advise(region.start, region.size, _MADV_DONTNEED))
