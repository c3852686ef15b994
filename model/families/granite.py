"""Granite (IBM): LLaMA with multipliers on the embedding, attention scores, residual branches and logits."""

from __future__ import annotations

from llm_edge.model.config import LayerConfig, ModelConfig
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.families.common import (
    attention_biases,
    identical_layers,
    llama_fields,
    llama_weights,
    multiplied,
)
from llm_edge.model.family import Family
from llm_edge.model.rope_reader import read_rope
from llm_edge.model.weights import WeightTable


def _read_config(raw: ConfigReader) -> ModelConfig:
    fields = llama_fields(
        raw,
        **attention_biases(raw),
        mlp_bias=raw.flag("mlp_bias"),
        attention_scale=raw.number("attention_multiplier", 1.0),
        embedding_scale=raw.number("embedding_multiplier", 1.0),
        hidden_scale=raw.positive("logits_scaling", 1.0),
    )
    return ModelConfig(**fields, layers=identical_layers(raw, LayerConfig(read_rope(raw, fields["head_dim"]))))


def _weight_table(_: ModelConfig, raw: ConfigReader) -> WeightTable:
    """Fold the residual multiplier into each block's last projection, and the logits scaling into the last norm."""
    residual, scaling = raw.positive("residual_multiplier", 1.0), raw.positive("logits_scaling", 1.0)
    return llama_weights(
        outer={"norm.weight": multiplied("model.norm.weight", 1 / scaling)},
        layer={
            "attention.output.weight": multiplied("self_attn.o_proj.weight", residual),
            "attention.output.bias": multiplied("self_attn.o_proj.bias", residual),
            "mlp.down.weight": multiplied("mlp.down_proj.weight", residual),
            "mlp.down.bias": multiplied("mlp.down_proj.bias", residual),
        },
    )


FAMILY = Family(_read_config, _weight_table)
