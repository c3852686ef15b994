"""Gemma (arXiv:2403.08295): LLaMA with a scaled embedding, GELU, and norm weights stored minus one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_edge.model.config import Activation, LayerConfig, ModelConfig
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.families.common import (
    ACTIVATIONS,
    attention_biases,
    identical_layers,
    llama_fields,
    weights_with_norms_minus_one,
)
from llm_edge.model.family import Family
from llm_edge.model.rope_reader import read_rope

_ACTIVATIONS = {**ACTIVATIONS, "gelu": Activation.GELU_TANH}  # the first configs give the approximation as `gelu`


def gemma_fields(
    raw: ConfigReader,
    *,
    kv_heads: int,
    context: int,
    activation_key: str = "hidden_activation",
    activations: Mapping[str, Activation] = ACTIVATIONS,
    **overrides: Any,
) -> dict[str, Any]:
    """Return the `ModelConfig` arguments that all Gemma models share; `kv_heads` and `context` are defaults."""
    raw.reject("use_bidirectional_attention")
    return llama_fields(
        raw,
        head_dim=raw.integer("head_dim", 256),
        num_key_value_heads=raw.integer("num_key_value_heads", kv_heads),
        max_position_embeddings=raw.integer("max_position_embeddings", context),
        tie_word_embeddings=raw.flag("tie_word_embeddings", True),
        activation=raw.choice(activation_key, activations, "gelu_pytorch_tanh"),
        **attention_biases(raw),
        embedding_scale=float(max(raw.integer("hidden_size"), 0)) ** 0.5,
        **overrides,
    )


def _read_config(raw: ConfigReader) -> ModelConfig:
    fields = gemma_fields(raw, kv_heads=16, context=8192, activation_key="hidden_act", activations=_ACTIVATIONS)
    return ModelConfig(**fields, layers=identical_layers(raw, LayerConfig(read_rope(raw, fields["head_dim"]))))


FAMILY = Family(_read_config, lambda *_: weights_with_norms_minus_one())
