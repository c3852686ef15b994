"""Cache of one conversation, for `Model`; an engine's caches are the slots of `scheduling/batch.py`.

Keys and values are [1, K, capacity or tokens, D] for K heads of size D; states, which have a fixed size, [1, *shape].
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import onnxruntime as ort

from llm_edge.runtime.backend.graph import Graph
from llm_edge.runtime.backend.host_pages import HostPages
from llm_edge.runtime.backend.states import StateHistory, StateMemory
from llm_edge.runtime.backend.window_history import Range, WindowHistory

_INITIAL_CAPACITY = 256


class SharedCache:
    """One buffer per tensor that is both past and present, so that nothing is copied between steps.

    Buffers start small and double, up to the context's limit; they are bound again only when they grow. States are in
    a `StateHistory` instead.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._tensors = [tensor for tensor in graph.shape.caches if tensor.grows]
        self._values: list[Any] = []
        self._bound = True
        self._states = StateMemory(graph) if graph.shape.has_states else None
        self._history = StateHistory(self._states) if self._states is not None else None
        window = graph.shape.window if graph.cache_device == "cpu" else 0
        self._window = WindowHistory(window) if window else None
        self._pages: list[HostPages] = []
        self.capacity = 0

    def bind(self, binding: Any, past: int, new: int) -> None:
        """Bind past and present tensors of a step over `new` tokens after `past`, before the graph runs."""
        if past + new > self.capacity:
            self._grow(binding, past, past + new)
        elif not self._bound:
            for tensor, value in zip(self._tensors, self._values, strict=True):
                binding.bind_ortvalue_output(f"present.{tensor.name}", value)
        self._bound = True
        if self._states is not None and self._history is not None:
            self._states.bind(binding, self._history.current, self._history.target())

    def advance(self, binding: Any, length: int) -> None:  # noqa: ARG002
        """Keep what the step computed; `length` tokens are cached now. Keys and values were written in place."""
        if self._history is not None:
            self._history.advance(length)
        if self._window is not None:
            self._release(self._window.advance(length))

    def rewind(self, length: int) -> int:
        """Keep only the first `length` tokens, or fewer if there are no states or windows of so many; returns how many.

        Later steps overwrite the keys and values of the others.
        """
        while True:
            found = length if self._history is None else self._history.available(length)
            found = found if self._window is None else self._window.available(found)
            if found == length:
                break
            length = found
        if self._history is not None:
            self._history.rewind(length)
        if self._window is not None:
            self._window.rewind(length)
        return length

    def keep_states(self, length: int) -> None:
        """Keep what is needed to return to the current length, besides the shortest that was kept."""
        if self._history is not None:
            self._history.keep()
        if self._window is not None:
            self._release(self._window.keep(length))

    def outputs_cleared(self) -> None:
        """The outputs of the binding were cleared, so the next `bind` has to bind them again."""
        self._bound = False

    def _release(self, ranges: Sequence[Range]) -> None:
        for pages, windowed in zip(self._pages, self._graph.shape.windowed, strict=True):
            if windowed:
                pages.release_rows(0, ranges)

    def _grow(self, binding: Any, used: int, needed: int) -> None:
        """Bind larger buffers, one at a time, so that only one exists twice."""
        capacity = max(needed, min(max(2 * self.capacity, _INITIAL_CAPACITY), self._graph.limit))
        old, self._values, self._pages = self._values, [], []
        held = [(0, used)] if self._window is None else list(self._window.held(used))
        self.capacity = 0  # if memory runs out half-way, the next step starts over
        for index, (tensor, windowed) in enumerate(zip(self._tensors, self._graph.shape.windowed, strict=True)):
            pages = HostPages((1, *tensor.sized(capacity)), self._graph.cache_dtype)
            buffer = pages.array
            if old:
                past = old[index].numpy()
                for start, end in held if windowed else [(0, used)]:
                    buffer[:, :, start:end] = past[:, :, start:end]
                old[index] = None
            self._pages.append(pages)
            value = ort.OrtValue.ortvalue_from_numpy(buffer, self._graph.cache_device, 0)
            binding.bind_ortvalue_input(f"past_key_values.{tensor.name}", value)
            binding.bind_ortvalue_output(f"present.{tensor.name}", value)
            self._values.append(value)
        self.capacity = capacity


class GrowingCache:
    """A new present tensor in every step, for graphs whose operators cannot write in place; see `SharedCache`."""

    def __init__(self, graph: Graph) -> None:
        self._names = graph.cache_names
        self._device = graph.cache_device
        self._empty = [graph.zeros((1, *tensor.sized(0))) for tensor in graph.shape.caches]
        self._values: list[Any] = []

    def bind(self, binding: Any, past: int, new: int) -> None:  # noqa: ARG002
        for index, name in enumerate(self._names):
            binding.bind_ortvalue_input(f"past_key_values.{name}", (self._values if past else self._empty)[index])
            binding.bind_output(f"present.{name}", self._device, 0)

    def advance(self, binding: Any, length: int) -> None:  # noqa: ARG002
        self._values = binding.get_outputs()[-len(self._names) :]

    def rewind(self, length: int) -> int:
        """Copy the first tokens."""
        if not length or not self._values or length == self._values[0].shape()[2]:
            return length
        for index, value in enumerate(self._values):
            kept = np.ascontiguousarray(value.numpy()[:, :, :length])
            self._values[index] = ort.OrtValue.ortvalue_from_numpy(kept, self._device, 0)
        return length

    def keep_states(self, length: int) -> None:
        """Nothing to do: such graphs have no states."""

    def outputs_cleared(self) -> None:
        """Nothing to do: every step binds everything."""


KVCache: TypeAlias = SharedCache | GrowingCache
