"""Translates the metadata of a GGUF file into a Hugging Face config, which the model families read.

Keys are those that llama.cpp's converter writes (`conversion/*.py`). A missing key means what llama.cpp's loaders
assume (`src/models/*.cpp`, `src/llama-model.cpp`).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from llm_edge.checkpoint.gguf.file import GGUFFile
from llm_edge.model.rope import yarn_amplitude
from llm_edge.runtime.safe_io import short_repr

_MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
EMBEDDING, HEAD = "token_embd.weight", "output.weight"
_MAX_LAYERS = 1_024
_GEMMA3_27B_LAYERS = 62

# Keys after the architecture's prefix that are read ...
_READ = {
    "context_length", "embedding_length", "block_count", "feed_forward_length", "attention.head_count",
    "attention.head_count_kv", "attention.key_length", "attention.value_length", "attention.layer_norm_rms_epsilon",
    "attention.sliding_window", "rope.dimension_count", "rope.freq_base", "rope.scale_linear", "rope.scaling.type",
    "rope.scaling.factor", "rope.scaling.attn_factor", "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast", "rope.scaling.yarn_beta_slow",
}  # fmt: skip
_READ_FOR_GEMMA3 = {"attention.sliding_window_pattern", "rope.freq_base_swa"}
# ... that do not affect the result (some converters write the last two for every architecture) ...
_IGNORED = {
    "vocab_size", "tensor_data_layout", "rope.scaling.finetuned", "attention.layer_norm_epsilon",
    "use_parallel_residual",
}  # fmt: skip
# ... and that are accepted with this value only. Any other key is rejected.
_NEUTRAL: Mapping[str, Any] = {
    "attention.causal": True, "attention.scale": 0, "attention.clamp_kqv": 0, "attention.max_alibi_bias": 0,
    "attn_logit_softcapping": 0, "final_logit_softcapping": 0, "embedding_scale": 1, "residual_scale": 1,
    "logit_scale": 1, "expert_count": 0, "expert_used_count": 0, "nextn_predict_layers": 0, "pooling_type": 0,
    "rope.scaling.alpha": 0, "rope.scaling.yarn_ext_factor": 1, "rope.scaling.yarn_log_multiplier": 0,
}  # fmt: skip


def hf_config(file: GGUFFile) -> dict[str, Any]:
    """Return the metadata as a Hugging Face `config.json`.

    Raises:
        CheckpointError: the architecture or a setting is not supported.
    """
    architecture = file.meta_str("general.architecture")
    if architecture not in _MODEL_TYPES:
        supported = ", ".join(map(repr, _MODEL_TYPES))
        file.fail(f"architecture {short_repr(architecture)} is not supported; supported: {supported}")
    kind = file.meta_str("general.type", default="model")
    if kind != "model":
        file.fail(f"contains {short_repr(kind)} instead of a model (general.type): give the model's own file")
    _reject_unknown_keys(file, architecture)

    def integer(key: str, default: int | None = None, minimum: int = 1, maximum: int | None = None) -> int:
        return file.meta_int(f"{architecture}.{key}", minimum=minimum, maximum=maximum, default=default)

    heads, hidden = integer("attention.head_count"), integer("embedding_length")
    head_dim = integer("attention.key_length", hidden // heads)
    if f"{architecture}.attention.key_length" not in file.metadata and hidden % heads:
        file.fail(f"{architecture}.embedding_length ({hidden}) is not a multiple of attention.head_count ({heads})")
    for key in ("attention.value_length", "rope.dimension_count"):
        if integer(key, head_dim) != head_dim:
            file.fail(f"{architecture}.{key} is {integer(key)}; only the head size {head_dim} is supported")
    config: dict[str, Any] = {
        "model_type": _MODEL_TYPES[architecture],
        "vocab_size": file.tensor("token_embd.weight").shape[0],
        "hidden_size": hidden,
        "intermediate_size": integer("feed_forward_length"),
        "num_hidden_layers": integer("block_count", maximum=_MAX_LAYERS),
        "num_attention_heads": heads,
        "num_key_value_heads": integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": integer("context_length"),
        "rms_norm_eps": _number(file, f"{architecture}.attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": HEAD not in file.tensors or (EMBEDDING in file.tensors and file.equal(HEAD, EMBEDDING)),
        "rope_theta": _number(file, f"{architecture}.rope.freq_base", 10_000.0),
        "rope_scaling": _rope_scaling(file, architecture),
    }
    window = integer("attention.sliding_window", 0, minimum=0)
    if architecture == "gemma3":
        return config | _gemma3_keys(file, config, window)
    if architecture == "llama" and window:  # the converter writes Mistral models as llama
        return config | {"model_type": "mistral", "sliding_window": window}
    if 0 < window < config["max_position_embeddings"]:
        file.fail(f"{architecture}.attention.sliding_window is {window}, which is not supported")
    if architecture != "qwen2":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if architecture == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    return config


def _gemma3_keys(file: GGUFFile, config: Mapping[str, Any], window: int) -> dict[str, Any]:
    layers, heads, hidden = (config[key] for key in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    key = "gemma3.attention.sliding_window_pattern"
    pattern = file.metadata.get(key, 6)
    if isinstance(pattern, np.ndarray):
        sliding = [bool(item) for item in pattern]
        if len(sliding) != layers:
            file.fail(f"{key} has {len(sliding)} entries; {layers} are required")
    else:
        interval = file.meta_int(key, minimum=0, default=6)
        sliding = [not interval or number % interval < interval - 1 for number in range(layers)]
    found: dict[str, Any] = {
        "hidden_activation": "gelu_pytorch_tanh",
        # The file does not contain the scale; as in llama.cpp, it is derived from the head size except for 27B.
        "query_pre_attn_scalar": hidden // heads if layers == _GEMMA3_27B_LAYERS else config["head_dim"],
        "rope_local_base_freq": _number(file, "gemma3.rope.freq_base_swa", 10_000.0),
        "layer_types": ["sliding_attention" if window and local else "full_attention" for local in sliding],
    }
    return found | ({"sliding_window": window} if window else {})


def _rope_scaling(file: GGUFFile, architecture: str) -> dict[str, Any] | None:
    """Return a config's `rope_scaling`; a factor without a type means linear scaling."""
    prefix = f"{architecture}.rope.scaling"
    kind = file.meta_str(f"{prefix}.type", default="linear")
    amplitude = _number(file, f"{prefix}.attn_factor", 1.0)
    if kind != "yarn" and amplitude != 1:
        file.fail(f"{prefix}.attn_factor is {amplitude}, which is supported with yarn only")
    legacy_factor = _number(file, f"{architecture}.rope.scale_linear", 0.0)
    factor = _number(file, f"{prefix}.factor", legacy_factor) or 1.0
    if kind not in ("none", "linear", "yarn"):
        file.fail(f"{prefix}.type {short_repr(kind)} is not supported; supported: 'none', 'linear', 'yarn'")
    if kind == "none" or (kind == "linear" and factor == 1):
        return None
    scaling: dict[str, Any] = {"rope_type": kind, "factor": factor}
    if kind == "yarn":
        context = file.meta_int(f"{architecture}.context_length", minimum=1)
        original = file.meta_int(f"{prefix}.original_context_length", minimum=1, default=context)
        scaling["original_max_position_embeddings"] = original
        scaling["beta_fast"] = _number(file, f"{prefix}.yarn_beta_fast", 32.0)
        scaling["beta_slow"] = _number(file, f"{prefix}.yarn_beta_slow", 1.0)
        if amplitude != 1:
            scaling["attention_factor"] = amplitude * yarn_amplitude(factor)
    return scaling


def _reject_unknown_keys(file: GGUFFile, architecture: str) -> None:
    known = _READ | _IGNORED | (_READ_FOR_GEMMA3 if architecture == "gemma3" else set())
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


def _number(
    file: GGUFFile,
    key: str,
    default: float | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
) -> float:
    """Return a number; a float32 as its shortest decimal form, so that 1e-5 is not 9.999999747378752e-06."""
    value = file.meta_float(key, default=default, minimum=minimum, maximum=maximum)
    with np.errstate(over="ignore"):
        single = np.float32(value)
    return float(str(single)) if float(single) == value else value
