"""OLMo 2 (arXiv:2501.00656): norms after each block, and RMSNorm over all queries and all keys."""

from __future__ import annotations

from typing import Any

from llm_edge.model.config import LayerConfig, ModelConfig, QKNorm
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.families.common import attention_biases, identical_layers, llama_fields, llama_weights
from llm_edge.model.family import Family
from llm_edge.model.rope_reader import read_rope

WEIGHTS = llama_weights(
    layer={
        "attention_post_norm.weight": "post_attention_layernorm.weight",
        "mlp_post_norm.weight": "post_feedforward_layernorm.weight",
    }
)


def olmo2_fields(raw: ConfigReader) -> dict[str, Any]:
    """Return the `ModelConfig` arguments of OLMo 2, but for the layers."""
    return llama_fields(
        raw,
        norm_eps=raw.number("rms_norm_eps", 1e-5),
        pre_norm=False,
        post_norm=True,
        qk_norm=QKNorm.FULL,
        **attention_biases(raw),
    )


def _read_config(raw: ConfigReader) -> ModelConfig:
    fields = olmo2_fields(raw)
    return ModelConfig(**fields, layers=identical_layers(raw, LayerConfig(read_rope(raw, fields["head_dim"]))))


FAMILY = Family(_read_config, lambda *_: WEIGHTS)
