"""Qwen3 (arXiv:2505.09388): Qwen2 with RMSNorm on each head's queries and keys."""

from __future__ import annotations

from llm_edge.model.config import ModelConfig, QKNorm
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.families.common import attention_biases, llama_weights
from llm_edge.model.families.qwen2 import read_qwen_config
from llm_edge.model.family import Family


def _read_config(raw: ConfigReader) -> ModelConfig:
    return read_qwen_config(raw, qk_norm=QKNorm.HEAD, **attention_biases(raw), head_dim=raw.integer("head_dim", 128))


FAMILY = Family(_read_config, lambda *_: llama_weights())
