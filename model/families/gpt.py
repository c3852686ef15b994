"""GPT-2, GPT-Neo and GPT-NeoX: LayerNorm, biases, plain feed-forward networks. Sources: transformers' configs."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from llm_edge.model.config import LayerConfig, ModelConfig, Norm
from llm_edge.model.config_reader import ConfigReader, read_rope
from llm_edge.model.families.llama import ACTIVATIONS, same_layers
from llm_edge.model.registry import Family
from llm_edge.model.weights import Part, WeightTable


def _shape(raw: ConfigReader, heads: int, hidden: int, inner: int, epsilon: str) -> dict[str, Any]:
    return {
        "vocab_size": raw.integer("vocab_size"),
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": raw.head_dim(hidden, heads),
        "norm_eps": raw.number(epsilon, 1e-5),
        "norm": Norm.LAYER,
        "output_bias": True,
        "mlp_bias": True,
        "gated_mlp": False,
    }


def _gpt2(raw: ConfigReader) -> ModelConfig:
    raw.refuse("scale_attn_by_inverse_layer_idx", "add_cross_attention")
    heads, hidden = raw.either("n_head", "num_attention_heads", 12), raw.either("n_embd", "hidden_size", 768)
    return ModelConfig(
        **_shape(raw, heads, hidden, raw.integer("n_inner", 4 * hidden), "layer_norm_epsilon"),
        max_position_embeddings=raw.either("n_positions", "max_position_embeddings", 1024),
        layers=(LayerConfig(),) * raw.count(raw.first("n_layer", "num_hidden_layers"), 12),
        tie_word_embeddings=raw.flag("tie_word_embeddings", True),
        learned_positions=True,
        qkv_bias=True,
        activation=raw.choice("activation_function", ACTIVATIONS, "gelu_new"),
        attention_scale=None if raw.flag("scale_attn_weights", True) else 1.0,
    )


def _gpt_neo(raw: ConfigReader) -> ModelConfig:
    heads, hidden = raw.either("num_heads", "num_attention_heads", 16), raw.integer("hidden_size", 2048)
    count, window = raw.count(raw.first("num_layers", "num_hidden_layers"), 24), raw.integer("window_size", 256)
    kinds = _attention_kinds(raw, count)
    return ModelConfig(
        **_shape(raw, heads, hidden, raw.integer("intermediate_size", 4 * hidden), "layer_norm_epsilon"),
        max_position_embeddings=raw.integer("max_position_embeddings", 2048),
        layers=tuple(LayerConfig(window=window if kind == "local" else None) for kind in kinds),
        tie_word_embeddings=raw.flag("tie_word_embeddings", True),
        learned_positions=True,
        activation=raw.choice("activation_function", ACTIVATIONS, "gelu_new"),
        attention_scale=1.0,
    )


def _attention_kinds(raw: ConfigReader, count: int) -> list[str]:
    """`[[["global", "local"], 12]]`: patterns, and how often each is repeated; or one name a layer."""
    named = raw.entries("attention_layers", count)
    types: Any = [[named, 1]] if named is not None else raw.value("attention_types") or [[["global", "local"], 12]]
    kinds: list[Any] = []
    right = isinstance(types, list)
    for entry in types if right else ():
        match entry:
            case [[*pattern], int(times)] if 0 <= times * len(pattern) <= count - len(kinds):
                kinds += pattern * times
            case _:
                right = False
                break
    right = right and all(kind in ("global", "local") for kind in kinds)
    if not right or len(kinds) != count:
        raw.fail(f"attention_types does not give each of {count} layers 'global' or 'local'")
    return kinds


def _gpt_neox(raw: ConfigReader) -> ModelConfig:
    heads, hidden = raw.integer("num_attention_heads", 64), raw.integer("hidden_size", 6144)
    given = _shape(raw, heads, hidden, raw.integer("intermediate_size", 24_576), "layer_norm_eps")
    bias = raw.flag("attention_bias", True)
    rope = read_rope(raw, given["head_dim"], theta_key="rotary_emb_base", share_key="rotary_pct", share=0.25)
    return ModelConfig(
        **{**given, "output_bias": bias},
        max_position_embeddings=raw.integer("max_position_embeddings", 2048),
        layers=same_layers(raw, LayerConfig(rope)),
        tie_word_embeddings=raw.flag("tie_word_embeddings"),
        parallel_blocks=raw.flag("use_parallel_residual", True),
        qkv_bias=bias,
        activation=raw.choice("hidden_act", ACTIVATIONS, "gelu"),
    )


def _rows(names: dict[str, str], **converted: Any) -> dict[str, tuple[Part, ...]]:
    """Rows for weight and bias of every module; `converted` has conversions by our module's last name."""
    return {
        f"{ours}.{kind}": (Part(f"{theirs}.{kind}", converted.get(ours.rpartition(".")[2])),)
        for ours, theirs in names.items()
        for kind in ("weight", "bias")
    }


def _transposed(weight: Tensor) -> Tensor:
    """GPT-2's projections are stored [in, out]; biases stay."""
    return weight.T if weight.ndim == 2 else weight


def _gpt2_weights(*_: object) -> WeightTable:
    layer = _rows(
        {
            "attention_norm": "ln_1",
            "attention.qkv": "attn.c_attn",
            "attention.output": "attn.c_proj",
            "mlp_norm": "ln_2",
            "mlp.up": "mlp.c_fc",
            "mlp.down": "mlp.c_proj",
        },
        qkv=_transposed,
        output=_transposed,
        up=_transposed,
        down=_transposed,
    )
    return WeightTable(_gpt_outer(), layer, "transformer.h.{}.", r"transformer\.h\.\d+\.attn\.(bias|masked_bias)")


def _gpt_neo_weights(*_: object) -> WeightTable:
    layer = _rows(
        {
            "attention_norm": "ln_1",
            "attention.output": "attn.attention.out_proj",
            "mlp_norm": "ln_2",
            "mlp.up": "mlp.c_fc",
            "mlp.down": "mlp.c_proj",
        }
    )
    layer["attention.qkv.weight"] = tuple(Part(f"attn.attention.{name}_proj.weight") for name in "qkv")
    ignored = r"transformer\.h\.\d+\.attn\.attention\.(bias|masked_bias)"
    return WeightTable(_gpt_outer(), layer, "transformer.h.{}.", ignored)


def _gpt_outer() -> dict[str, tuple[Part, ...]]:
    return {
        "embed_tokens.weight": (Part("transformer.wte.weight"),),
        "embed_positions.weight": (Part("transformer.wpe.weight"),),
        **_rows({"norm": "transformer.ln_f"}),
        "lm_head.weight": (Part("lm_head.weight"),),
    }


def _gpt_neox_weights(config: ModelConfig, _: ConfigReader) -> WeightTable:
    def packed(weight: Tensor) -> Tensor:
        """From query, key and value of each head in turn to all queries, all keys, all values."""
        heads = weight.view(config.num_attention_heads, 3, config.head_dim, *weight.shape[1:])
        return heads.transpose(0, 1).reshape(weight.shape)

    layer = _rows(
        {
            "attention_norm": "input_layernorm",
            "attention.qkv": "attention.query_key_value",
            "attention.output": "attention.dense",
            "mlp_norm": "post_attention_layernorm",
            "mlp.up": "mlp.dense_h_to_4h",
            "mlp.down": "mlp.dense_4h_to_h",
        },
        qkv=packed,
    )
    outer = {
        "embed_tokens.weight": (Part("gpt_neox.embed_in.weight"),),
        **_rows({"norm": "gpt_neox.final_layer_norm"}),
        "lm_head.weight": (Part("embed_out.weight"),),
    }
    ignored = r"gpt_neox\.layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)"
    return WeightTable(outer, layer, "gpt_neox.layers.{}.", ignored)


GPT2 = Family(_gpt2, _gpt2_weights, "transformer.", r".*\.(c_attn|c_proj|c_fc)\.weight")
GPT_NEO = Family(_gpt_neo, _gpt_neo_weights, "transformer.")
GPT_NEOX = Family(_gpt_neox, _gpt_neox_weights, "gpt_neox.")
