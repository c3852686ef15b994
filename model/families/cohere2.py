"""Command R7B and Command A (arXiv:2504.00698): Cohere with sliding windows, and rotary positions only there."""

from __future__ import annotations

from llm_edge.model.config import LayerConfig, ModelConfig
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.families.cohere import cohere_fields, cohere_weights
from llm_edge.model.families.common import alternating_windows
from llm_edge.model.family import Family
from llm_edge.model.rope_reader import read_rope


def _read_config(raw: ConfigReader) -> ModelConfig:
    fields = cohere_fields(raw)
    rope = read_rope(raw, fields["head_dim"])
    windows = alternating_windows(raw, 4096, interval=4, interval_key="sliding_window_pattern")
    layers = tuple(LayerConfig(None if window is None else rope, window) for window in windows)
    return ModelConfig(**fields, layers=layers)


FAMILY = Family(_read_config, cohere_weights)
