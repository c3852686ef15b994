"""GLM-4 and GLM-Edge (arXiv:2406.12793): packed gate and up, rotary positions interleaved in a part of each head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_edge.model.config import LayerConfig, ModelConfig
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.families.common import identical_layers, interleaved_qkv, llama_fields, llama_weights
from llm_edge.model.family import Family
from llm_edge.model.rope_reader import read_rope
from llm_edge.model.weights import Sources, WeightTable


def read_glm_config(raw: ConfigReader, **overrides: Any) -> ModelConfig:
    """Read a GLM config, with overrides of `ModelConfig` arguments."""
    fields = llama_fields(
        raw,
        head_dim=raw.integer("head_dim", 128),
        num_key_value_heads=raw.integer("num_key_value_heads", 2),
        max_position_embeddings=raw.integer("max_position_embeddings", 131_072),
        norm_eps=raw.number("rms_norm_eps", 1.5625e-07),
        qkv_bias=raw.flag("attention_bias", True),
        **overrides,
    )
    rope = read_rope(raw, fields["head_dim"], fraction_key="partial_rotary_factor", fraction=0.5)
    return ModelConfig(**fields, layers=identical_layers(raw, LayerConfig(rope)))


def glm_weights(config: ModelConfig, layer: Mapping[str, Sources] | None = None) -> WeightTable:
    """Return the weight table of GLM, with additional entries of a layer."""
    return llama_weights(
        layer={
            **interleaved_qkv(config.head_dim, config.layers[0].rope, biases=True),
            "mlp.gate_up.weight": "mlp.gate_up_proj.weight",
            **(layer or {}),
        }
    )


FAMILY = Family(read_glm_config, lambda config, _: glm_weights(config))
