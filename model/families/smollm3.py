"""SmolLM3: LLaMA in which some layers have no rotary positions (NoPE, arXiv:2501.18795)."""

from __future__ import annotations

from llm_edge.model.config import LayerConfig, ModelConfig
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.families.common import attention_biases, layer_windows, llama_fields, llama_weights
from llm_edge.model.family import Family
from llm_edge.model.rope_reader import read_rope


def _read_config(raw: ConfigReader) -> ModelConfig:
    fields = llama_fields(
        raw,
        **attention_biases(raw),
        mlp_bias=raw.flag("mlp_bias"),
        num_key_value_heads=raw.integer("num_key_value_heads", 4),
        tie_word_embeddings=raw.flag("tie_word_embeddings", True),
    )
    rope, count = read_rope(raw, fields["head_dim"], theta=2_000_000.0), raw.layer_count("num_hidden_layers")
    interval = raw.integer("no_rope_layer_interval", 4)
    if interval < 1:
        raw.fail(f"no_rope_layer_interval is {interval}; it must be at least 1")
    uses_rope = raw.per_layer("no_rope_layers", count) or [int((i + 1) % interval != 0) for i in range(count)]
    sliding = raw.flag("use_sliding_window")
    windows = layer_windows(raw, raw.nullable_integer("sliding_window", None) if sliding else None)
    if "layer_types" not in raw:
        windows = [None if rotary else window for rotary, window in zip(uses_rope, windows, strict=True)]
    layers = (LayerConfig(rope if rotary else None, window) for rotary, window in zip(uses_rope, windows, strict=True))
    return ModelConfig(**fields, layers=tuple(layers))


FAMILY = Family(_read_config, lambda *_: llama_weights())
