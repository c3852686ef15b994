"""StableLM (Stability AI): LayerNorm, partial rotary positions, and optionally parallel blocks with one norm."""

from __future__ import annotations

from llm_edge.model.config import LayerConfig, ModelConfig, Norm
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.families.common import identical_layers, llama_fields, llama_weights
from llm_edge.model.family import Family
from llm_edge.model.rope_reader import read_rope


def _read_config(raw: ConfigReader) -> ModelConfig:
    raw.reject("qk_layernorm")
    parallel = raw.flag("use_parallel_residual")
    fields = llama_fields(
        raw,
        max_position_embeddings=raw.integer("max_position_embeddings", 4096),
        norm=Norm.LAYER,
        norm_eps=raw.number("layer_norm_eps", 1e-5),
        qkv_bias=raw.flag("use_qkv_bias"),
        parallel_blocks=parallel,
        shared_norm=parallel,
    )
    rope = read_rope(raw, fields["head_dim"], fraction_key="partial_rotary_factor", fraction=0.25)
    return ModelConfig(**fields, layers=identical_layers(raw, LayerConfig(rope)))


FAMILY = Family(_read_config, lambda *_: llama_weights())
