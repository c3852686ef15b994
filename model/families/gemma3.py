"""Gemma 3, text only (arXiv:2503.19786): sliding windows, two rotary bases, norms before and after each block."""

from __future__ import annotations

from llm_edge.model.config import LayerConfig, ModelConfig, QKNorm
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.families.common import alternating_windows, weights_with_norms_minus_one
from llm_edge.model.families.gemma import gemma_fields
from llm_edge.model.families.gemma2 import NORMS
from llm_edge.model.family import Family
from llm_edge.model.rope import Rope
from llm_edge.model.rope_reader import read_rope

_QUERY_AND_KEY_NORMS = {
    "attention.query_norm.weight": "self_attn.q_norm.weight",
    "attention.key_norm.weight": "self_attn.k_norm.weight",
}


def _read_config(raw: ConfigReader) -> ModelConfig:
    raw.reject("final_logit_softcapping", "attn_logit_softcapping")
    fields = gemma_fields(
        raw,
        kv_heads=4,
        context=131_072,
        post_norm=True,
        qk_norm=QKNorm.HEAD,
        attention_scale=raw.positive("query_pre_attn_scalar", 256.0) ** -0.5,
    )
    head_dim, local_key = fields["head_dim"], "rope_local_base_freq"
    global_rope = read_rope(raw, head_dim, theta=1_000_000.0, layer_type="full_attention")
    if "rope_parameters" in raw:
        local_rope = read_rope(raw, head_dim, theta_key=local_key, layer_type="sliding_attention")
    else:
        local_rope = Rope(raw.positive(local_key, 10_000.0), head_dim)
    windows = alternating_windows(raw, 4096, interval=6, interval_key="sliding_window_pattern")
    layers = tuple(LayerConfig(global_rope if window is None else local_rope, window) for window in windows)
    return ModelConfig(**fields, layers=layers)


FAMILY = Family(_read_config, lambda *_: weights_with_norms_minus_one({**NORMS, **_QUERY_AND_KEY_NORMS}))
