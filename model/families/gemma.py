"""Gemma (arXiv:2403.08295): LLaMA with a scaled embedding, GELU, and norm weights stored minus one."""

from __future__ import annotations

from llm_edge.model.config import Activation, LayerConfig, ModelConfig
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.families.common import (
    ACTIVATIONS,
    attention_biases,
    gemma_embedding_scale,
    identical_layers,
    llama_fields,
    llama_weights,
    plus_one,
)
from llm_edge.model.family import Family
from llm_edge.model.rope_reader import read_rope

_ACTIVATIONS = {**ACTIVATIONS, "gelu": Activation.GELU_TANH}  # the first configs give the approximation as `gelu`
_WEIGHTS = llama_weights(
    outer={"norm.weight": plus_one("model.norm.weight")},
    layer={
        "attention_norm.weight": plus_one("input_layernorm.weight"),
        "mlp_norm.weight": plus_one("post_attention_layernorm.weight"),
    },
)


def _read_config(raw: ConfigReader) -> ModelConfig:
    raw.reject("use_bidirectional_attention")
    fields = llama_fields(
        raw,
        head_dim=raw.integer("head_dim", 256),
        num_key_value_heads=raw.integer("num_key_value_heads", 16),
        max_position_embeddings=raw.integer("max_position_embeddings", 8192),
        tie_word_embeddings=raw.flag("tie_word_embeddings", True),
        activation=raw.choice("hidden_act", _ACTIVATIONS, "gelu_pytorch_tanh"),
        **attention_biases(raw),
        embedding_scale=gemma_embedding_scale(raw),
    )
    return ModelConfig(**fields, layers=identical_layers(raw, LayerConfig(read_rope(raw, fields["head_dim"]))))


FAMILY = Family(_read_config, lambda *_: _WEIGHTS)
