"""GPT-NeoX and Pythia (arXiv:2204.06745): parallel blocks, partial rotary positions, packed projections."""

from __future__ import annotations

from llm_edge.model.config import LayerConfig, ModelConfig
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.families.common import ACTIVATIONS, gpt_fields, identical_layers, packed_per_head
from llm_edge.model.family import Family
from llm_edge.model.rope_reader import read_rope
from llm_edge.model.weights import WeightTable


def _read_config(raw: ConfigReader) -> ModelConfig:
    heads, hidden = raw.integer("num_attention_heads", 64), raw.integer("hidden_size", 6144)
    fields = gpt_fields(raw, heads, hidden, raw.integer("intermediate_size", 24_576), "layer_norm_eps")
    bias = raw.flag("attention_bias", True)
    rope = read_rope(raw, fields["head_dim"], theta_key="rotary_emb_base", fraction_key="rotary_pct", fraction=0.25)
    return ModelConfig(
        **{**fields, "output_bias": bias},
        max_position_embeddings=raw.integer("max_position_embeddings", 2048),
        layers=identical_layers(raw, LayerConfig(rope)),
        tie_word_embeddings=raw.flag("tie_word_embeddings"),
        parallel_blocks=raw.flag("use_parallel_residual", True),
        qkv_bias=bias,
        activation=raw.choice("hidden_act", ACTIVATIONS, "gelu"),
    )


def _weight_table(config: ModelConfig, _: ConfigReader) -> WeightTable:
    return WeightTable(
        outer={
            "embed_tokens.weight": "gpt_neox.embed_in.weight",
            "norm.weight": "gpt_neox.final_layer_norm.weight",
            "norm.bias": "gpt_neox.final_layer_norm.bias",
            "lm_head.weight": "embed_out.weight",
        },
        layer={
            "attention_norm.weight": "input_layernorm.weight",
            "attention_norm.bias": "input_layernorm.bias",
            "attention.qkv.weight": packed_per_head("attention.query_key_value.weight", config),
            "attention.qkv.bias": packed_per_head("attention.query_key_value.bias", config),
            "attention.output.weight": "attention.dense.weight",
            "attention.output.bias": "attention.dense.bias",
            "mlp_norm.weight": "post_attention_layernorm.weight",
            "mlp_norm.bias": "post_attention_layernorm.bias",
            "mlp.up.weight": "mlp.dense_h_to_4h.weight",
            "mlp.up.bias": "mlp.dense_h_to_4h.bias",
            "mlp.down.weight": "mlp.dense_4h_to_h.weight",
            "mlp.down.bias": "mlp.dense_4h_to_h.bias",
        },
        layer_prefix="gpt_neox.layers.{}.",
        ignored=r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",
    )


FAMILY = Family(_read_config, _weight_table, "gpt_neox.")
