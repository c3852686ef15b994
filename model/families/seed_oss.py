"""Seed-OSS (ByteDance): LLaMA with biases on queries, keys and values."""

from __future__ import annotations

from llm_edge.model.config import LayerConfig, ModelConfig
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.families.common import identical_layers, llama_fields, llama_weights
from llm_edge.model.family import Family
from llm_edge.model.rope_reader import read_rope


def _read_config(raw: ConfigReader) -> ModelConfig:
    fields = llama_fields(
        raw,
        num_key_value_heads=raw.nullable_integer("num_key_value_heads", 8) or raw.integer("num_attention_heads"),
        qkv_bias=raw.flag("attention_bias", True),
        output_bias=raw.flag("attention_out_bias"),
        mlp_bias=raw.flag("mlp_bias"),
    )
    if "head_dim" not in raw:
        raw.fail("head_dim is missing")
    return ModelConfig(**fields, layers=identical_layers(raw, LayerConfig(read_rope(raw, fields["head_dim"]))))


FAMILY = Family(_read_config, lambda *_: llama_weights())
