"""Gemma 2 (arXiv:2408.00118): softcapping, sliding windows in half of the layers, norms before and after each block."""

from __future__ import annotations

from llm_edge.model.config import LayerConfig, ModelConfig
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.families.common import alternating_windows, weights_with_norms_minus_one
from llm_edge.model.families.gemma import gemma_fields
from llm_edge.model.family import Family
from llm_edge.model.rope_reader import read_rope

NORMS = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention_post_norm.weight": "post_attention_layernorm.weight",
    "mlp_norm.weight": "pre_feedforward_layernorm.weight",
    "mlp_post_norm.weight": "post_feedforward_layernorm.weight",
}
"""The stored names of the weights of a layer's norms."""


def _read_config(raw: ConfigReader) -> ModelConfig:
    fields = gemma_fields(
        raw,
        kv_heads=4,
        context=8192,
        post_norm=True,
        attention_scale=raw.positive("query_pre_attn_scalar", 256.0) ** -0.5,
        attention_softcap=raw.nullable_positive("attn_logit_softcapping", 50.0),
        logit_softcap=raw.nullable_positive("final_logit_softcapping", 30.0),
    )
    rope = read_rope(raw, fields["head_dim"])
    windows = alternating_windows(raw, 4096, interval=2)
    return ModelConfig(**fields, layers=tuple(LayerConfig(rope, window) for window in windows))


FAMILY = Family(_read_config, lambda *_: weights_with_norms_minus_one(NORMS))
