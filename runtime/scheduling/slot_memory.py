"""`SlotMemory`: the keys and values of slots, on the host or on a GPU; their states are in `StateSlots`.

A tensor is [slots, K, capacity, D] for K key/value heads of size D, which may differ between tensors, and contiguous:
adjacent slots are a part of it by address.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from llm_edge.runtime.backend.graph import Graph
from llm_edge.runtime.errors import MachineError

_MAP_NORESERVE = 0x4000  # mmap(2) on Linux; Python's mmap has it from 3.13 on

Array = npt.NDArray[Any]


class HostPages:
    """An array [slots, ...] on the host: reserved address space that takes memory page by page and can return it."""

    def __init__(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> None:
        self._map = _reserve_addresses(math.prod(shape) * dtype.itemsize)
        self.array: Array = np.frombuffer(self._map, dtype=dtype).reshape(shape)

    def release(self, slot: int) -> None:
        """Return the whole pages of a slot to the system."""
        if not hasattr(mmap, "MADV_DONTNEED"):
            return
        size = self.array[0].nbytes
        start = -(-slot * size // mmap.PAGESIZE) * mmap.PAGESIZE
        end = (slot + 1) * size // mmap.PAGESIZE * mmap.PAGESIZE
        if end > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, end - start)


class HostSlots:
    """Slots on the host, in `HostPages`.

    Attributes:
        device: `cpu` or `cuda`, as onnxruntime calls it.
        capacity: number of tokens that a slot can hold.
    """

    device = "cpu"

    def __init__(self, graph: Graph, slots: int, capacity: int) -> None:
        self.capacity = capacity
        shapes = [(slots, *tensor.sized(capacity)) for tensor in graph.shape.caches if tensor.grows]
        try:
            self._pages = [HostPages(shape, graph.cache_dtype) for shape in shapes]
        except OSError as error:
            raise _out_of_memory(slots, capacity) from error
        self._buffers = [pages.array for pages in self._pages]

    def addresses(self, slot: int) -> list[int]:
        """The address of a slot in each tensor."""
        return [buffer[slot:].ctypes.data for buffer in self._buffers]

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first tokens of a slot to another one."""
        for buffer in self._buffers:
            buffer[target, :, :length] = buffer[source, :, :length]

    def read(self, slot: int, length: int) -> list[Array]:
        """Copies of a slot's first tokens, one array [K, length, D] per tensor."""
        return [buffer[slot, :, :length].copy() for buffer in self._buffers]

    def write(self, slot: int, values: Sequence[Array]) -> None:
        """Write what `read` returned."""
        for buffer, value in zip(self._buffers, values, strict=True):
            buffer[slot, :, : value.shape[1]] = value

    def release(self, slot: int) -> None:
        """Free the memory of a slot."""
        for pages in self._pages:
            pages.release(slot)

    def take_over(self, other: SlotMemory, lengths: Sequence[int]) -> None:
        """Copy the first tokens of all slots from a smaller memory, which must not be used afterwards."""
        assert isinstance(other, HostSlots)
        for old, new in zip(other._buffers, self._buffers, strict=True):
            for slot, length in enumerate(lengths):
                new[slot, :, :length] = old[slot, :, :length]


class DeviceSlots:
    """Slots in memory that onnxruntime allocates at once; the interface is that of `HostSlots`.

    The host cannot access a GPU's memory through onnxruntime: a part of a tensor becomes a separate value when it is
    bound as an output of the graph.
    """

    def __init__(self, graph: Graph, slots: int, capacity: int) -> None:
        self.capacity = capacity
        self.device = graph.cache_device
        tensors = [tensor for tensor in graph.shape.caches if tensor.grows]
        self._names = [tensor.name for tensor in tensors]
        self._shapes = [tensor.sized(capacity) for tensor in tensors]
        self._graph, self._dtype = graph, graph.cache_dtype
        try:  # zeros: positions after a slot's tokens are multiplied by zero, so they must be finite
            self._values = [graph.zeros((slots, *shape)) for shape in self._shapes]
        except Exception as error:
            raise _out_of_memory(slots, capacity) from error

    def addresses(self, slot: int) -> list[int]:
        sizes = [math.prod(shape) * self._dtype.itemsize for shape in self._shapes]
        return [value.data_ptr() + slot * size for value, size in zip(self._values, sizes, strict=True)]

    def copy(self, source: int, target: int, length: int) -> None:  # noqa: ARG002 (a slot is contiguous)
        """Copy the whole slot on the device."""
        for old, new in zip(self._slot(source), self._slot(target), strict=True):
            new.update_inplace(old)

    def read(self, slot: int, length: int) -> list[Array]:
        return [value.numpy()[0, :, :length].copy() for value in self._slot(slot)]

    def write(self, slot: int, values: Sequence[Array]) -> None:
        for target, value, shape in zip(self._slot(slot), values, self._shapes, strict=True):
            whole = np.zeros((1, *shape), self._dtype)
            whole[0, :, : value.shape[1]] = value
            target.update_inplace(whole)

    def release(self, slot: int) -> None:
        """Nothing to do: the memory stays allocated."""

    def take_over(self, other: SlotMemory, lengths: Sequence[int]) -> None:
        for slot, length in enumerate(lengths):
            if length:
                self.write(slot, other.read(slot, length))

    def _slot(self, slot: int) -> list[Any]:
        """A slot of each tensor as a value [1, K, capacity, D]."""
        parts = [
            (f"present.{name}", (1, *shape), address)
            for name, shape, address in zip(self._names, self._shapes, self.addresses(slot), strict=True)
        ]
        return device_values(self._graph, parts, self._dtype)


SlotMemory: TypeAlias = HostSlots | DeviceSlots


def device_values(graph: Graph, parts: Sequence[tuple[str, tuple[int, ...], int]], dtype: np.dtype[Any]) -> list[Any]:
    """Parts of tensors as values; each part has the name of an output of the graph, a shape and an address."""
    binding = graph.inference.io_binding()
    for name, shape, address in parts:
        binding.bind_output(name, graph.cache_device, 0, dtype.type, shape, address)
    return list(binding.get_outputs())


def _out_of_memory(slots: int, capacity: int) -> MachineError:
    return MachineError(f"not enough memory for {slots} sequences of {capacity} tokens: reduce active or kept")


def _reserve_addresses(size: int) -> mmap.mmap:
    """Zeros that take memory once written to, in small pages: a large page holds many tokens of one head."""
    if not hasattr(mmap, "MADV_NOHUGEPAGE"):  # not Linux
        return mmap.mmap(-1, size)
    pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        pages.madvise(mmap.MADV_NOHUGEPAGE)
    return pages
