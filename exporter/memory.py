"""How this process returns memory to the system."""

from __future__ import annotations

import contextlib
import ctypes

_MMAP_THRESHOLD = -3  # parameter M_MMAP_THRESHOLD of mallopt(3)
_BLOCK = 24 << 20  # bytes


def return_freed_blocks() -> None:
    """Let glibc return blocks of 24 MiB and more to the system when they are freed; other libraries do by themselves.

    It would keep those of up to 32 MiB in the heap of the thread that freed them: a tenth of the memory of an export.
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").mallopt(_MMAP_THRESHOLD, _BLOCK)


def return_freed_pages() -> None:
    """Let glibc return what is free in the heaps of all threads to the system; others do by themselves."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").malloc_trim(0)
