"""OPT (arXiv:2205.01068) for llm-edge. Sources: OPTConfig and OPTForCausalLM of transformers 5."""

from llm_edge.model.config import Activation, LayerConfig, ModelConfig, Norm
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.registry import Family
from llm_edge.model.weights import Part, WeightTable

MODULES = {  # in a layer, ours -> theirs
    "attention_norm": "self_attn_layer_norm",
    "attention.output": "self_attn.out_proj",
    "mlp_norm": "final_layer_norm",
    "mlp.up": "fc1",
    "mlp.down": "fc2",
}
NO_POSITION = 2  # rows that the table of positions begins with, which belong to none


def config(raw: ConfigReader) -> ModelConfig:
    """From the keys of config.json; what this decoder does not compute is refused."""
    hidden, heads = raw.integer("hidden_size"), raw.integer("num_attention_heads")
    raw.only("word_embed_proj_dim", hidden)  # opt-350m has an embedding narrower than its layers
    raw.only("do_layer_norm_before", True)
    raw.only("layer_norm_elementwise_affine", True)
    raw.refuse("_remove_final_layer_norm")
    biases = raw.flag("enable_bias", True)
    return ModelConfig(
        vocab_size=raw.integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=raw.integer("ffn_dim"),
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=raw.head_dim(hidden, heads),
        max_position_embeddings=raw.integer("max_position_embeddings"),
        layers=(LayerConfig(),) * raw.count("num_hidden_layers"),
        norm=Norm.LAYER,
        norm_eps=1e-5,  # PyTorch's default; no key states it
        tie_word_embeddings=raw.flag("tie_word_embeddings", True),
        learned_positions=True,
        qkv_bias=biases,
        output_bias=biases,
        mlp_bias=biases,
        gated_mlp=False,
        activation=raw.choice("activation_function", {"relu": Activation.RELU, "gelu": Activation.GELU}, "relu"),
    )


def weights(_config: ModelConfig, _raw: ConfigReader) -> WeightTable:
    """Our names -> theirs."""
    top, layer = "model.decoder.", {}
    outer = {"lm_head.weight": (Part("lm_head.weight"),), "embed_tokens.weight": (Part(f"{top}embed_tokens.weight"),)}
    outer["embed_positions.weight"] = (Part(f"{top}embed_positions.weight", lambda rows: rows[NO_POSITION:]),)
    for kind in ("weight", "bias"):
        outer[f"norm.{kind}"] = (Part(f"{top}final_layer_norm.{kind}"),)
        layer[f"attention.qkv.{kind}"] = tuple(Part(f"self_attn.{name}_proj.{kind}") for name in "qkv")
        layer |= {f"{ours}.{kind}": (Part(f"{theirs}.{kind}"),) for ours, theirs in MODULES.items()}
    return WeightTable(outer, layer, f"{top}layers.{{}}.")


OPT = Family(config, weights)
