"""`StateSlots`: the states of the sequences in the slots of a batch.

A step over one slot reads and writes any buffers of a `StateHistory`. A step over adjacent slots needs adjacent states:
it reads one of two arrays [slots, *shape] per state and writes the other one, so active slots change sides together.
Whatever else is in the array that is written moves to buffers first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

from llm_edge.runtime.backend.graph import Graph
from llm_edge.runtime.backend.host_pages import HostPages
from llm_edge.runtime.backend.states import Array, DeviceStates, HostStates, StateHistory, StateMemory, States
from llm_edge.runtime.errors import MachineError
from llm_edge.runtime.scheduling.slot_memory import device_values


class StateSlots:
    """The states of all slots; lengths are those of `Batch.lengths`."""

    def __init__(self, graph: Graph, slots: int) -> None:
        self._memory = StateMemory(graph)
        rows: type[_HostRows | _DeviceRows] = _HostRows if self._memory.on_host else _DeviceRows
        try:
            self._sides = [rows(graph, self._memory, slots) for _ in range(2)]
        except Exception as error:
            raise MachineError(
                f"not enough memory for the states of {slots} sequences: reduce active or kept"
            ) from error
        self._histories = [StateHistory(self._memory) for _ in range(slots)]

    @property
    def state_bytes(self) -> int:
        """Bytes of the states of a sequence."""
        return self._memory.state_bytes

    def bind_one(self, binding: Any, slot: int) -> None:
        """Bind the states of one slot."""
        history = self._histories[slot]
        self._memory.bind(binding, history.current, history.target())

    def bind_side(self, binding: Any, first: int, slots: int, side: int) -> None:
        """Bind the states of adjacent slots for a step that `choose_side` prepared."""
        past, present = self._sides[side].states[first], self._sides[1 - side].states[first]
        self._memory.bind_rows(binding, past, present, slots)

    def choose_side(self, first: int, active: Sequence[bool]) -> int:
        """Prepare a step over adjacent slots; returns the side that it reads: where most active slots are."""
        histories = self._histories[first : first + len(active)]
        rows = [side.states[first : first + len(active)] for side in self._sides]
        ahead = sum(
            (history.current is one) - (history.current is other)
            for history, one, other, advances in zip(histories, *rows, active, strict=True)
            if advances
        )
        side = 0 if ahead >= 0 else 1
        for history, past, present, advances in zip(histories, rows[side], rows[1 - side], active, strict=True):
            if advances:
                history.move_to(past)
                history.redirect(present)
            else:
                history.leave(present)
        return side

    def advance(self, slot: int, length: int) -> None:
        """A step has computed the states of `length` tokens."""
        self._histories[slot].advance(length)

    def available(self, slot: int, length: int) -> int:
        """The most of a slot's first `length` tokens of which there are states."""
        return self._histories[slot].available(length)

    def rewind(self, slot: int, length: int) -> int:
        """Return to the states of `length` tokens, or of the most that are available; returns of how many."""
        return self._histories[slot].rewind(length)

    def keep(self, slot: int) -> None:
        """Keep the states of a slot at its current length."""
        self._histories[slot].keep()

    def copy(self, source: int, target: int, length: int) -> None:
        """Begin a slot with the states of another one at a length that is available."""
        self._histories[target].take_over(self._histories[source], length)

    def read(self, slot: int, length: int) -> list[Array]:
        """Copies of a slot's states at a length that is available, one array [*shape] per state."""
        return self._histories[slot].at(length).read()

    def write(self, slot: int, values: Iterable[Array], length: int) -> None:
        """Begin a slot with what `read` returned, and keep it."""
        states = self._memory.allocate()
        states.write(values)
        self._histories[slot].begin(states, length)
        self._histories[slot].keep()

    def settle(self, slot: int) -> None:
        """Free what only the next step of a slot would need."""
        history = self._histories[slot]
        history.settle()
        for side in self._sides:
            if side.states[slot] is not history.current:
                side.release(slot)

    def release(self, slot: int) -> None:
        """Empty a slot and free its memory."""
        self._histories[slot].rewind(0)
        self.settle(slot)

    def held_bytes(self, slots: Iterable[int]) -> int:
        """Bytes of what these slots hold; a buffer that several of them share counts once."""
        buffers = {id(states) for slot in slots for states in self._histories[slot].buffers()}
        return len(buffers) * self.state_bytes


class _HostRows:
    """One array [slots, *shape] per state on the host; `states` has the buffer of each slot."""

    def __init__(self, graph: Graph, memory: StateMemory, slots: int) -> None:  # noqa: ARG002
        self._pages = [HostPages((slots, *shape), memory.dtype) for shape in memory.shapes]
        self.states: list[States] = [
            HostStates([pages.array[slot] for pages in self._pages], row=True) for slot in range(slots)
        ]

    def release(self, slot: int) -> None:
        for pages in self._pages:
            pages.release(slot)


class _DeviceRows:
    """See `_HostRows`; the memory stays allocated."""

    def __init__(self, graph: Graph, memory: StateMemory, slots: int) -> None:
        self._values = [graph.zeros((slots, *shape), memory.dtype) for shape in memory.shapes]
        self.states: list[States] = []
        for slot in range(slots):
            parts = [
                (f"present.{name}", (1, *shape), value.data_ptr() + slot * math.prod(shape) * memory.dtype.itemsize)
                for name, shape, value in zip(memory.names, memory.shapes, self._values, strict=True)
            ]
            self.states.append(DeviceStates(device_values(graph, parts, memory.dtype), row=True))

    def release(self, slot: int) -> None:
        """Nothing to do."""
