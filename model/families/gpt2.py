"""GPT-2 (Radford et al., 2019): LayerNorm, learned positions, projections stored as [in, out]."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llm_edge.model.config import LayerConfig, ModelConfig
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.families.common import ACTIVATIONS, GPT2_LAYER, GPT2_OUTER, gpt_fields
from llm_edge.model.family import Family
from llm_edge.model.weights import SourceTensor, WeightTable


def read_gpt2_config(raw: ConfigReader, **overrides: Any) -> ModelConfig:
    """Read a GPT-2 config, with overrides of `ModelConfig` arguments."""
    raw.reject("scale_attn_by_inverse_layer_idx", "add_cross_attention")
    heads = raw.integer(raw.resolve_alias("n_head", "num_attention_heads"), 12)
    hidden = raw.integer(raw.resolve_alias("n_embd", "hidden_size"), 768)
    fields = gpt_fields(raw, heads, hidden, raw.integer("n_inner", 4 * hidden), "layer_norm_epsilon")
    return ModelConfig(
        **{**fields, **overrides},
        max_position_embeddings=raw.integer(raw.resolve_alias("n_positions", "max_position_embeddings"), 1024),
        layers=(LayerConfig(),) * raw.layer_count(raw.resolve_alias("n_layer", "num_hidden_layers"), 12),
        tie_word_embeddings=raw.flag("tie_word_embeddings", True),
        learned_positions=True,
        qkv_bias=True,
        activation=raw.choice("activation_function", ACTIVATIONS, "gelu_new"),
        attention_scale=None if raw.flag("scale_attn_weights", True) else 1.0,
    )


def _transpose(weight: Tensor) -> Tensor:
    return weight.T


_WEIGHTS = WeightTable(
    outer=GPT2_OUTER,
    layer={
        **GPT2_LAYER,
        "attention.qkv.weight": SourceTensor("attn.c_attn.weight", _transpose, _transpose),
        "attention.qkv.bias": "attn.c_attn.bias",
        "attention.output.weight": SourceTensor("attn.c_proj.weight", _transpose, _transpose),
        "attention.output.bias": "attn.c_proj.bias",
        "mlp.up.weight": SourceTensor("mlp.c_fc.weight", _transpose, _transpose),
        "mlp.down.weight": SourceTensor("mlp.c_proj.weight", _transpose, _transpose),
    },
    layer_prefix="transformer.h.{}.",
    ignored=r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",
)
FAMILY = Family(read_gpt2_config, lambda *_: _WEIGHTS, "transformer.", r".*\.(c_attn|c_proj|c_fc)\.weight")
