"""Nemotron and Minitron (arXiv:2402.16819): LayerNorm with weights stored minus one, squared ReLU without a gate."""

from __future__ import annotations

from llm_edge.model.config import LayerConfig, ModelConfig, Norm
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


def _read_config(raw: ConfigReader) -> ModelConfig:
    fields = llama_fields(
        raw,
        max_position_embeddings=raw.integer("max_position_embeddings", 4096),
        norm=Norm.LAYER,
        norm_eps=raw.number("norm_eps", 1e-5),
        activation=raw.choice("hidden_act", ACTIVATIONS, "relu2"),
        gated_mlp=False,
        **attention_biases(raw),
        mlp_bias=raw.flag("mlp_bias"),
    )
    rope = read_rope(raw, fields["head_dim"], fraction_key="partial_rotary_factor", fraction=0.5)
    return ModelConfig(**fields, layers=identical_layers(raw, LayerConfig(rope)))


FAMILY = Family(_read_config, lambda *_: weights_with_norms_minus_one())
