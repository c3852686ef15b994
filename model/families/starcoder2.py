"""StarCoder2 (arXiv:2402.19173): LayerNorm, biases, an MLP without a gate, sliding windows."""

from __future__ import annotations

from llm_edge.model.config import LayerConfig, ModelConfig, Norm
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.families.common import ACTIVATIONS, identical_layers, llama_fields, llama_weights
from llm_edge.model.family import Family
from llm_edge.model.rope_reader import read_rope

_WEIGHTS = llama_weights(
    layer={
        "mlp.up.weight": "mlp.c_fc.weight",
        "mlp.up.bias": "mlp.c_fc.bias",
        "mlp.down.weight": "mlp.c_proj.weight",
        "mlp.down.bias": "mlp.c_proj.bias",
    }
)


def _read_config(raw: ConfigReader) -> ModelConfig:
    biases = raw.flag("use_bias", True)
    fields = llama_fields(
        raw,
        num_key_value_heads=raw.integer("num_key_value_heads", 2),
        max_position_embeddings=raw.integer("max_position_embeddings", 4096),
        norm=Norm.LAYER,
        norm_eps=raw.number("norm_epsilon", 1e-5),
        tie_word_embeddings=raw.flag("tie_word_embeddings", True),
        activation=raw.choice("hidden_act", ACTIVATIONS, "gelu_pytorch_tanh"),
        gated_mlp=False,
        qkv_bias=biases,
        output_bias=biases,
        mlp_bias=biases,
    )
    layer = LayerConfig(read_rope(raw, fields["head_dim"]), raw.nullable_integer("sliding_window", None))
    return ModelConfig(**fields, layers=identical_layers(raw, layer))


FAMILY = Family(_read_config, lambda *_: _WEIGHTS)
