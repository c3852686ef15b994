"""`ModelConfig`: architecture and sizes of a decoder, into which every family converts its own config."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum

from llm_edge.model.rope import Rope
from llm_edge.runtime.errors import CheckpointError, UnsupportedSettingError

# Far beyond any published model: a value outside these bounds comes from a damaged or malicious file.
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
    "attention_softcap": (1e-3, 1e4),
    "logit_softcap": (1e-3, 1e4),
}
_MAX_ANGLES = 1 << 27  # of all rotary tables together: 1 GiB of cosines and sines


class Norm(Enum):
    """Normalization. RMS is RMSNorm (arXiv:1910.07467), LAYER is LayerNorm (arXiv:1607.06450)."""

    RMS = "rms"
    LAYER = "layer"


class QKNorm(Enum):
    """RMSNorm of queries and keys: NONE, of each HEAD separately, or of all heads together (FULL)."""

    NONE = "none"
    HEAD = "head"
    FULL = "full"


class Activation(Enum):
    """Activation of the MLP; GELU_TANH is GELU's tanh approximation (arXiv:1606.08415), RELU2 the square of ReLU."""

    SILU = "silu"
    GELU = "gelu"
    GELU_TANH = "gelu_tanh"
    RELU = "relu"
    RELU2 = "relu2"


@dataclass(frozen=True, slots=True)
class QueryGrowth:
    """Queries are multiplied by 1 + rate * ln(1 + floor(position / length)), as in Llama 4 and Ministral 3.

    Attributes:
        rate: how fast the factor grows.
        length: number of positions at the start with a factor of 1.
    """

    rate: float
    length: int


@dataclass(frozen=True, slots=True)
class LayerConfig:
    """Settings that may differ between layers.

    Attributes:
        rope: rotary positions, or None for a layer without them.
        window: number of tokens a position attends to, including itself; None for full causal attention.
    """

    rope: Rope | None = None
    window: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelConfig:
    """Architecture and sizes of a decoder. The defaults describe LLaMA: pre-norm RMSNorm, SwiGLU, no biases.

    Raises:
        CheckpointError: a value is out of range, or two values contradict each other.

    Attributes:
        vocab_size: V, rows of the embedding and size of the logits.
        hidden_size: width of the residual stream.
        intermediate_size: inner width of the MLP.
        num_attention_heads: H, number of query heads.
        num_key_value_heads: K, number of key/value heads; divides H.
        head_dim: D, width of a head.
        max_position_embeddings: maximum context length in tokens.
        layers: settings of each layer.
        norm_eps: epsilon of all norms.
        tie_word_embeddings: whether the output head shares the embedding's weight.
        norm: type of all norms except those of queries and keys, which are RMSNorm.
        norm_weight: whether a LayerNorm has weights; without them it has no bias either.
        norm_bias: whether a LayerNorm with weights has a bias.
        pre_norm: whether the input of each block is normalized.
        post_norm: whether the output of each block is normalized.
        parallel_blocks: whether attention and MLP both read the layer's input and their outputs are summed.
        shared_norm: whether parallel blocks read the output of one norm, that of attention.
        learned_positions: whether learned position embeddings are added to the token embeddings.
        qk_norm: RMSNorm of queries and keys, applied before the rotation.
        qkv_bias: whether the query, key and value projections have biases.
        output_bias: whether the output projection of attention has a bias.
        mlp_bias: whether the projections of the MLP have biases.
        head_bias: whether the output head has a bias.
        gated_mlp: down(activation(gate(x)) * up(x)) if true, else down(activation(up(x))).
        activation: activation of the MLP.
        attention_scale: factor of query · key; None is 1 / sqrt(D).
        attention_softcap: bound c of attention scores, which become c * tanh(score / c); None for no bound.
        logit_softcap: bound of the logits, likewise.
        query_growth: factor of the queries that depends on their position, or None.
        embedding_scale: factor of the embedding; not applied to a tied head.
        hidden_scale: factor from the output of the last norm to the model's hidden states, for families that fold
            a factor of the logits into that norm.
        head_mix: whether a square matrix follows the last norm. Set by the exporter for rotated models
            (`exporter/quantization/rotate.py`), never by a family.
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
    norm_weight: bool = True
    norm_bias: bool = True
    pre_norm: bool = True
    post_norm: bool = False
    parallel_blocks: bool = False
    shared_norm: bool = False
    learned_positions: bool = False
    qk_norm: QKNorm = QKNorm.NONE
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    gated_mlp: bool = True
    activation: Activation = Activation.SILU
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    query_growth: QueryGrowth | None = None
    embedding_scale: float = 1.0
    hidden_scale: float = 1.0
    head_mix: bool = False

    def __post_init__(self) -> None:
        for name, (low, high) in _BOUNDS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # also rejects NaN
                raise CheckpointError(f"{name} is {value}; it must be {low:g} to {high:g}: the config is damaged")
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"num_attention_heads ({self.num_attention_heads}) is not a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads}): correct the config"
            )
        if self.head_bias and self.logit_softcap is not None:
            raise UnsupportedSettingError("a bias of the output head and bounded logits are not supported together")
        if self.query_growth is not None and any(layer.rope is None for layer in self.layers):
            raise CheckpointError("queries that grow with their position require rotary positions in every layer")
        if self.shared_norm and not (self.parallel_blocks and self.pre_norm):
            raise CheckpointError("blocks share a norm, but are not parallel with norms before them")
        for rope in self.ropes:
            if rope.dim % 2 or not 2 <= rope.dim <= self.head_dim:
                raise CheckpointError(
                    f"rotary dimension {rope.dim} is invalid for head_dim {self.head_dim}: "
                    "it must be even and at most head_dim"
                )
        widths = (rope.dim // 2 * (2 if rope.long_from else 1) for rope in self.ropes)
        if sum(widths) * self.max_position_embeddings > _MAX_ANGLES:
            raise CheckpointError(
                f"max_position_embeddings is {self.max_position_embeddings}: the rotary position tables would exceed "
                "1 GiB; reduce the context with --max-seq-len"
            )
        if any(layer.window is not None and layer.window < 1 for layer in self.layers):
            raise CheckpointError("sliding_window is below 1: correct the config")

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers."""
        return len(self.layers)

    @property
    def ropes(self) -> tuple[Rope, ...]:
        """The distinct rotary positions, in order of first use."""
        return tuple(dict.fromkeys(layer.rope for layer in self.layers if layer.rope is not None))

    @property
    def query_size(self) -> int:
        """Total width of the query heads, H * D."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Total width of the key heads (and of the value heads), K * D."""
        return self.num_key_value_heads * self.head_dim

    @property
    def scale(self) -> float:
        """Factor of query · key."""
        return self.head_dim**-0.5 if self.attention_scale is None else self.attention_scale
