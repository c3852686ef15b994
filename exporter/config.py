"""The shape of a decoder. Knows nothing of files, weights or tokenizers: readers turn their metadata into this."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from llm_edge.runtime.errors import CheckpointError

# The bounds are far beyond any published model: what lies outside them is a damaged or hostile file.
_BOUNDS: Mapping[str, tuple[float, float]] = {
    "vocab_size": (1, 4_000_000),
    "hidden_size": (1, 65_536),
    "intermediate_size": (1, 1_048_576),
    "num_hidden_layers": (1, 1_024),
    "num_attention_heads": (1, 4_096),
    "num_key_value_heads": (1, 4_096),
    "head_dim": (2, 4_096),
    "max_position_embeddings": (1, 2_097_152),
    "rms_norm_eps": (0.0, 1.0),
    "rope_theta": (1.0, 1e12),
}


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A LLaMA-style decoder: RMSNorm, rotary positions in half-split form, grouped KV heads, SwiGLU.

    The names are those of Hugging Face's `config.json`. Raises `CheckpointError` where a value is out of
    bounds or two of them contradict each other.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    tie_word_embeddings: bool

    def __post_init__(self) -> None:
        for name, (low, high) in _BOUNDS.items():
            value = getattr(self, name)
            if not low <= value <= high:  # NaN is not
                raise CheckpointError(f"{name} is {value}, outside of {low:g} to {high:g}: the config is damaged")
        if self.num_attention_heads % self.num_key_value_heads:
            raise CheckpointError(
                f"num_attention_heads ({self.num_attention_heads}) is not a multiple of "
                f"num_key_value_heads ({self.num_key_value_heads}): correct the config"
            )
        if self.head_dim % 2:
            raise CheckpointError(f"head_dim is {self.head_dim}: rotary positions need an even one")

    @property
    def query_size(self) -> int:
        """Width of all query heads together, H * D."""
        return self.num_attention_heads * self.head_dim

    @property
    def key_value_size(self) -> int:
        """Width of all key heads together (and of all value heads), KV * D."""
        return self.num_key_value_heads * self.head_dim

    @property
    def num_parameters(self) -> int:
        """Number of weights, a tied output head counted once."""
        layer = (
            self.hidden_size * (self.query_size + 2 * self.key_value_size)
            + self.query_size * self.hidden_size
            + 3 * self.hidden_size * self.intermediate_size
            + 2 * self.hidden_size
        )
        embeddings = self.vocab_size * self.hidden_size * (1 if self.tie_word_embeddings else 2)
        return layer * self.num_hidden_layers + embeddings + self.hidden_size


def config_from_hf(raw: Mapping[str, Any]) -> ModelConfig:
    """Read a Hugging Face `config.json`, key by key; what would change the result and is not known is refused.

    Raises `CheckpointError` naming the field.
    """
    model_type = raw.get("model_type")
    if model_type != "llama":
        raise CheckpointError(f"config.json: model_type {model_type!r} is not supported; supported: 'llama'")
    if raw.get("hidden_act", "silu") != "silu":
        raise CheckpointError(f"config.json: hidden_act {raw['hidden_act']!r} is not supported; supported: 'silu'")
    for flag in ("attention_bias", "mlp_bias"):
        if raw.get(flag):
            raise CheckpointError(f"config.json: {flag} is set; projections with biases are not supported")
    heads = _integer(raw, "num_attention_heads")
    hidden = _integer(raw, "hidden_size")
    if raw.get("head_dim") is None and heads > 0 and hidden % heads:
        raise CheckpointError(
            f"config.json: hidden_size ({hidden}) is not a multiple of num_attention_heads ({heads}) "
            "and there is no head_dim: correct the config"
        )
    return ModelConfig(
        vocab_size=_integer(raw, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=_integer(raw, "intermediate_size"),
        num_hidden_layers=_integer(raw, "num_hidden_layers"),
        num_attention_heads=heads,
        num_key_value_heads=_integer(raw, "num_key_value_heads", default=heads),
        head_dim=_integer(raw, "head_dim", default=hidden // max(heads, 1)),
        max_position_embeddings=_integer(raw, "max_position_embeddings", default=2048),
        rms_norm_eps=_number(raw, "rms_norm_eps", default=1e-6),
        rope_theta=_rope_theta(raw),
        tie_word_embeddings=_flag(raw, "tie_word_embeddings"),
    )


def _rope_theta(raw: Mapping[str, Any]) -> float:
    """`rope_theta` at the top level, or inside `rope_parameters` as transformers 5 writes it."""
    theta = _number(raw, "rope_theta", default=10_000.0)
    for field in ("rope_scaling", "rope_parameters"):
        rope = raw.get(field)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            raise CheckpointError(f"config.json: {field} is not an object")
        kind = rope.get("rope_type", rope.get("type", "default"))
        if kind != "default":
            raise CheckpointError(f"config.json: {field} of type {kind!r} is not supported; supported: 'default'")
        if rope.get("partial_rotary_factor", 1.0) != 1.0:
            raise CheckpointError(f"config.json: {field} rotates a part of each head only, which is not supported")
        theta = _number(rope, "rope_theta", default=theta)
    return theta


def _integer(raw: Mapping[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    if value is None:
        if default is None:
            raise CheckpointError(f"config.json: {key} is missing")
        return default
    if isinstance(value, bool) or not isinstance(value, int):
        raise CheckpointError(f"config.json: {key} is {value!r}, not an integer")
    return value


def _number(raw: Mapping[str, Any], key: str, default: float) -> float:
    value = raw.get(key)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise CheckpointError(f"config.json: {key} is {value!r}, not a number")
    try:
        return float(value)
    except OverflowError:  # an integer of hundreds of digits
        return math.inf


def _flag(raw: Mapping[str, Any], key: str) -> bool:
    value = raw.get(key)
    if value is not None and not isinstance(value, bool):
        raise CheckpointError(f"config.json: {key} is {value!r}, not true or false")
    return bool(value)
