"""Phi-3 and Phi-4 (arXiv:2404.14219): LLaMA with packed projections, LongRoPE and partial rotary positions."""

from __future__ import annotations

from llm_edge.model.config import LayerConfig, ModelConfig
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.families.common import identical_layers, llama_fields, llama_weights
from llm_edge.model.family import Family
from llm_edge.model.rope_reader import read_rope

_SCALING_ALIASES = {"su": "longrope", "yarn": "longrope"}  # names in early phi3 configs
_WEIGHTS = llama_weights(
    layer={
        "attention.qkv.weight": "self_attn.qkv_proj.weight",
        "mlp.gate_up.weight": "mlp.gate_up_proj.weight",
    }
)


def _read_config(raw: ConfigReader) -> ModelConfig:
    fields = llama_fields(raw, norm_eps=raw.number("rms_norm_eps", 1e-5))
    rope = read_rope(
        raw,
        fields["head_dim"],
        fraction_key="partial_rotary_factor",
        aliases=_SCALING_ALIASES,
        original_length=4096,
    )
    window = raw.nullable_integer("sliding_window", None)
    return ModelConfig(**fields, layers=identical_layers(raw, LayerConfig(rope, window)))


FAMILY = Family(_read_config, lambda *_: _WEIGHTS)
