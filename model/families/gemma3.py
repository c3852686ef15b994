"""Gemma 3, text only (arXiv:2503.19786): sliding windows, two rotary bases, norms before and after each block."""

from __future__ import annotations

from torch import Tensor

from llm_edge.model.config import LayerConfig, ModelConfig, QKNorm
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.families.common import (
    ACTIVATIONS,
    attention_biases,
    layer_windows,
    llama_fields,
    llama_weights,
)
from llm_edge.model.family import Family
from llm_edge.model.rope import Rope
from llm_edge.model.rope_reader import read_rope
from llm_edge.model.weights import SourceTensor


def _read_config(raw: ConfigReader) -> ModelConfig:
    raw.reject("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention")
    scalar = raw.number("query_pre_attn_scalar", 256)
    if not 0 < scalar < 1e12:
        raw.fail(f"query_pre_attn_scalar is {scalar}, not a positive number")
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
        embedding_scale=float(max(raw.integer("hidden_size"), 0)) ** 0.5,
    )
    head_dim, local_key = fields["head_dim"], "rope_local_base_freq"
    global_rope = read_rope(raw, head_dim, theta=1_000_000.0, layer_type="full_attention")
    if "rope_parameters" in raw:
        local_rope = read_rope(raw, head_dim, theta_key=local_key, layer_type="sliding_attention")
    else:
        local_rope = Rope(raw.positive(local_key, 10_000.0), head_dim)
    count, window = raw.layer_count("num_hidden_layers"), raw.integer("sliding_window", 4096)
    if "layer_types" in raw:
        windows = layer_windows(raw, None)
    else:
        interval = raw.integer("sliding_window_pattern", 6)
        if interval < 1:
            raw.fail(f"sliding_window_pattern is {interval}; it must be at least 1")
        windows = [window if (number + 1) % interval else None for number in range(count)]
    layers = tuple(LayerConfig(global_rope if window is None else local_rope, window) for window in windows)
    return ModelConfig(**fields, layers=layers)


def _plus_one(weight: Tensor) -> Tensor:
    """Gemma stores norm weights minus one."""
    return weight.float() + 1


def _minus_one(weight: Tensor) -> Tensor:
    return weight.float() - 1


_WEIGHTS = llama_weights(
    outer={"norm.weight": SourceTensor("model.norm.weight", _plus_one, _minus_one)},
    layer={
        "attention_norm.weight": SourceTensor("input_layernorm.weight", _plus_one, _minus_one),
        "attention.query_norm.weight": SourceTensor("self_attn.q_norm.weight", _plus_one, _minus_one),
        "attention.key_norm.weight": SourceTensor("self_attn.k_norm.weight", _plus_one, _minus_one),
        "attention_post_norm.weight": SourceTensor("post_attention_layernorm.weight", _plus_one, _minus_one),
        "mlp_norm.weight": SourceTensor("pre_feedforward_layernorm.weight", _plus_one, _minus_one),
        "mlp_post_norm.weight": SourceTensor("post_feedforward_layernorm.weight", _plus_one, _minus_one),
    },
)
FAMILY = Family(_read_config, lambda *_: _WEIGHTS)
