"""Qwen2 and Qwen2.5 (arXiv:2407.10671): LLaMA with biases on queries, keys and values."""

from __future__ import annotations

from typing import Any

from llm_edge.model.config import LayerConfig, ModelConfig
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.families.common import layer_windows, llama_fields, llama_weights
from llm_edge.model.family import Family
from llm_edge.model.rope_reader import read_rope


def read_qwen_config(raw: ConfigReader, **overrides: Any) -> ModelConfig:
    """Read a Qwen config; `use_sliding_window` gives windows to the layers from `max_window_layers` on."""
    fields = llama_fields(raw, **overrides)
    rope, count = read_rope(raw, fields["head_dim"]), raw.layer_count("num_hidden_layers")
    windows: list[int | None] = [None] * count
    if raw.flag("use_sliding_window"):
        first = raw.integer("max_window_layers", 28)
        by_type = layer_windows(raw, raw.nullable_integer("sliding_window", 4096))
        windows = [by_type[i] if "layer_types" in raw or i >= first else None for i in range(count)]
    return ModelConfig(**fields, layers=tuple(LayerConfig(rope, window) for window in windows))


FAMILY = Family(lambda raw: read_qwen_config(raw, qkv_bias=True), lambda *_: llama_weights())
