"""LLaMA and the families built like it; each differs in a few switches. Sources: the configs of transformers 5."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from llm_edge.model.config import Activation, LayerConfig, ModelConfig, QKNorm
from llm_edge.model.config_reader import ConfigReader, read_rope
from llm_edge.model.registry import Family
from llm_edge.model.weights import Part, WeightTable

ACTIVATIONS: Mapping[str, Activation] = {
    "silu": Activation.SILU,
    "swish": Activation.SILU,
    "gelu": Activation.GELU,
    "gelu_new": Activation.GELU_TANH,
    "gelu_pytorch_tanh": Activation.GELU_TANH,
    "relu": Activation.RELU,
}
_PHI3_ORIGINAL = 4096
_SU = {"su": "longrope", "yarn": "longrope"}  # what early phi3 configs call it


def shape(raw: ConfigReader, **switches: Any) -> dict[str, Any]:
    """Arguments of `ModelConfig` that these families share; `switches` override them."""
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
        **switches,
    }


def attention_biases(raw: ConfigReader) -> dict[str, bool]:
    """What the one key `attention_bias` stands for in most families."""
    bias = raw.flag("attention_bias")
    return {"qkv_bias": bias, "output_bias": bias}


def same_layers(raw: ConfigReader, layer: LayerConfig) -> tuple[LayerConfig, ...]:
    """As many equal layers as the config asks for."""
    return (layer,) * raw.count("num_hidden_layers")


def windows(raw: ConfigReader, default: int | None) -> list[int | None]:
    """Window of each layer by `layer_types`; without these the family's default for all."""
    count = raw.count("num_hidden_layers")
    kinds = raw.entries("layer_types", count)
    if kinds is None:
        return [default] * count
    known = {"full_attention": False, "sliding_attention": True}
    if not all(isinstance(kind, str) and kind in known for kind in kinds):
        raw.fail("layer_types has entries other than 'full_attention' and 'sliding_attention'")
    window = raw.nullable("sliding_window", default)
    if window is None and "sliding_attention" in kinds:
        raw.fail("layer_types has sliding_attention, but there is no sliding_window")
    return [window if known[kind] else None for kind in kinds]


def hf_weights(**changes: tuple[Part, ...]) -> WeightTable:
    """The names that LLaMA-like models of transformers save; `changes` replace rows (`__` stands for a dot)."""
    rows: dict[str, tuple[Part, ...]] = {
        "attention_norm.weight": (Part("input_layernorm.weight"),),
        "attention.output.weight": (Part("self_attn.o_proj.weight"),),
        "attention.output.bias": (Part("self_attn.o_proj.bias"),),
        "attention.query_norm.weight": (Part("self_attn.q_norm.weight"),),
        "attention.key_norm.weight": (Part("self_attn.k_norm.weight"),),
        "mlp_norm.weight": (Part("post_attention_layernorm.weight"),),
        "mlp.down.weight": (Part("mlp.down_proj.weight"),),
        "mlp.down.bias": (Part("mlp.down_proj.bias"),),
    }
    for kind in ("weight", "bias"):
        rows[f"attention.qkv.{kind}"] = tuple(Part(f"self_attn.{name}_proj.{kind}") for name in "qkv")
        rows[f"mlp.gate_up.{kind}"] = tuple(Part(f"mlp.{name}_proj.{kind}") for name in ("gate", "up"))
    outer: dict[str, tuple[Part, ...]] = {
        "embed_tokens.weight": (Part("model.embed_tokens.weight"),),
        "norm.weight": (Part("model.norm.weight"),),
        "lm_head.weight": (Part("lm_head.weight"),),
    }
    for name, parts in changes.items():
        row = name.replace("__", ".")
        (outer if row in outer else rows)[row] = parts
    return WeightTable(outer, rows, "model.layers.{}.", r".*\.rotary_emb\.inv_freq")


def times(factor: float) -> Callable[[Tensor], Tensor] | None:
    """Conversion that folds a factor into a weight; in float32, since half floats would round it."""
    return None if factor == 1 else lambda weight: weight.float() * factor


def _llama(raw: ConfigReader) -> ModelConfig:
    given = shape(raw, **attention_biases(raw), mlp_bias=raw.flag("mlp_bias"))
    return ModelConfig(**given, layers=same_layers(raw, LayerConfig(read_rope(raw, given["head_dim"]))))


def _mistral(raw: ConfigReader) -> ModelConfig:
    given = shape(raw, num_key_value_heads=raw.integer("num_key_value_heads", 8))
    rope = read_rope(raw, given["head_dim"])
    found = windows(raw, raw.nullable("sliding_window", 4096))
    return ModelConfig(**given, layers=tuple(LayerConfig(rope, window) for window in found))


def _qwen(raw: ConfigReader, **switches: Any) -> ModelConfig:
    given = shape(raw, **switches)
    rope, count = read_rope(raw, given["head_dim"]), raw.count("num_hidden_layers")
    found: list[int | None] = [None] * count
    if raw.flag("use_sliding_window"):
        first = raw.integer("max_window_layers", 28)
        window = raw.nullable("sliding_window", 4096)
        by_type = windows(raw, window)
        found = [by_type[i] if "layer_types" in raw or i >= first else None for i in range(count)]
    return ModelConfig(**given, layers=tuple(LayerConfig(rope, window) for window in found))


def _qwen3(raw: ConfigReader) -> ModelConfig:
    return _qwen(raw, qk_norm=QKNorm.HEAD, **attention_biases(raw), head_dim=raw.integer("head_dim", 128))


def _smollm3(raw: ConfigReader) -> ModelConfig:
    given = shape(
        raw,
        **attention_biases(raw),
        mlp_bias=raw.flag("mlp_bias"),
        num_key_value_heads=raw.integer("num_key_value_heads", 4),
        tie_word_embeddings=raw.flag("tie_word_embeddings", True),
    )
    rope, count = read_rope(raw, given["head_dim"], theta=2_000_000.0), raw.count("num_hidden_layers")
    every = raw.integer("no_rope_layer_interval", 4)
    if every < 1:
        raw.fail(f"no_rope_layer_interval is {every}; at least 1 is needed")
    rotated = raw.entries("no_rope_layers", count) or [int((i + 1) % every != 0) for i in range(count)]
    sliding = raw.flag("use_sliding_window")
    found = windows(raw, raw.nullable("sliding_window", None) if sliding else None)
    if "layer_types" not in raw:
        found = [None if has_rope else window for has_rope, window in zip(rotated, found, strict=True)]
    layers = (LayerConfig(rope if has_rope else None, window) for has_rope, window in zip(rotated, found, strict=True))
    return ModelConfig(**given, layers=tuple(layers))


def _phi3(raw: ConfigReader) -> ModelConfig:
    given = shape(raw, norm_eps=raw.number("rms_norm_eps", 1e-5))
    rope = read_rope(raw, given["head_dim"], share_key="partial_rotary_factor", aliases=_SU, original=_PHI3_ORIGINAL)
    window = raw.nullable("sliding_window", None)
    return ModelConfig(**given, layers=same_layers(raw, LayerConfig(rope, window)))


def _olmo2(raw: ConfigReader) -> ModelConfig:
    given = shape(
        raw,
        norm_eps=raw.number("rms_norm_eps", 1e-5),
        pre_norm=False,
        post_norm=True,
        qk_norm=QKNorm.FULL,
        **attention_biases(raw),
    )
    return ModelConfig(**given, layers=same_layers(raw, LayerConfig(read_rope(raw, given["head_dim"]))))


def _granite(raw: ConfigReader) -> ModelConfig:
    given = shape(
        raw,
        **attention_biases(raw),
        mlp_bias=raw.flag("mlp_bias"),
        attention_scale=raw.number("attention_multiplier", 1.0),
        embedding_scale=raw.number("embedding_multiplier", 1.0),
        hidden_scale=raw.factor("logits_scaling", 1.0),
    )
    return ModelConfig(**given, layers=same_layers(raw, LayerConfig(read_rope(raw, given["head_dim"]))))


def _granite_weights(_: ModelConfig, raw: ConfigReader) -> WeightTable:
    """The factor of each block's output goes into its last projection, that of the logits into the last norm."""
    residual = times(raw.factor("residual_multiplier", 1.0))
    return hf_weights(
        norm__weight=(Part("model.norm.weight", times(1 / raw.factor("logits_scaling", 1.0))),),
        attention__output__weight=(Part("self_attn.o_proj.weight", residual),),
        attention__output__bias=(Part("self_attn.o_proj.bias", residual),),
        mlp__down__weight=(Part("mlp.down_proj.weight", residual),),
        mlp__down__bias=(Part("mlp.down_proj.bias", residual),),
    )


LLAMA = Family(_llama, lambda *_: hf_weights())
MISTRAL = Family(_mistral, lambda *_: hf_weights())
QWEN2 = Family(lambda raw: _qwen(raw, qkv_bias=True), lambda *_: hf_weights())
QWEN3 = Family(_qwen3, lambda *_: hf_weights())
SMOLLM3 = Family(_smollm3, lambda *_: hf_weights())
PHI3 = Family(
    _phi3,
    lambda *_: hf_weights(
        attention__qkv__weight=(Part("self_attn.qkv_proj.weight"),),
        mlp__gate_up__weight=(Part("mlp.gate_up_proj.weight"),),
    ),
)
OLMO2 = Family(
    _olmo2,
    lambda *_: hf_weights(
        attention_post_norm__weight=(Part("post_attention_layernorm.weight"),),
        mlp_post_norm__weight=(Part("post_feedforward_layernorm.weight"),),
    ),
)
GRANITE = Family(_granite, _granite_weights)
