"""`HostPages`: arrays of which parts take memory only while they are in use."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from llm_edge.runtime.backend.window_history import Range

_MAP_NORESERVE = 0x4000  # mmap(2) on Linux; Python's mmap has it from 3.13 on

Array = npt.NDArray[Any]


class HostPages:
    """An array [slots, ...] on the host: reserved address space that takes memory page by page and can return it."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._map = _reserve_addresses(math.prod(shape) * dtype.itemsize)
        self.array: Array = np.frombuffer(self._map, dtype=dtype).reshape(shape)

    def release(self, slot: int) -> None:
        """Return the whole pages of a slot to the system."""
        size = self.array[0].nbytes
        self._release(slot * size, (slot + 1) * size)

    def release_rows(self, slot: int, ranges: Iterable[Range]) -> None:
        """Return the whole pages of ranges of rows in an array [slots, K, rows, D]."""
        size, row = self.array[0, 0].nbytes, self.array[0, 0, 0].nbytes
        heads = self.array.shape[1]
        for start, end in ranges:
            for head in range(slot * heads, (slot + 1) * heads):
                self._release(head * size + start * row, head * size + end * row)

    def _release(self, start: int, end: int) -> None:
        """Return the whole pages between two offsets in bytes."""
        start, end = -(-start // mmap.PAGESIZE) * mmap.PAGESIZE, end // mmap.PAGESIZE * mmap.PAGESIZE
        if end > start and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED, start, end - start)


def _reserve_addresses(size: int) -> mmap.mmap:
    """Zeros that take memory once written to, in small pages: a large page holds many tokens of one head."""
    if not hasattr(mmap, "MADV_NOHUGEPAGE"):  # not Linux
        return mmap.mmap(-1, size)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return pages
