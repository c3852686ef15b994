"""Phi-1, Phi-1.5 and Phi-2 (arXiv:2306.11644): parallel blocks with one LayerNorm, partial rotary positions, biases."""

from __future__ import annotations

from llm_edge.model.config import LayerConfig, ModelConfig, Norm
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.families.common import ACTIVATIONS, identical_layers, llama_fields, llama_weights
from llm_edge.model.family import Family
from llm_edge.model.rope_reader import read_rope

_WEIGHTS = llama_weights(
    outer={"norm.weight": "model.final_layernorm.weight", "norm.bias": "model.final_layernorm.bias"},
    layer={
        "attention.output.weight": "self_attn.dense.weight",
        "attention.output.bias": "self_attn.dense.bias",
        "mlp.up.weight": "mlp.fc1.weight",
        "mlp.up.bias": "mlp.fc1.bias",
        "mlp.down.weight": "mlp.fc2.weight",
        "mlp.down.bias": "mlp.fc2.bias",
    },
)


def _read_config(raw: ConfigReader) -> ModelConfig:
    raw.reject("qk_layernorm")
    fields = llama_fields(
        raw,
        norm=Norm.LAYER,
        norm_eps=raw.number("layer_norm_eps", 1e-5),
        activation=raw.choice("hidden_act", ACTIVATIONS, "gelu_new"),
        gated_mlp=False,
        parallel_blocks=True,
        shared_norm=True,
        qkv_bias=True,
        output_bias=True,
        mlp_bias=True,
        head_bias=True,
    )
    rope = read_rope(raw, fields["head_dim"], fraction_key="partial_rotary_factor", fraction=0.5)
    return ModelConfig(**fields, layers=identical_layers(raw, LayerConfig(rope)))


FAMILY = Family(_read_config, lambda *_: _WEIGHTS)
