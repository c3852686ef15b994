"""Keys and values of one conversation, on the device where the graph reads them. Knows nothing of tokens or text.

Shapes are [1, K, capacity or tokens, D] for K key/value heads of size D.
"""

from __future__ import annotations

import math
import mmap
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import onnxruntime as ort

_FIRST_CAPACITY = 256


class KVCache(Protocol):
    """The cache side of a step: `bind` before the session runs, `advance` behind it."""

    def bind(self, binding: Any, past: int, new: int) -> None:
        """Bind past and present tensors of a step over `new` tokens behind `past`."""

    def advance(self, binding: Any) -> None:
        """Keep what the step made."""

    def rewind(self, length: int) -> None:
        """Forget all tokens but the first ones."""

    def unbound(self) -> None:
        """The binding has lost its outputs: bind them again."""


class SharedCache:
    """One buffer a tensor that is past and present at once: nothing is copied from step to step.

    Buffers start small and double, up to `limit` tokens; they are bound again only when they grow.
    """

    def __init__(
        self, names: list[str], heads: int, head_dim: int, dtype: np.dtype[Any], device: str, limit: int
    ) -> None:
        self._names = names
        self._shape = (heads, head_dim)
        self._dtype = dtype
        self._device = device
        self._limit = limit
        self._values: list[Any] = []
        self._bound = True
        self.capacity = 0

    def bind(self, binding: Any, past: int, new: int) -> None:
        """See `KVCache`."""
        if past + new > self.capacity:
            self._grow(binding, past, past + new)
        elif not self._bound:
            for name, value in zip(self._names, self._values, strict=True):
                binding.bind_ortvalue_output(f"present.{name}", value)
        self._bound = True

    def advance(self, binding: Any) -> None:
        """See `KVCache`: the step wrote in place."""

    def rewind(self, length: int) -> None:
        """See `KVCache`: what is forgotten is overwritten."""

    def unbound(self) -> None:
        """See `KVCache`."""
        self._bound = False

    def _grow(self, binding: Any, used: int, needed: int) -> None:
        """Bind larger buffers; each takes its old one's place at once, so that not all are there twice."""
        heads, head_dim = self._shape
        capacity = max(needed, min(max(2 * self.capacity, _FIRST_CAPACITY), self._limit))
        old, self._values = self._values, []
        self.capacity = 0  # should memory run out half-way, the next step begins anew
        for index, name in enumerate(self._names):
            buffer = _zeros((1, heads, capacity, head_dim), self._dtype)
            if old:
                buffer[:, :, :used] = old[index].numpy()[:, :, :used]
                old[index] = None
            value = ort.OrtValue.ortvalue_from_numpy(buffer, self._device, 0)
            binding.bind_ortvalue_input(f"past_key_values.{name}", value)
            binding.bind_ortvalue_output(f"present.{name}", value)
            self._values.append(value)
        self.capacity = capacity


class GrowingCache:
    """A new present tensor each step, for graphs whose operators cannot write in place."""

    def __init__(self, names: list[str], heads: int, head_dim: int, dtype: np.dtype[Any], device: str) -> None:
        self._names = names
        self._device = device
        empty = np.zeros((1, heads, 0, head_dim), dtype=dtype)
        self._empty = ort.OrtValue.ortvalue_from_numpy(empty, device, 0)
        self._values: list[Any] = []

    def bind(self, binding: Any, past: int, new: int) -> None:  # noqa: ARG002
        """See `KVCache`."""
        for index, name in enumerate(self._names):
            binding.bind_ortvalue_input(f"past_key_values.{name}", self._values[index] if past else self._empty)
            binding.bind_output(f"present.{name}", self._device, 0)

    def advance(self, binding: Any) -> None:
        """See `KVCache`."""
        self._values = binding.get_outputs()[-len(self._names) :]

    def rewind(self, length: int) -> None:
        """See `KVCache`; what stays is copied, but all or nothing."""
        if not length or not self._values or length == self._values[0].shape()[2]:
            return
        for index, value in enumerate(self._values):
            kept = np.ascontiguousarray(value.numpy()[:, :, :length])
            self._values[index] = ort.OrtValue.ortvalue_from_numpy(kept, self._device, 0)

    def unbound(self) -> None:
        """See `KVCache`: every step binds all."""


def _zeros(shape: tuple[int, ...], dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    """Zeros in pages of their own: they take memory once they are written to, and give it back when they go."""
    return np.frombuffer(mmap.mmap(-1, math.prod(shape) * dtype.itemsize), dtype=dtype).reshape(shape)
