"""The shape of a decoder. Knows nothing of files, weights or tokenizers: families turn their configs into this."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from llm_edge.model.rope import Rope
from llm_edge.runtime.errors import CheckpointError

# The bounds are far beyond any published model: what lies outside them is a damaged or hostile file.
_BOUNDS: Mapping[str, tuple[float, float]] = {
    "vocab_size": (1, 4_000_000),
    "hidden_size": (1, 65_536),
    "intermediate_size": (1, 1_048_576),
    "num_hidden_layers": (1, 1_024),
    "num_attention_heads": (1, 4_096),
    "num_key_value_heads": (1, 4_096),
    "head_dim": (1, 4_096),
    "max_position_embeddings": (2, 2_097_152),
    "norm_eps": (0.0, 1.0),
    "attention_scale": (1e-6, 1e6),
    "embedding_scale": (1e-6, 1e6),
    "hidden_scale": (1e-6, 1e6),
}
_MOST_ANGLES = 1 << 27  # of all rotary tables together: 1 GiB of cosines and sines


class Norm(Enum):
    """RMS: RMSNorm (arXiv:1910.07467). LAYER: LayerNorm with a bias (arXiv:1607.06450)."""

    RMS = "rms"
    LAYER = "layer"


class QKNorm(Enum):
    """Where queries and keys are normalised: NONE, each HEAD by itself, or all heads together (FULL)."""

    NONE = "none"
    HEAD = "head"
    FULL = "full"


class Activation(Enum):
    """Of the feed-forward network; GELU_TANH is GELU's approximation by tanh (arXiv:1606.08415)."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU = "relu"


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """What may differ from layer to layer.

    Attributes:
        rope: rotary positions, or None for a layer without.
        window: tokens a position attends to, itself included; None for all before it.
    """

    rope: Rope | None = None
    window: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """A decoder. The defaults are a LLaMA: RMSNorm before each block, rotary positions, SwiGLU, no biases.

    Raises `CheckpointError` where a value is out of bounds or two of them contradict each other.

    Attributes:
        vocab_size: V, rows of the embedding and width of the logits.
        hidden_size: width of the residual stream.
        intermediate_size: width inside the feed-forward network.
        num_attention_heads: H, query heads.
        num_key_value_heads: K, key/value heads; divides H.
        head_dim: D, width of a head.
        max_position_embeddings: tokens a context holds at most.
        layers: one entry a layer.
        norm_eps: epsilon of all norms.
        tie_word_embeddings: the output head is the embedding.
        norm: kind of all norms but those of queries and keys, which are RMS.
        pre_norm: each block's input is normalised.
        post_norm: each block's output is normalised.
        parallel_blocks: attention and feed-forward network both read the layer's input, and are added together.
        learned_positions: a table of positions is added to the embedding.
        qk_norm: see `QKNorm`; before the rotation.
        qkv_bias: of the query, key and value projections.
        output_bias: of attention's output projection.
        mlp_bias: of all projections of the feed-forward network.
        gated_mlp: down(activation(gate(x)) * up(x)) instead of down(activation(up(x))).
        activation: see `Activation`.
        attention_scale: factor of query · key; None is 1 / sqrt(D).
        embedding_scale: factor of the embedding, but not of a head tied to it.
        hidden_scale: the model's hidden states divided by what the last norm yields: families that fold a factor of
            the logits into that norm say here what undoes it.
        head_mix: a square matrix stands between the last norm and the head; families leave it out (`rotate.py`).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    layers: tuple[LayerConfig, ...]
    norm_eps: float
    tie_word_embeddings: bool
    norm: Norm = Norm.RMS
    pre_norm: bool = True
    post_norm: bool = False
    parallel_blocks: bool = False
    learned_positions: bool = False
    qk_norm: QKNorm = QKNorm.NONE
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    gated_mlp: bool = True
    activation: Activation = Activation.SILU
    attention_scale: float | None = None
    embedding_scale: float = 1.0
    hidden_scale: float = 1.0
    head_mix: bool = False

    def __post_init__(self) -> None:
        for name, (low, high) in _BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # NaN is not
                raise CheckpointError(f"{name} is {value}, outside of {low:g} to {high:g}: the config is damaged")
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"num_attention_heads ({self.num_attention_heads}) is not a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads}): correct the config"
            )
        for rope in self.ropes:
            if rope.dim % 2 or not 2 <= rope.dim <= self.head_dim:
                raise CheckpointError(
                    f"rotary positions of {rope.dim} dimensions do not fit heads of head_dim {self.head_dim}: "
                    "an even number of at most as many is needed"
                )
        widths = (rope.dim // 2 * (2 if rope.long_from else 1) for rope in self.ropes)
        if sum(widths) * self.max_position_embeddings > _MOST_ANGLES:
            raise CheckpointError(
                f"max_position_embeddings is {self.max_position_embeddings}: the tables of rotary positions would be "
                "larger than 1 GiB; give a smaller context with --max-seq-len"
            )
        if any(layer.window is not None and layer.window < 1 for layer in self.layers):
            raise CheckpointError("sliding_window is below 1: correct the config")

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The different rotary positions, in the order of their first layers."""
        return tuple(dict.fromkeys(layer.rope for layer in self.layers if layer.rope is not None))

    @property
    def query_size(self) -> int:
        """Width of all query heads together, H * D."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Width of all key heads together (and of all value heads), K * D."""
        return self.num_key_value_heads * self.head_dim

    @property
    def scale(self) -> float:
        """Factor of query · key."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
