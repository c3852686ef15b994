"""Helpers shared by several families: config fields, weight names and conversions. Sources: transformers 5."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from llm_edge.model.config import Activation, LayerConfig, ModelConfig, Norm
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.rope import Rope
from llm_edge.model.weights import Convert, Sources, SourceTensor, WeightTable, half_split, interleave

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "relu": Activation.RELU,
    "relu2": Activation.RELU2,
}

LLAMA_OUTER: Mapping[str, Sources] = {
    "embed_tokens.weight": "model.embed_tokens.weight",
    "norm.weight": "model.norm.weight",
    "norm.bias": "model.norm.bias",
    "lm_head.weight": "lm_head.weight",
    "lm_head.bias": "lm_head.bias",
}
LLAMA_LAYER: Mapping[str, Sources] = {
    "attention_norm.weight": "input_layernorm.weight",
    "attention_norm.bias": "input_layernorm.bias",
    "attention.qkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    "attention.qkv.bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
    "attention.query_norm.weight": "self_attn.q_norm.weight",
    "attention.key_norm.weight": "self_attn.k_norm.weight",
    "attention.output.weight": "self_attn.o_proj.weight",
    "attention.output.bias": "self_attn.o_proj.bias",
    "mlp_norm.weight": "post_attention_layernorm.weight",
    "mlp_norm.bias": "post_attention_layernorm.bias",
    "mlp.gate_up.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.gate_up.bias": ("mlp.gate_proj.bias", "mlp.up_proj.bias"),
    "mlp.up.weight": "mlp.up_proj.weight",
    "mlp.up.bias": "mlp.up_proj.bias",
    "mlp.down.weight": "mlp.down_proj.weight",
    "mlp.down.bias": "mlp.down_proj.bias",
}
NORMS: Mapping[str, str] = {
    "attention_norm.weight": "input_layernorm.weight",
    "mlp_norm.weight": "post_attention_layernorm.weight",
}
GPT2_OUTER: Mapping[str, Sources] = {
    "embed_tokens.weight": "transformer.wte.weight",
    "embed_positions.weight": "transformer.wpe.weight",
    "norm.weight": "transformer.ln_f.weight",
    "norm.bias": "transformer.ln_f.bias",
    "lm_head.weight": "lm_head.weight",
}
GPT2_LAYER: Mapping[str, Sources] = {
    "attention_norm.weight": "ln_1.weight",
    "attention_norm.bias": "ln_1.bias",
    "mlp_norm.weight": "ln_2.weight",
    "mlp_norm.bias": "ln_2.bias",
    "mlp.up.weight": "mlp.c_fc.weight",
    "mlp.up.bias": "mlp.c_fc.bias",
    "mlp.down.weight": "mlp.c_proj.weight",
    "mlp.down.bias": "mlp.c_proj.bias",
}


def llama_weights(
    outer: Mapping[str, Sources] | None = None, layer: Mapping[str, Sources] | None = None
) -> WeightTable:
    """Return the weight table of LLaMA-like models in transformers, with entries replaced by those given."""
    return WeightTable(
        {**LLAMA_OUTER, **(outer or {})},
        {**LLAMA_LAYER, **(layer or {})},
        "model.layers.{}.",
        ignored=r".*\.rotary_emb\.inv_freq",
    )


def weights_with_norms_minus_one(norms: Mapping[str, str] = NORMS) -> WeightTable:
    """Return the weight table of LLaMA-like models whose norm weights are stored minus one.

    `norms` are the stored names of the weights of a layer's norms.
    """
    return llama_weights(
        outer={"norm.weight": _plus_one("model.norm.weight")},
        layer={name: _plus_one(stored) for name, stored in norms.items()},
    )


def _plus_one(name: str) -> SourceTensor:
    return SourceTensor(name, lambda weight: weight.float() + 1, lambda weight: weight.float() - 1)


def llama_fields(raw: ConfigReader, **overrides: Any) -> dict[str, Any]:
    """Return the `ModelConfig` arguments that LLaMA-like families share, with overrides."""
    heads, hidden = raw.integer("num_attention_heads"), raw.integer("hidden_size")
    return {
        "vocab_size": raw.integer("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": raw.integer("intermediate_size"),
        "num_attention_heads": heads,
        "num_key_value_heads": raw.integer("num_key_value_heads", heads),
        "head_dim": raw.head_dim(hidden, heads),
        "max_position_embeddings": raw.integer("max_position_embeddings", 2048),
        "norm_eps": raw.number("rms_norm_eps", 1e-6),
        "tie_word_embeddings": raw.flag("tie_word_embeddings"),
        "activation": raw.choice("hidden_act", ACTIVATIONS, "silu"),
        **overrides,
    }


def gpt_fields(raw: ConfigReader, heads: int, hidden: int, intermediate: int, eps_key: str) -> dict[str, Any]:
    """Return the `ModelConfig` arguments that the GPT families share: LayerNorm, biases, no gate in the MLP."""
    return {
        "vocab_size": raw.integer("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": raw.head_dim(hidden, heads),
        "norm_eps": raw.number(eps_key, 1e-5),
        "norm": Norm.LAYER,
        "output_bias": True,
        "mlp_bias": True,
        "gated_mlp": False,
    }


def attention_biases(raw: ConfigReader) -> dict[str, bool]:
    """Return the `ModelConfig` arguments set by the key `attention_bias`."""
    bias = raw.flag("attention_bias")
    return {"qkv_bias": bias, "output_bias": bias}


def identical_layers(raw: ConfigReader, layer: LayerConfig) -> tuple[LayerConfig, ...]:
    """Repeat a layer `num_hidden_layers` times."""
    return (layer,) * raw.layer_count("num_hidden_layers")


def layer_windows(raw: ConfigReader, default: int | None) -> list[int | None]:
    """Return the attention window of each layer by `layer_types`, or `default` for all layers if it is missing."""
    count = raw.layer_count("num_hidden_layers")
    types = raw.per_layer("layer_types", count)
    if types is None:
        return [default] * count
    is_sliding = {"full_attention": False, "sliding_attention": True}
    if not all(isinstance(name, str) and name in is_sliding for name in types):
        raw.refuse("layer_types has entries other than 'full_attention' and 'sliding_attention'")
    window = raw.nullable_integer("sliding_window", default)
    if window is None and "sliding_attention" in types:
        raw.fail("layer_types has sliding_attention, but sliding_window is not set")
    return [window if is_sliding[name] else None for name in types]


def alternating_windows(
    raw: ConfigReader, default: int | None, interval: int, interval_key: str | None = None
) -> list[int | None]:
    """Return the window of each layer by `layer_types`; without it, every `interval`-th layer has full attention.

    `default` is the family's window, and `interval_key` the key that overrides `interval`.
    """
    count, window = raw.layer_count("num_hidden_layers"), raw.nullable_integer("sliding_window", default)
    if "layer_types" in raw:
        return layer_windows(raw, default)
    if window is not None and interval_key is not None:
        interval = raw.integer(interval_key, interval)
        if interval < 1:
            raw.fail(f"{interval_key} is {interval}; it must be at least 1")
    return [window if (number + 1) % interval else None for number in range(count)]


def multiply_by(factor: float) -> Convert | None:
    """Return a conversion that multiplies a weight, in float32 because half precision would round the product."""
    return None if factor == 1 else lambda weight: weight.float() * factor


def multiplied(name: str, factor: float) -> SourceTensor:
    """Return a tensor whose weight is multiplied by a factor."""
    return SourceTensor(name, multiply_by(factor), multiply_by(1 / factor))


def interleaved_qkv(head_dim: int, rope: Rope | None, *, biases: bool = False) -> Mapping[str, Sources]:
    """Return the entries of a LLaMA-like weight table for queries and keys with interleaved rotary positions."""
    dim = head_dim if rope is None else rope.dim
    entries: dict[str, Sources] = {}
    for kind in ("weight", "bias") if biases else ("weight",):
        query, key = (
            SourceTensor(f"self_attn.{name}_proj.{kind}", half_split(head_dim, dim), interleave(head_dim, dim))
            for name in "qk"
        )
        entries[f"attention.qkv.{kind}"] = (query, key, f"self_attn.v_proj.{kind}")
    return entries


def packed_per_head(name: str, config: ModelConfig) -> SourceTensor:
    """Return a tensor that holds query, key and value of one head after another, reordered to all of each."""

    def unpack_heads(weight: Tensor) -> Tensor:
        heads = weight.view(config.num_attention_heads, 3, config.head_dim, *weight.shape[1:])
        return heads.transpose(0, 1).reshape(weight.shape)

    def pack_heads(weight: Tensor) -> Tensor:
        heads = weight.reshape(3, config.num_attention_heads, config.head_dim, *weight.shape[1:])
        return heads.transpose(0, 1).reshape(weight.shape)

    return SourceTensor(name, unpack_heads, pack_heads)
