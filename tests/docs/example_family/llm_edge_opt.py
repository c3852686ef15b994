"""OPT (arXiv:2205.01068) for llm-edge. Sources: OPTConfig and OPTForCausalLM of transformers 5."""

from llm_edge.model.config import Activation, LayerConfig, ModelConfig, Norm
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.family import Family
from llm_edge.model.weights import SourceTensor, WeightTable

POSITION_OFFSET = 2  # unused rows at the start of the position table


def read_config(raw: ConfigReader) -> ModelConfig:
    """Read the keys of config.json; reject settings that the decoder does not support."""
    hidden, heads = raw.integer("hidden_size"), raw.integer("num_attention_heads")
    raw.require("word_embed_proj_dim", hidden)  # opt-350m has an embedding narrower than its layers
    raw.require("do_layer_norm_before", True)
    raw.require("layer_norm_elementwise_affine", True)
    raw.reject("_remove_final_layer_norm")
    biases = raw.flag("enable_bias", True)
    return ModelConfig(
        vocab_size=raw.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=raw.integer("ffn_dim"),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=raw.head_dim(hidden, heads),
        max_position_embeddings=raw.integer("max_position_embeddings"),
        layers=(LayerConfig(),) * raw.layer_count("num_hidden_layers"),
        norm=Norm.LAYER,
        norm_eps=1e-5,  # PyTorch's default; the config has no key for it
        tie_word_embeddings=raw.flag("tie_word_embeddings", True),
        learned_positions=True,
        qkv_bias=biases,
        output_bias=biases,
        mlp_bias=biases,
        gated_mlp=False,
        activation=raw.choice("activation_function", {"relu": Activation.RELU, "gelu": Activation.GELU}, "relu"),
    )


WEIGHTS = WeightTable(  # weight of the decoder -> tensors in the checkpoint
    outer={
        "embed_tokens.weight": "model.decoder.embed_tokens.weight",
        "embed_positions.weight": SourceTensor(
            "model.decoder.embed_positions.weight", lambda rows: rows[POSITION_OFFSET:]
        ),
        "norm.weight": "model.decoder.final_layer_norm.weight",
        "norm.bias": "model.decoder.final_layer_norm.bias",
        "lm_head.weight": "lm_head.weight",
    },
    layer={
        "attention_norm.weight": "self_attn_layer_norm.weight",
        "attention_norm.bias": "self_attn_layer_norm.bias",
        "attention.qkv.weight": ("self_attn.q_proj.weight", "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        "attention.qkv.bias": ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias"),
        "attention.output.weight": "self_attn.out_proj.weight",
        "attention.output.bias": "self_attn.out_proj.bias",
        "mlp_norm.weight": "final_layer_norm.weight",
        "mlp_norm.bias": "final_layer_norm.bias",
        "mlp.up.weight": "fc1.weight",
        "mlp.up.bias": "fc1.bias",
        "mlp.down.weight": "fc2.weight",
        "mlp.down.bias": "fc2.bias",
    },
    layer_prefix="model.decoder.layers.{}.",
)

OPT = Family(read_config, lambda _config, _raw: WEIGHTS)
