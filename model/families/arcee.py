"""Arcee AFM: LLaMA with an MLP that has no gate and squares its ReLU."""

from __future__ import annotations

from llm_edge.model.config import LayerConfig, ModelConfig
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.families.common import (
    ACTIVATIONS,
    attention_biases,
    identical_layers,
    llama_fields,
    llama_weights,
)
from llm_edge.model.family import Family
from llm_edge.model.rope_reader import read_rope


def _read_config(raw: ConfigReader) -> ModelConfig:
    fields = llama_fields(
        raw,
        norm_eps=raw.number("rms_norm_eps", 1e-5),
        activation=raw.choice("hidden_act", ACTIVATIONS, "relu2"),
        max_position_embeddings=raw.integer("max_position_embeddings", 4096),
        gated_mlp=False,
        **attention_biases(raw),
        mlp_bias=raw.flag("mlp_bias"),
    )
    return ModelConfig(**fields, layers=identical_layers(raw, LayerConfig(read_rope(raw, fields["head_dim"]))))


FAMILY = Family(_read_config, lambda *_: llama_weights())
