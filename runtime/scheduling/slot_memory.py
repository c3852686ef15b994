"""`SlotMemory`: the keys and values of slots, on the host or on a GPU; their states are in `StateSlots`.

A tensor is [slots, K, capacity, D] for K key/value heads of size D, which may differ between tensors, and contiguous:
adjacent slots are a part of it by address.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from llm_edge.runtime.backend.graph import Graph
from llm_edge.runtime.backend.host_pages import HostPages
from llm_edge.runtime.backend.window_history import Range
from llm_edge.runtime.errors import MachineError

Array = npt.NDArray[Any]


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
        self._windowed = graph.shape.windowed

    def addresses(self, slot: int) -> list[int]:
        """The address of a slot in each tensor."""
        return [buffer[slot:].ctypes.data for buffer in self._buffers]

    def copy(self, source: int, target: int, length: int, held: Sequence[Range] | None = None) -> None:
        """Copy the first tokens of a slot to another one; in layers with windows those in the ranges `held`."""
        for buffer, windowed in zip(self._buffers, self._windowed, strict=True):
            for start, end in held if windowed and held is not None else [(0, length)]:
                buffer[target, :, start:end] = buffer[source, :, start:end]

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

    def release_rows(self, slot: int, ranges: Sequence[Range]) -> None:
        """Free the memory of ranges of tokens in layers with windows."""
        for pages, windowed in zip(self._pages, self._windowed, strict=True):
            if windowed:
                pages.release_rows(slot, ranges)

    def take_over(
        self, other: SlotMemory, lengths: Sequence[int], held: Sequence[Sequence[Range]] | None = None
    ) -> None:
        """Copy the first tokens of all slots from a smaller memory, which must not be used afterwards; see `copy`."""
        assert isinstance(other, HostSlots)
        for old, new, windowed in zip(other._buffers, self._buffers, self._windowed, strict=True):
            for slot, length in enumerate(lengths):
                for start, end in held[slot] if windowed and held is not None else [(0, length)]:
                    new[slot, :, start:end] = old[slot, :, start:end]


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

    def copy(self, source: int, target: int, *_: object) -> None:
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

    def release_rows(self, slot: int, ranges: Sequence[Range]) -> None:
        """Nothing to do."""

    def take_over(self, other: SlotMemory, lengths: Sequence[int], *_: object) -> None:
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
