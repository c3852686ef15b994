"""KV cache of one conversation, for `Model`; an engine's caches are the slots of `scheduling/batch.py`.

Tensors are [1, K, capacity or tokens, D] for K key/value heads of size D.
"""

from __future__ import annotations

import math
import mmap
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

from llm_edge.runtime.backend.graph import Graph

_INITIAL_CAPACITY = 256


class SharedCache:
    """One buffer per tensor that is both past and present, so that nothing is copied between steps.

    Buffers start small and double, up to the context's limit; they are bound again only when they grow.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._names = graph.cache_names
        self._values: list[Any] = []
        self._bound = True
        self.capacity = 0

    def bind(self, binding: Any, past: int, new: int) -> None:
        """Bind past and present tensors of a step over `new` tokens after `past`, before the graph runs."""
        if past + new > self.capacity:
            self._grow(binding, past, past + new)
        elif not self._bound:
            for name, value in zip(self._names, self._values, strict=True):
                binding.bind_ortvalue_output(f"present.{name}", value)
        self._bound = True

    def advance(self, binding: Any) -> None:
        """Keep the keys and values that the step computed; nothing to do: it wrote in place."""

    def rewind(self, length: int) -> None:
        """Keep only the first `length` tokens; nothing to do: later steps overwrite the rest."""

    def outputs_cleared(self) -> None:
        """The outputs of the binding were cleared, so the next `bind` has to bind them again."""
        self._bound = False

    def _grow(self, binding: Any, used: int, needed: int) -> None:
        """Bind larger buffers, one at a time, so that only one exists twice."""
        capacity = max(needed, min(max(2 * self.capacity, _INITIAL_CAPACITY), self._graph.limit))
        old, self._values = self._values, []
        self.capacity = 0  # if memory runs out half-way, the next step starts over
        for index, (name, tensor) in enumerate(zip(self._names, self._graph.shape.caches, strict=True)):
            buffer = _zeros((1, *tensor.sized(capacity)), self._graph.cache_dtype)
            if old:
                buffer[:, :, :used] = old[index].numpy()[:, :, :used]
                old[index] = None
            value = ort.OrtValue.ortvalue_from_numpy(buffer, self._graph.cache_device, 0)
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
            self._values.append(value)
        self.capacity = capacity


class GrowingCache:
    """A new present tensor in every step, for graphs whose operators cannot write in place; see `SharedCache`."""

    def __init__(self, graph: Graph) -> None:
        self._names = graph.cache_names
        self._device = graph.cache_device
        self._empty = [graph.cache_zeros((1, *tensor.sized(0))) for tensor in graph.shape.caches]
        self._values: list[Any] = []

    def bind(self, binding: Any, past: int, new: int) -> None:  # noqa: ARG002
        for index, name in enumerate(self._names):
            binding.bind_ortvalue_input(f"past_key_values.{name}", (self._values if past else self._empty)[index])
            binding.bind_output(f"present.{name}", self._device, 0)

    def advance(self, binding: Any) -> None:
        self._values = binding.get_outputs()[-len(self._names) :]

    def rewind(self, length: int) -> None:
        """Copy the first tokens."""
        if not length or not self._values or length == self._values[0].shape()[2]:
            return
        for index, value in enumerate(self._values):
            kept = np.ascontiguousarray(value.numpy()[:, :, :length])
            self._values[index] = ort.OrtValue.ortvalue_from_numpy(kept, self._device, 0)

    def outputs_cleared(self) -> None:
        """Nothing to do: every step binds everything."""


KVCache: TypeAlias = SharedCache | GrowingCache


def _zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Zeros in separately mapped pages, which take memory only once written to and return it when freed."""
    return np.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize), dtype=dtype).reshape(shape)
