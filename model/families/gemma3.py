"""Gemma 3, text only. Sources: arXiv:2503.19786 and transformers' Gemma3TextConfig."""

from __future__ import annotations

from torch import Tensor

from llm_edge.model.config import LayerConfig, ModelConfig, QKNorm
from llm_edge.model.config_reader import ConfigReader, read_rope
from llm_edge.model.families.llama import ACTIVATIONS, attention_biases, hf_weights, shape, windows
from llm_edge.model.registry import Family
from llm_edge.model.rope import Rope
from llm_edge.model.weights import Part, WeightTable


def _config(raw: ConfigReader) -> ModelConfig:
    raw.refuse("final_logit_softcapping", "attn_logit_softcapping", "use_bidirectional_attention")
    scalar = raw.number("query_pre_attn_scalar", 256)
    if not 0 < scalar < 1e12:
        raw.fail(f"query_pre_attn_scalar is {scalar}, not a positive number")
    given = shape(
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
    everywhere = read_rope(raw, given["head_dim"], theta=1_000_000.0, layer_type="full_attention")
    nearby = (
        read_rope(
            raw, given["head_dim"], theta=10_000.0, theta_key="rope_local_base_freq", layer_type="sliding_attention"
        )
        if "rope_parameters" in raw
        else Rope(raw.factor("rope_local_base_freq", 10_000.0), given["head_dim"])
    )
    count, window = raw.count("num_hidden_layers"), raw.integer("sliding_window", 4096)
    if "layer_types" in raw:
        found = windows(raw, None)
    else:
        every = raw.integer("sliding_window_pattern", 6)
        if every < 1:
            raw.fail(f"sliding_window_pattern is {every}; at least 1 is needed")
        found = [window if (number + 1) % every else None for number in range(count)]
    layers = tuple(LayerConfig(everywhere if window is None else nearby, window) for window in found)
    return ModelConfig(**given, layers=layers)


def _plus_one(weight: Tensor) -> Tensor:
    """Gemma stores the distance of a norm's weight from one."""
    return weight.float() + 1


def _weights(_: ModelConfig, __: ConfigReader) -> WeightTable:
    def norm(name: str) -> tuple[Part, ...]:
        return (Part(f"{name}.weight", _plus_one),)

    return hf_weights(
        norm__weight=norm("model.norm"),
        attention_norm__weight=norm("input_layernorm"),
        attention__query_norm__weight=norm("self_attn.q_norm"),
        attention__key_norm__weight=norm("self_attn.k_norm"),
        attention_post_norm__weight=norm("post_attention_layernorm"),
        mlp_norm__weight=norm("pre_feedforward_layernorm"),
        mlp_post_norm__weight=norm("post_feedforward_layernorm"),
    )


GEMMA3 = Family(_config, _weights)
