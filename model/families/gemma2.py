"""Gemma 2 (arXiv:2408.00118): softcapping, sliding windows in half of the layers, norms before and after each block."""

from __future__ import annotations

from llm_edge.model.config import LayerConfig, ModelConfig
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.families.common import (
    ACTIVATIONS,
    alternating_windows,
    attention_biases,
    gemma_embedding_scale,
    llama_fields,
    llama_weights,
    plus_one,
)
from llm_edge.model.family import Family
from llm_edge.model.rope_reader import read_rope


def _read_config(raw: ConfigReader) -> ModelConfig:
    raw.reject("use_bidirectional_attention")
    fields = llama_fields(
        raw,
        head_dim=raw.integer("head_dim", 256),
        num_key_value_heads=raw.integer("num_key_value_heads", 4),
        max_position_embeddings=raw.integer("max_position_embeddings", 8192),
        tie_word_embeddings=raw.flag("tie_word_embeddings", True),
        activation=raw.choice("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),
        post_norm=True,
        **attention_biases(raw),
        attention_scale=raw.positive("query_pre_attn_scalar", 256.0) ** -0.5,
        attention_softcap=raw.nullable_positive("attn_logit_softcapping", 50.0),
        logit_softcap=raw.nullable_positive("final_logit_softcapping", 30.0),
        embedding_scale=gemma_embedding_scale(raw),
    )
    rope = read_rope(raw, fields["head_dim"])
    windows = alternating_windows(raw, 4096, interval=2)
    return ModelConfig(**fields, layers=tuple(LayerConfig(rope, window) for window in windows))


_WEIGHTS = llama_weights(
    outer={"norm.weight": plus_one("model.norm.weight")},
    layer={
        "attention_norm.weight": plus_one("input_layernorm.weight"),
        "attention_post_norm.weight": plus_one("post_attention_layernorm.weight"),
        "mlp_norm.weight": plus_one("pre_feedforward_layernorm.weight"),
        "mlp_post_norm.weight": plus_one("post_feedforward_layernorm.weight"),
    },
)
FAMILY = Family(_read_config, lambda *_: _WEIGHTS)
