"""`ModelShape`: the dimensions of a model, and what it keeps for a sequence between steps."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class CacheTensor:
    """A tensor that a model keeps for a sequence: past_key_values.<name> before a step and present.<name> after it.

    Attributes:
        name: such as `0.key`, `0.index`, `3.convolution.0` or `3.state.0`; the first part is the layer.
        shape: [K, D] of keys or values [B, K, tokens, D], which grow; of a state, whose size is fixed, without B.
        grows: whether it has an entry per token.
    """

    name: str
    shape: tuple[int, ...]
    grows: bool

    def sized(self, tokens: int) -> tuple[int, ...]:
        """The shape for one sequence with room for `tokens`."""
        return (self.shape[0], tokens, self.shape[1]) if self.grows else self.shape


def key_value_caches(layers: int, heads: int, head_dim: int) -> tuple[CacheTensor, ...]:
    """The cache of a model whose layers all keep keys and values of one shape."""
    names = (f"{layer}.{part}" for layer in range(layers) for part in ("key", "value"))
    return tuple(CacheTensor(name, (heads, head_dim), grows=True) for name in names)


@dataclass(frozen=True, slots=True)
class ModelShape:
    """The dimensions of a model that callers of its graph need.

    Attributes:
        vocab_size: V, width of the logits.
        num_hidden_layers: number of layers.
        max_position_embeddings: maximum number of tokens in the context.
        caches: what the model keeps for a sequence, in the order of the graph's inputs.
        windows: by layer, how many tokens a position attends to, including itself; 0 for all. Empty if all have 0.
    """

    vocab_size: int
    num_hidden_layers: int
    max_position_embeddings: int
    caches: tuple[CacheTensor, ...]
    windows: tuple[int, ...] = ()

    @property
    def window(self) -> int:
        """The largest window; 0 if no layer has one."""
        return max(self.windows, default=0)

    @property
    def windowed(self) -> tuple[bool, ...]:
        """Whether the layer of a tensor has a window, for each that grows."""
        layers = [int(tensor.name.partition(".")[0]) for tensor in self.caches if tensor.grows]
        return tuple(layer < len(self.windows) and self.windows[layer] > 0 for layer in layers)

    @property
    def uniform_cache(self) -> tuple[int, int] | None:
        """Heads and their size, if all layers keep keys and values of one shape; None otherwise."""
        heads, size = self.caches[0].shape if self.caches[0].grows else (0, 0)
        uniform = self.caches == key_value_caches(self.num_hidden_layers, heads, size)
        return (heads, size) if uniform else None

    @property
    def has_states(self) -> bool:
        """Whether the cache has states, which cannot be cut to fewer tokens."""
        return not all(tensor.grows for tensor in self.caches)

    @property
    def token_numbers(self) -> int:
        """Number of keys and values per token."""
        return sum(math.prod(tensor.shape) for tensor in self.caches if tensor.grows)

    @property
    def windowed_numbers(self) -> int:
        """Number of keys and values per token in layers with windows."""
        grown = (tensor for tensor in self.caches if tensor.grows)
        return sum(math.prod(each.shape) for each, windowed in zip(grown, self.windowed, strict=True) if windowed)

    @property
    def state_numbers(self) -> int:
        """Size of the states of a sequence."""
        return sum(math.prod(tensor.shape) for tensor in self.caches if not tensor.grows)
