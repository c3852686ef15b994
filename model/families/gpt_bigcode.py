"""GPTBigCode and StarCoder (arXiv:2305.06161): GPT-2 in which all heads can share one head of keys and values."""

from __future__ import annotations

from llm_edge.model.config import ModelConfig
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.families.common import GPT2_LAYER, GPT2_OUTER, packed_per_head
from llm_edge.model.families.gpt2 import read_gpt2_config
from llm_edge.model.family import Family
from llm_edge.model.weights import WeightTable


def _read_config(raw: ConfigReader) -> ModelConfig:
    return read_gpt2_config(raw, **({"num_key_value_heads": 1} if raw.flag("multi_query", True) else {}))


def _weight_table(config: ModelConfig, raw: ConfigReader) -> WeightTable:
    weight, bias = "attn.c_attn.weight", "attn.c_attn.bias"
    shared = raw.flag("multi_query", True)
    return WeightTable(
        outer=GPT2_OUTER,
        layer={
            **GPT2_LAYER,
            "attention.qkv.weight": weight if shared else packed_per_head(weight, config),
            "attention.qkv.bias": bias if shared else packed_per_head(bias, config),
            "attention.output.weight": "attn.c_proj.weight",
            "attention.output.bias": "attn.c_proj.bias",
        },
        layer_prefix="transformer.h.{}.",
        ignored=r"transformer\.h\.\d+\.attn\.(bias|masked_bias)",
    )


FAMILY = Family(_read_config, _weight_table, "transformer.")
