"""`StateHistory`: the states of one sequence after its latest token, and at some earlier lengths.

States (of convolutions, of Mamba's and of linear attention's recurrences) have a fixed size and include all tokens so
far, so they cannot be cut to fewer tokens as keys and values can. A step reads one buffer and writes another one: those
before it remain, and keeping them for later costs nothing but the memory.
"""

from __future__ import annotations

import functools
import math
import mmap
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from llm_edge.runtime.backend.graph import Graph
from llm_edge.runtime.errors import MachineError

Array = npt.NDArray[Any]
_ALIGNMENT = 64  # bytes


class HostStates:
    """A buffer for the states of one sequence on the host, an array [*shape] each.

    Attributes:
        addresses: of the arrays.
        values: the arrays as onnxruntime's values [1, *shape]; binding these takes a quarter of the time.
        shared: snapshots or other sequences refer to it, so nothing may write to it.
        row: it is a part of an array over several sequences, which is used again.
    """

    def __init__(self, arrays: Sequence[Array], *, row: bool = False) -> None:
        self._arrays = arrays
        self.addresses = [array.ctypes.data for array in arrays]
        self.shared = False
        self.row = row

    @functools.cached_property
    def values(self) -> list[Any]:
        return [ort.OrtValue.ortvalue_from_numpy(array[None]) for array in self._arrays]

    def copy_from(self, other: States) -> None:
        """Copy the states of another buffer."""
        assert isinstance(other, HostStates)
        for target, source in zip(self._arrays, other._arrays, strict=True):
            target[...] = source

    def read(self) -> list[Array]:
        """Copies of the arrays."""
        return [array.copy() for array in self._arrays]

    def write(self, values: Iterable[Array]) -> None:
        """Write what `read` returned."""
        for target, value in zip(self._arrays, values, strict=True):
            target[...] = value


class DeviceStates:
    """A buffer in memory that onnxruntime allocates, such as a GPU's: values [1, *shape]; see `HostStates`."""

    def __init__(self, values: Sequence[Any], *, row: bool = False) -> None:
        self.values = values
        self.addresses = [value.data_ptr() for value in values]
        self.shared = False
        self.row = row

    def copy_from(self, other: States) -> None:
        assert isinstance(other, DeviceStates)
        for target, source in zip(self.values, other.values, strict=True):
            target.update_inplace(source)

    def read(self) -> list[Array]:
        return [value.numpy()[0].copy() for value in self.values]

    def write(self, values: Iterable[Array]) -> None:
        for target, value in zip(self.values, values, strict=True):
            target.update_inplace(np.ascontiguousarray(value[None]))


States: TypeAlias = HostStates | DeviceStates


class StateMemory:
    """Allocates buffers for the states of a graph, and binds them.

    Attributes:
        names: of the states, in the order of a buffer's arrays.
        shapes: their shapes.
        sizes: their sizes in bytes.
        dtype: their type.
        device: `cpu` or `cuda`, where the graph reads its cache.
        on_host: Python can access that memory.
        zeros: the states of an empty sequence, which many sequences share.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        tensors = [tensor for tensor in graph.shape.caches if not tensor.grows]
        self.names = [tensor.name for tensor in tensors]
        self.shapes = [tensor.shape for tensor in tensors]
        self.dtype = graph.state_dtype
        self.device = graph.cache_device
        self.on_host = _on_host(graph)
        self.sizes = [math.prod(shape) * self.dtype.itemsize for shape in self.shapes]
        self._ports = [(f"past_key_values.{name}", f"present.{name}") for name in self.names]
        self.zeros = self.allocate()
        self.zeros.shared = True

    @property
    def state_bytes(self) -> int:
        """Bytes of a buffer."""
        return sum(self.sizes)

    def allocate(self) -> States:
        """A new buffer of zeros; raises MachineError if there is no memory for it."""
        try:
            if not self.on_host:
                return DeviceStates([self._graph.zeros((1, *shape), self.dtype) for shape in self.shapes])
            starts = [0]
            for size in self.sizes:
                starts.append(starts[-1] + -(-size // _ALIGNMENT) * _ALIGNMENT)
            pages = mapped_zeros((starts[-1],), np.dtype(np.uint8), private=True)
            parts = [pages[start : start + size] for start, size in zip(starts, self.sizes, strict=False)]
        except Exception as error:
            raise MachineError("not enough memory for the states of a sequence") from error
        return HostStates(
            [part.view(self.dtype).reshape(shape) for part, shape in zip(parts, self.shapes, strict=True)]
        )

    def bind(self, binding: Any, past: States, present: States) -> None:
        """Bind the states of one sequence before a step and after it."""
        for (name, output), source, target in zip(self._ports, past.values, present.values, strict=True):
            binding.bind_ortvalue_input(name, source)
            binding.bind_ortvalue_output(output, target)

    def bind_rows(self, binding: Any, past: States, present: States, rows: int) -> None:
        """Bind the states of sequences that are adjacent in memory, given those of the first one."""
        kind, device = self.dtype.type, self.device
        addresses = zip(past.addresses, present.addresses, strict=True)
        for (name, output), shape, (source, target) in zip(self._ports, self.shapes, addresses, strict=True):
            binding.bind_input(name, device, 0, kind, (rows, *shape), source)
            binding.bind_output(output, device, 0, kind, (rows, *shape), target)


class StateHistory:
    """The states of one sequence at its current length and at earlier ones.

    Attributes:
        length: number of tokens that the current states include.
        current: the states at that length.
        snapshots: states by length that `keep` kept, and whose tokens are still the sequence's.
    """

    def __init__(self, memory: StateMemory) -> None:
        self._memory = memory
        self.length = 0
        self.current = memory.zeros
        self.snapshots: dict[int, States] = {}
        self._previous: tuple[int, States] | None = None  # before the latest step
        self._target: States | None = None

    def target(self) -> States:
        """The buffer that the next step writes to, which ends what was known before the latest one."""
        if self._target is None:
            (_, previous), self._previous = self._previous or (0, self._memory.zeros), None
            self._target = self._memory.allocate() if previous.shared or previous.row else previous
        return self._target

    def redirect(self, target: States) -> None:
        """Let the next step write to this buffer."""
        self._previous, self._target = None, target

    def move_to(self, row: States) -> None:
        """Copy the current states to this buffer, unless they are there."""
        if self.current is not row:
            row.copy_from(self.current)
            self.current = row

    def leave(self, row: States) -> None:
        """Keep what is in this buffer elsewhere, because others are about to write to it."""
        if self._previous is not None and self._previous[1] is row:
            self._previous = None
        if self._target is row:
            self._target = None
        if self.current is row:
            self.move_to(self._memory.allocate())

    def advance(self, length: int) -> None:
        """A step has written the target: it has the current states, of `length` tokens."""
        assert self._target is not None
        self._previous = self.length, self.current
        self.length, self.current, self._target = length, self._target, None

    def available(self, length: int) -> int:
        """The most of the first `length` tokens of which there are states."""
        lengths = [self.length, *self.snapshots, *([self._previous[0]] if self._previous is not None else [])]
        return max((each for each in lengths if each <= length), default=0)

    def at(self, length: int) -> States:
        """The states at a length that is available."""
        if not length:
            return self._memory.zeros
        if length == self.length:
            return self.current
        if self._previous is not None and self._previous[0] == length:
            return self._previous[1]
        return self.snapshots[length]

    def rewind(self, length: int) -> int:
        """Return to the states of `length` tokens, or of the most that are available; returns of how many."""
        length = self.available(length)
        found, dropped = self.at(length), self.current
        if found is dropped:
            return length
        self.snapshots = {kept: states for kept, states in self.snapshots.items() if kept <= length}
        self._previous = None
        if not (dropped.shared or dropped.row):
            self._target = dropped
        self.length, self.current = length, found
        return length

    def share(self, length: int) -> States:
        """A buffer with the states at a length that is available, which does not change any more."""
        states = self.at(length)
        if states.row:
            copied = self._memory.allocate()
            copied.copy_from(states)
            states = copied
        states.shared = True
        return states

    def keep(self) -> None:
        """Keep the current states: the latest ones, and those of the shortest length, which most prompts share."""
        self.snapshots[self.length] = self.share(self.length)
        for length in sorted(self.snapshots)[1:-1]:
            del self.snapshots[length]

    def take_over(self, other: StateHistory, length: int) -> None:
        """Begin with the states of another sequence, whose first `length` tokens are the same."""
        self.begin(other.share(length), length)
        self.snapshots = {kept: states for kept, states in other.snapshots.items() if kept <= length}

    def begin(self, states: States, length: int) -> None:
        """Begin with these states of `length` tokens."""
        self._previous = self._target = None
        self.length, self.current, self.snapshots = length, states, {}

    def settle(self) -> None:
        """Drop what only the next step needs."""
        self._previous = self._target = None

    def buffers(self) -> list[States]:
        """The buffers with states that can be returned to, except for the empty one."""
        found = {id(states): states for states in (self.current, *self.snapshots.values())}
        found.pop(id(self._memory.zeros), None)
        return list(found.values())


def _on_host(graph: Graph) -> bool:
    return graph.cache_device == "cpu"


def mapped_zeros(shape: tuple[int, ...], dtype: np.dtype[Any], *, private: bool = False) -> Array:
    """Zeros in separately mapped pages, which take memory only once written to and return it when freed.

    Reading takes memory too, unless they are `private`; those may be huge pages, which suit data that fills them.
    """
    size = math.prod(shape) * dtype.itemsize
    flags = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if private and hasattr(mmap, "MAP_PRIVATE") else {}
    return np.frombuffer(mmap.mmap(-1, size, **flags), dtype=dtype).reshape(shape)
