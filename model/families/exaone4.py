"""EXAONE 4.0 (arXiv:2507.11407): norms after each block; in hybrid models, rotary positions only within windows."""

from __future__ import annotations

from llm_edge.model.config import LayerConfig, ModelConfig, QKNorm
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.families.common import alternating_windows, llama_fields
from llm_edge.model.families.olmo2 import WEIGHTS
from llm_edge.model.family import Family
from llm_edge.model.rope_reader import read_rope


def _read_config(raw: ConfigReader) -> ModelConfig:
    fields = llama_fields(
        raw,
        num_key_value_heads=raw.integer("num_key_value_heads", 32),
        norm_eps=raw.number("rms_norm_eps", 1e-5),
        pre_norm=False,
        post_norm=True,
        qk_norm=QKNorm.HEAD,
    )
    rope = read_rope(raw, fields["head_dim"])
    windows = alternating_windows(raw, 4096, interval=4, interval_key="sliding_window_pattern")
    hybrid = raw.nullable_integer("sliding_window", 4096) is not None
    layers = tuple(LayerConfig(None if hybrid and window is None else rope, window) for window in windows)
    return ModelConfig(**fields, layers=layers)


FAMILY = Family(_read_config, lambda *_: WEIGHTS)
