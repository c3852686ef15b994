"""Gemma 3, text only (arXiv:2503.19786): sliding windows, two rotary bases, norms before and after each block."""

from __future__ import annotations

from llm_edge.model.config import LayerConfig, ModelConfig, QKNorm
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.families.common import (
    ACTIVATIONS,
    alternating_windows,
    attention_biases,
    gemma_embedding_scale,
    llama_fields,
    llama_weights,
    plus_one,
)
from llm_edge.model.family import Family
from llm_edge.model.rope import Rope
from llm_edge.model.rope_reader import read_rope


def _read_config(raw: ConfigReader) -> ModelConfig:
    raw.reject("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention")
    scalar = raw.positive("query_pre_attn_scalar", 256.0)
    fields = llama_fields(
        raw,
        head_dim=raw.integer("head_dim", 256),
        num_key_value_heads=raw.integer("num_key_value_heads", 4),
        max_position_embeddings=raw.integer("max_position_embeddings", 131_072),
        tie_word_embeddings=raw.flag("tie_word_embeddings", True),
        activation=raw.choice("hidden_activation", ACTIVATIONS, "gelu_pytorch_tanh"),
        post_norm=True,
        qk_norm=QKNorm.HEAD,
        **attention_biases(raw),
        attention_scale=scalar**-0.5,
        embedding_scale=gemma_embedding_scale(raw),
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


_WEIGHTS = llama_weights(
    outer={"norm.weight": plus_one("model.norm.weight")},
    layer={
        "attention_norm.weight": plus_one("input_layernorm.weight"),
        "attention.query_norm.weight": plus_one("self_attn.q_norm.weight"),
        "attention.key_norm.weight": plus_one("self_attn.k_norm.weight"),
        "attention_post_norm.weight": plus_one("post_attention_layernorm.weight"),
        "mlp_norm.weight": plus_one("pre_feedforward_layernorm.weight"),
        "mlp_post_norm.weight": plus_one("post_feedforward_layernorm.weight"),
    },
)
FAMILY = Family(_read_config, lambda *_: _WEIGHTS)
