"""OLMo 3 (arXiv:2512.13961): OLMo 2 with sliding windows in most layers, whose rotary positions are not scaled."""

from __future__ import annotations

from llm_edge.model.config import LayerConfig, ModelConfig
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.families.common import alternating_windows
from llm_edge.model.families.olmo2 import WEIGHTS, olmo2_fields
from llm_edge.model.family import Family
from llm_edge.model.rope import Rope
from llm_edge.model.rope_reader import read_rope

_THETA = 500_000.0


def _read_config(raw: ConfigReader) -> ModelConfig:
    fields = olmo2_fields(raw)
    full_rope = read_rope(raw, fields["head_dim"], theta=_THETA, layer_type="full_attention")
    if "rope_parameters" in raw:
        local_rope = read_rope(raw, fields["head_dim"], theta=_THETA, layer_type="sliding_attention")
    else:
        raw.require("rope_theta", _THETA)  # transformers uses any other base in the layers without windows only
        local_rope = Rope(_THETA, full_rope.dim)
    windows = alternating_windows(raw, 4096, interval=4)
    layers = tuple(LayerConfig(full_rope if window is None else local_rope, window) for window in windows)
    return ModelConfig(**fields, layers=layers)


FAMILY = Family(_read_config, lambda *_: WEIGHTS)
