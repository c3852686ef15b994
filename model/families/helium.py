"""Helium (Kyutai): LLaMA with interleaved rotary positions."""

from __future__ import annotations

from llm_edge.model.config import LayerConfig, ModelConfig
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.families.common import identical_layers, interleaved_qkv, llama_fields, llama_weights
from llm_edge.model.family import Family
from llm_edge.model.rope_reader import read_rope
from llm_edge.model.weights import WeightTable


def _read_config(raw: ConfigReader) -> ModelConfig:
    fields = llama_fields(
        raw,
        head_dim=raw.integer("head_dim", 128),
        max_position_embeddings=raw.integer("max_position_embeddings", 4096),
        norm_eps=raw.number("rms_norm_eps", 1e-8),
        qkv_bias=raw.flag("attention_bias"),
        mlp_bias=raw.flag("mlp_bias"),
    )
    rope = read_rope(raw, fields["head_dim"], theta=100_000.0)
    return ModelConfig(**fields, layers=identical_layers(raw, LayerConfig(rope)))


def _weight_table(config: ModelConfig, _: ConfigReader) -> WeightTable:
    return llama_weights(layer=interleaved_qkv(config.head_dim, config.layers[0].rope, biases=True))


FAMILY = Family(_read_config, _weight_table)
