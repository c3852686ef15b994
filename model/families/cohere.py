"""Cohere (Command R and Aya): parallel blocks with one norm, interleaved rotary positions, a factor of the logits."""

from __future__ import annotations

from typing import Any

from llm_edge.model.config import LayerConfig, ModelConfig, Norm
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.families.common import (
    attention_biases,
    identical_layers,
    interleaved_qkv,
    llama_fields,
    llama_weights,
    multiplied,
)
from llm_edge.model.family import Family
from llm_edge.model.rope_reader import read_rope
from llm_edge.model.weights import WeightTable

_LOGIT_SCALE = 0.0625


def cohere_fields(raw: ConfigReader) -> dict[str, Any]:
    """Return the `ModelConfig` arguments of Cohere models, but for the layers."""
    return llama_fields(
        raw,
        max_position_embeddings=raw.integer("max_position_embeddings", 8192),
        norm=Norm.LAYER,
        norm_bias=False,
        norm_eps=raw.number("layer_norm_eps", 1e-5),
        tie_word_embeddings=raw.flag("tie_word_embeddings", True),
        parallel_blocks=True,
        shared_norm=True,
        **attention_biases(raw),
        hidden_scale=1 / raw.positive("logit_scale", _LOGIT_SCALE),
    )


def _read_config(raw: ConfigReader) -> ModelConfig:
    raw.reject("use_qk_norm")
    fields = cohere_fields(raw)
    rope = read_rope(raw, fields["head_dim"], theta=500_000.0)
    return ModelConfig(**fields, layers=identical_layers(raw, LayerConfig(rope)))


def cohere_weights(config: ModelConfig, raw: ConfigReader) -> WeightTable:
    """Return the weight table of Cohere models; the last norm includes the factor of the logits."""
    return llama_weights(
        outer={"norm.weight": multiplied("model.norm.weight", raw.positive("logit_scale", _LOGIT_SCALE))},
        layer=interleaved_qkv(config.head_dim, None, biases=True),
    )


FAMILY = Family(_read_config, cohere_weights)
