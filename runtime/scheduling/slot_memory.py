"""Memory for the keys and values of rows, where a graph reads them: on the host or on a GPU. Knows no tokens, no steps.

A tensor holds [rows, K, capacity, D] for K key/value heads of size D, and lies in one piece: rows side by side are part
of it by address.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import sys
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from llm_edge.runtime.backend.session import Session
from llm_edge.runtime.errors import MachineError

_MAP_NORESERVE = 0x4000  # mmap(2) on Linux; Python's mmap names it from 3.13 on

Array = npt.NDArray[Any]
Shape = tuple[int, int, int, int]


class SlotMemory(Protocol):
    """The tensors of a batch, one a name.

    Attributes:
        device: `cpu` or `cuda`, as onnxruntime names it.
        shape: of a tensor.
    """

    device: str
    shape: Shape

    def addresses(self, row: int) -> list[int]:
        """Where a row begins in each tensor."""

    def copy(self, source: int, target: int, length: int) -> None:
        """The first tokens of a row into another one."""

    def read(self, row: int, length: int) -> list[Array]:
        """Copies of a row's first tokens, tensor by tensor, [K, length, D] each."""

    def write(self, row: int, values: Sequence[Array]) -> None:
        """Put in what `read` gave."""

    def release(self, row: int) -> None:
        """Nobody needs what a row holds."""

    def take_over(self, other: SlotMemory, lengths: Sequence[int]) -> None:
        """Copy the first tokens of all rows from a smaller memory, which is of no use behind that."""


class HostSlots:
    """Rows on the host, reserved as addresses: they take memory page by page as tokens come, and give it back."""

    device = "cpu"

    def __init__(self, session: Session, shape: Shape) -> None:
        self.shape = shape
        size = math.prod(shape) * session.cache_dtype.itemsize
        try:
            self._maps = [_addresses(size) for _ in session.cache_names]
        except OSError as error:
            raise _no_room(shape) from error
        self._buffers = [np.frombuffer(each, dtype=session.cache_dtype).reshape(shape) for each in self._maps]

    def addresses(self, row: int) -> list[int]:
        """See `SlotMemory`."""
        return [buffer[row:].ctypes.data for buffer in self._buffers]

    def copy(self, source: int, target: int, length: int) -> None:
        """See `SlotMemory`."""
        for buffer in self._buffers:
            buffer[target, :, :length] = buffer[source, :, :length]

    def read(self, row: int, length: int) -> list[Array]:
        """See `SlotMemory`."""
        return [buffer[row, :, :length].copy() for buffer in self._buffers]

    def write(self, row: int, values: Sequence[Array]) -> None:
        """See `SlotMemory`."""
        for buffer, value in zip(self._buffers, values, strict=True):
            buffer[row, :, : value.shape[1]] = value

    def release(self, row: int) -> None:
        """See `SlotMemory`: the system gets whole pages back."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        for buffer, pages in zip(self._buffers, self._maps, strict=True):
            size = buffer[0].nbytes
            start, end = (
                -(-row * size // mmap.PAGESIZE) * mmap.PAGESIZE,
                (row + 1) * size // mmap.PAGESIZE * mmap.PAGESIZE,
            )
            if end > start:
                pages.madvise(mmap.MADV_DONTNEED, start, end - start)

    def take_over(self, other: SlotMemory, lengths: Sequence[int]) -> None:
        """See `SlotMemory`."""
        assert isinstance(other, HostSlots)
        for old, new in zip(other._buffers, self._buffers, strict=True):
            for row, length in enumerate(lengths):
                new[row, :, :length] = old[row, :, :length]


class DeviceSlots:
    """Rows in memory of onnxruntime's, which is taken at once and stays taken.

    onnxruntime gives the host no view of a GPU's memory: a part of a tensor becomes a value of its own when it is bound
    as an output of the graph.
    """

    def __init__(self, session: Session, shape: Shape) -> None:
        self.shape = shape
        self.device = session.cache_device
        self._session, self._dtype = session, session.cache_dtype
        try:  # zeros: what stands behind a row's tokens is multiplied by zero, and must be a number
            self._values = [session.cache_zeros(shape) for _ in session.cache_names]
        except Exception as error:
            raise _no_room(shape) from error

    def addresses(self, row: int) -> list[int]:
        """See `SlotMemory`."""
        start = row * math.prod(self.shape[1:]) * self._dtype.itemsize
        return [value.data_ptr() + start for value in self._values]

    def copy(self, source: int, target: int, length: int) -> None:  # noqa: ARG002 (a row lies in one piece)
        """See `SlotMemory`; the whole row, without the host."""
        for old, new in zip(self._row(source), self._row(target), strict=True):
            new.update_inplace(old)

    def read(self, row: int, length: int) -> list[Array]:
        """See `SlotMemory`."""
        return [value.numpy()[0, :, :length].copy() for value in self._row(row)]

    def write(self, row: int, values: Sequence[Array]) -> None:
        """See `SlotMemory`."""
        whole = np.zeros((1, *self.shape[1:]), self._dtype)
        for target, value in zip(self._row(row), values, strict=True):
            whole[0, :, : value.shape[1]] = value
            target.update_inplace(whole)

    def release(self, row: int) -> None:
        """See `SlotMemory`: it stays taken."""

    def take_over(self, other: SlotMemory, lengths: Sequence[int]) -> None:
        """See `SlotMemory`."""
        for row, length in enumerate(lengths):
            if length:
                self.write(row, other.read(row, length))

    def _row(self, row: int) -> list[Any]:
        """A row of each tensor as a value, [1, K, capacity, D]."""
        binding = self._session.graph.io_binding()
        for name, address in zip(self._session.cache_names, self.addresses(row), strict=True):
            shape = (1, *self.shape[1:])
            binding.bind_output(f"present.{name}", self.device, 0, self._dtype.type, shape, address)
        return list(binding.get_outputs())


def _no_room(shape: tuple[int, int, int, int]) -> MachineError:
    return MachineError(f"no room for {shape[0]} conversations of {shape[2]} tokens: take fewer")


def _addresses(size: int) -> mmap.mmap:
    """Zeros that take memory once they are written to, in small pages: a large one holds many tokens of one head."""
    if sys.platform != "linux":
        return mmap.mmap(-1, size)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    with contextlib.suppress(OSError):  # a kernel without large pages
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return pages
