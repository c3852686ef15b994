"""OLMo (arXiv:2402.00838): LLaMA with LayerNorm without weights."""

from __future__ import annotations

from llm_edge.model.config import LayerConfig, ModelConfig, Norm
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.families.common import attention_biases, identical_layers, llama_fields, llama_weights
from llm_edge.model.family import Family
from llm_edge.model.rope_reader import read_rope


def _read_config(raw: ConfigReader) -> ModelConfig:
    raw.reject("clip_qkv")
    fields = llama_fields(
        raw,
        norm=Norm.LAYER,
        norm_weight=False,
        norm_eps=1e-5,  # not in the config
        **attention_biases(raw),
    )
    return ModelConfig(**fields, layers=identical_layers(raw, LayerConfig(read_rope(raw, fields["head_dim"]))))


FAMILY = Family(_read_config, lambda *_: llama_weights())
