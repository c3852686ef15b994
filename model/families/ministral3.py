"""Ministral 3 (Mistral AI): Mistral with queries that grow with their position."""

from __future__ import annotations

from llm_edge.model.config import LayerConfig, ModelConfig, QueryGrowth
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.families.common import identical_layers, llama_fields, llama_weights
from llm_edge.model.family import Family
from llm_edge.model.rope_reader import read_rope

_RATE = "llama_4_scaling_beta"


def _read_config(raw: ConfigReader) -> ModelConfig:
    raw.reject("layer_types")
    fields = llama_fields(
        raw,
        num_key_value_heads=raw.integer("num_key_value_heads", 8),
        head_dim=raw.integer("head_dim", 128),
        norm_eps=raw.number("rms_norm_eps", 1e-5),
    )
    layer = LayerConfig(read_rope(raw, fields["head_dim"]), raw.nullable_integer("sliding_window", None))
    return ModelConfig(**fields, query_growth=_read_growth(raw), layers=identical_layers(raw, layer))


def _read_growth(raw: ConfigReader) -> QueryGrowth:
    section = raw.section("rope_parameters")
    if section is None:
        raw.fail("rope_parameters is missing")
    growth = QueryGrowth(section.number(_RATE), section.integer("original_max_position_embeddings"))
    if not 0 <= growth.rate <= 1e3:
        section.fail(f"{_RATE} is {growth.rate}; it must be 0 to 1000")
    if growth.length < 1:
        section.fail(f"original_max_position_embeddings is {growth.length}; it must be at least 1")
    return growth


FAMILY = Family(_read_config, lambda *_: llama_weights())
