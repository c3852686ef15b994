"""GPT-Neo (Black et al., 2021): GPT-2 with sliding windows in some layers and no scaling of attention scores."""

from __future__ import annotations

from typing import Any

from llm_edge.model.config import LayerConfig, ModelConfig
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.families.common import ACTIVATIONS, GPT2_LAYER, GPT2_OUTER, gpt_fields
from llm_edge.model.family import Family
from llm_edge.model.weights import WeightTable


def _read_config(raw: ConfigReader) -> ModelConfig:
    heads = raw.integer(raw.resolve_alias("num_heads", "num_attention_heads"), 16)
    hidden = raw.integer("hidden_size", 2048)
    count = raw.layer_count(raw.resolve_alias("num_layers", "num_hidden_layers"), 24)
    window = raw.integer("window_size", 256)
    types = _attention_types(raw, count)
    return ModelConfig(
        **gpt_fields(raw, heads, hidden, raw.integer("intermediate_size", 4 * hidden), "layer_norm_epsilon"),
        max_position_embeddings=raw.integer("max_position_embeddings", 2048),
        layers=tuple(LayerConfig(window=window if name == "local" else None) for name in types),
        tie_word_embeddings=raw.flag("tie_word_embeddings", True),
        learned_positions=True,
        activation=raw.choice("activation_function", ACTIVATIONS, "gelu_new"),
        attention_scale=1.0,
    )


def _attention_types(raw: ConfigReader, count: int) -> list[str]:
    """Return 'global' or 'local' for each layer.

    `attention_layers` lists them; `attention_types` gives patterns and their repeats: `[[["global", "local"], 12]]`.
    """
    listed = raw.per_layer("attention_layers", count)
    patterns: Any = [[listed, 1]] if listed is not None else raw.value("attention_types") or [[["global", "local"], 12]]
    types: list[Any] = []
    valid = isinstance(patterns, list)
    for entry in patterns if valid else ():
        match entry:
            case [[*pattern], int(repeats)] if 0 <= repeats * len(pattern) <= count - len(types):
                types += pattern * repeats
            case _:
                valid = False
                break
    valid = valid and all(name in ("global", "local") for name in types)
    if not valid or len(types) != count:
        raw.fail(f"attention_types does not specify 'global' or 'local' for each of {count} layers")
    return types


_WEIGHTS = WeightTable(
    outer=GPT2_OUTER,
    layer={
        **GPT2_LAYER,
        "attention.qkv.weight": (
            "attn.attention.q_proj.weight",
            "attn.attention.k_proj.weight",
            "attn.attention.v_proj.weight",
        ),
        "attention.output.weight": "attn.attention.out_proj.weight",
        "attention.output.bias": "attn.attention.out_proj.bias",
    },
    layer_prefix="transformer.h.{}.",
    ignored=r"transformer\.h\.\d+\.attn\.attention\.(bias|masked_bias)",
)
FAMILY = Family(_read_config, lambda *_: _WEIGHTS, "transformer.")
