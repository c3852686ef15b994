"""Mistral (arXiv:2310.06825): LLaMA with sliding-window attention."""

from __future__ import annotations

from llm_edge.model.config import LayerConfig, ModelConfig
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.families.common import layer_windows, llama_fields, llama_weights
from llm_edge.model.family import Family
from llm_edge.model.rope_reader import read_rope


def _read_config(raw: ConfigReader) -> ModelConfig:
    fields = llama_fields(raw, num_key_value_heads=raw.integer("num_key_value_heads", 8))
    rope = read_rope(raw, fields["head_dim"])
    windows = layer_windows(raw, raw.nullable_integer("sliding_window", 4096))
    return ModelConfig(**fields, layers=tuple(LayerConfig(rope, window) for window in windows))


FAMILY = Family(_read_config, lambda *_: llama_weights())
