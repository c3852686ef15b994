"""Translates the metadata of a GGUF file into a Hugging Face config, which the model families read.

Keys are those that llama.cpp's converter writes (`conversion/*.py`). A missing key means what llama.cpp's loaders
assume (`src/models/*.cpp`, `src/llama-model.cpp`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llm_edge.checkpoint.gguf.architectures import Architecture, partial_rotary_factor
from llm_edge.checkpoint.gguf.file import GGUFFile
from llm_edge.checkpoint.gguf.metadata import Metadata
from llm_edge.model.rope import yarn_amplitude
from llm_edge.runtime.safe_io import short_repr

EMBEDDING, HEAD = "token_embd.weight", "output.weight"
_MAX_LAYERS = 1_024

# Keys after the architecture's prefix that are read ...
_READ = {
    "context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length",
    "attention.sliding_window", "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.attn_factor", "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
}  # fmt: skip
# ... that do not affect the result (some converters write both epsilons and the last key for every architecture) ...
_IGNORED = {
    "vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "attention.layer_norm_epsilon",
    "attention.layer_norm_rms_epsilon", "use_parallel_residual",
}  # fmt: skip
# ... and that are accepted with this value only. Any other key is rejected.
_NEUTRAL: Mapping[str, Any] = {
    "attention.causal": True, "attention.scale": 0, "attention.clamp_kqv": 0, "attention.max_alibi_bias": 0,
    "attn_logit_softcapping": 0, "final_logit_softcapping": 0, "embedding_scale": 1, "residual_scale": 1,
    "logit_scale": 1, "expert_count": 0, "expert_used_count": 0, "nextn_predict_layers": 0, "pooling_type": 0,
    "rope.scaling.alpha": 0, "rope.scaling.yarn_ext_factor": 1, "rope.scaling.yarn_log_multiplier": 0,
}  # fmt: skip


def hf_config(file: GGUFFile, known: Architecture) -> dict[str, Any]:
    """Return the metadata of a file of an architecture as a Hugging Face `config.json`.

    Raises:
        CheckpointError: a setting is not supported.
    """
    architecture = file.meta_str("general.architecture")
    kind = file.meta_str("general.type", default="model")
    if kind != "model":
        file.fail(f"contains {short_repr(kind)} instead of a model (general.type): give the model's own file")
    _reject_unknown_keys(file, architecture, known)
    meta = Metadata(file, architecture)
    heads, hidden = meta.integer("attention.head_count"), meta.integer("embedding_length")
    head_dim = meta.integer("attention.key_length", hidden // heads)
    if "attention.key_length" not in meta and hidden % heads:
        file.fail(f"{architecture}.embedding_length ({hidden}) is not a multiple of attention.head_count ({heads})")
    layers = meta.integer("block_count", maximum=_MAX_LAYERS)
    rotated = meta.integer("rope.dimension_count", head_dim)
    for key, value in (
        ("attention.value_length", meta.integer("attention.value_length", head_dim)),
        ("rope.dimension_count", head_dim if known.partial and rotated <= head_dim else rotated),
    ):
        if value != head_dim:
            file.fail(f"{architecture}.{key} is {value}; only the head size {head_dim} is supported")
    config: dict[str, Any] = {
        "model_type": known.model_type,
        "vocab_size": file.tensor("token_embd.weight").shape[0],
        "hidden_size": hidden,
        "intermediate_size": meta.integer("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": max(meta.integers("attention.head_count_kv", layers))
        if known.per_layer_heads
        else meta.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": meta.integer("context_length"),
        known.eps: meta.number(known.eps_key),
        "tie_word_embeddings": HEAD not in file.tensors or (EMBEDDING in file.tensors and file.equal(HEAD, EMBEDDING)),
        "rope_theta": meta.number("rope.freq_base", 10_000.0),
        "rope_scaling": _rope_scaling(meta),
        **({"partial_rotary_factor": partial_rotary_factor(rotated, head_dim)} if known.partial else {}),
    }
    return config | known.entries(meta, config)


def _rope_scaling(meta: Metadata) -> dict[str, Any] | None:
    """Return a config's `rope_scaling`; a factor without a type means linear scaling."""
    file, prefix = meta.file, f"{meta.architecture}.rope.scaling"
    kind = meta.text("rope.scaling.type", "linear")
    amplitude = meta.number("rope.scaling.attn_factor", 1.0)
    if kind != "yarn" and amplitude != 1:
        file.fail(f"{prefix}.attn_factor is {amplitude}, which is supported with yarn only")
    factor = meta.number("rope.scaling.factor", meta.number("rope.scale_linear", 0.0)) or 1.0
    if kind not in ("none", "linear", "yarn"):
        file.fail(f"{prefix}.type {short_repr(kind)} is not supported; supported: 'none', 'linear', 'yarn'")
    if kind == "none" or (kind == "linear" and factor == 1):
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        original = meta.integer("rope.scaling.original_context_length", meta.integer("context_length"))
        scaling["original_max_position_embeddings"] = original
        scaling["beta_fast"] = meta.number("rope.scaling.yarn_beta_fast", 32.0)
        scaling["beta_slow"] = meta.number("rope.scaling.yarn_beta_slow", 1.0)
        if amplitude != 1:
            scaling["attention_factor"] = amplitude * yarn_amplitude(factor)
    return scaling


def _reject_unknown_keys(file: GGUFFile, architecture: str, settings: Architecture) -> None:
    known = _READ | _IGNORED | settings.keys
    for name, value in file.metadata.items():
        prefix, _, key = name.partition(".")
        if prefix != architecture or key in known:
            continue
        shown = "an array" if isinstance(value, list | np.ndarray) else short_repr(value)
        if key not in _NEUTRAL:
            file.fail(
                f"unknown key {short_repr(name)} ({shown}), which may affect the result: this variant is not supported"
            )
        if isinstance(value, list | np.ndarray) or value != _NEUTRAL[key]:
            file.fail(f"{name} is {shown}; only {_NEUTRAL[key]} is supported")
