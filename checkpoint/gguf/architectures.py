"""The architectures of llama.cpp that are read: their families, keys and tensor names.

To add one, write an entry of `ARCHITECTURES`. The names of tensors are those of the gguf package (`constants.py`,
`tensor_mapping.py`); the order of rows is that of llama.cpp's converter (`conversion/*.py`) and of the rotary
positions of its graphs (`llama_model_rope_type`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from llm_edge.checkpoint.gguf.metadata import Metadata
from llm_edge.model.weights import Sources

Entries = dict[str, Any]
"""Entries of a Hugging Face config."""

_LAYER_EPS, _RMS_EPS = "attention.layer_norm_epsilon", "attention.layer_norm_rms_epsilon"
_WINDOW, _PATTERN, _BASE_SWA = "attention.sliding_window", "attention.sliding_window_pattern", "rope.freq_base_swa"
_WINDOWS = frozenset((_WINDOW, _PATTERN, _BASE_SWA))
_GEMMA_27B_LAYERS = {"gemma2": 46, "gemma3": 62}  # attention is scaled by hidden size / heads
_EXAONE4_WINDOW = 4096


@dataclass(frozen=True, slots=True)
class Architecture:
    """How files of an architecture are read.

    Attributes:
        model_type: the family.
        entries: returns further entries of the family's config, given the metadata and the entries that all have.
        keys: further keys that it reads.
        interleaved: rotary positions are of neighbouring dimensions, so queries and keys have to be reordered.
        partial: only a part of each head may be rotated.
        eps: entry of the config for the epsilon of norms.
        layer_norm: norms are LayerNorm, whose epsilon has another key.
        rope_freqs: a tensor may have divisors of the rotary frequencies.
        per_layer_heads: the number of key-value heads is given for each layer; 0 is a layer without attention.
        layer: weights of a layer whose tensors have other names than usual.
    """

    model_type: str
    entries: Callable[[Metadata, Entries], Entries] = lambda *_: {}
    keys: frozenset[str] = frozenset()
    interleaved: bool = False
    partial: bool = False
    eps: str = "rms_norm_eps"
    layer_norm: bool = False
    rope_freqs: bool = False
    per_layer_heads: bool = False
    layer: Mapping[str, Sources] = field(default_factory=dict)

    @property
    def eps_key(self) -> str:
        """Key of the norms' epsilon."""
        return _LAYER_EPS if self.layer_norm else _RMS_EPS


# ---- entries of configs


def _attention_bias(meta: Metadata) -> bool:
    return meta.has_tensor("attn_q.bias") or meta.has_tensor("attn_qkv.bias")


def _only_attention_bias(meta: Metadata, _: Entries) -> Entries:
    return {"attention_bias": _attention_bias(meta)}


def _all_biases(meta: Metadata, _: Entries) -> Entries:
    return {"attention_bias": _attention_bias(meta), "mlp_bias": meta.has_tensor("ffn_up.bias")}


def _seed_oss(meta: Metadata, config: Entries) -> Entries:
    return _all_biases(meta, config) | {"attention_out_bias": meta.has_tensor("attn_output.bias")}


def _llama(meta: Metadata, config: Entries) -> Entries:
    window = meta.integer(_WINDOW, 0, minimum=0)
    if window:  # the converter writes Mistral models as llama
        return {"model_type": "mistral", "sliding_window": window}
    return _all_biases(meta, config)


def _no_window(meta: Metadata, config: Entries) -> Entries:
    window = meta.integer(_WINDOW, 0, minimum=0)
    if 0 < window < config["max_position_embeddings"]:
        meta.file.fail(f"{meta.architecture}.{_WINDOW} is {window}, which is not supported")
    return {} if meta.architecture == "qwen2" else {"attention_bias": _attention_bias(meta)}


def _gemma_scale(meta: Metadata, config: Entries) -> Entries:
    """The file does not contain the scale; as in llama.cpp, it is derived from the head size except for 27B."""
    by_hidden = config["num_hidden_layers"] == _GEMMA_27B_LAYERS[meta.architecture]
    heads, hidden = config["num_attention_heads"], config["hidden_size"]
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": hidden // heads if by_hidden else config["head_dim"],
    }


def _gemma2(meta: Metadata, config: Entries) -> Entries:
    window = meta.integer(_WINDOW, 4096)
    caps = meta.number("attn_logit_softcapping", 50.0), meta.number("final_logit_softcapping", 30.0)
    return {
        **_gemma_scale(meta, config),
        "attn_logit_softcapping": caps[0] or None,
        "final_logit_softcapping": caps[1] or None,
        "sliding_window": window,
        "layer_types": meta.layer_types(config["num_hidden_layers"], 2, window),
    }


def _gemma3(meta: Metadata, config: Entries) -> Entries:
    window = meta.integer(_WINDOW, 0, minimum=0)
    return {
        **_gemma_scale(meta, config),
        "rope_local_base_freq": meta.number(_BASE_SWA, 10_000.0),
        "layer_types": meta.layer_types(config["num_hidden_layers"], 6, window),
        **({"sliding_window": window} if window else {}),
    }


def _olmo(meta: Metadata, _: Entries) -> Entries:
    eps = meta.number(_LAYER_EPS)
    if eps != 1e-5:
        meta.file.fail(f"{meta.architecture}.{_LAYER_EPS} is {eps}; only 1e-05 is supported")
    return {"attention_bias": _attention_bias(meta)}


def _olmo2(meta: Metadata, config: Entries) -> Entries:
    """OLMo 3 is OLMo 2 with windows, where rotary positions are not scaled."""
    window = meta.integer(_WINDOW, 0, minimum=0)
    bias = {"attention_bias": _attention_bias(meta)}
    if not window:
        return bias
    theta = config["rope_theta"]
    scaling = config["rope_scaling"] or {"rope_type": "default"}
    return bias | {
        "model_type": "olmo3",
        "sliding_window": window,
        "layer_types": meta.layer_types(config["num_hidden_layers"], 4, window),
        "rope_theta": None,
        "rope_scaling": None,
        "rope_parameters": {
            "full_attention": {**scaling, "rope_theta": theta},
            "sliding_attention": {"rope_type": "default", "rope_theta": meta.number(_BASE_SWA, theta)},
        },
    }


def _exaone4(meta: Metadata, config: Entries) -> Entries:
    """Only the 32B model has windows if the file does not give their size."""
    default = _EXAONE4_WINDOW if config["num_hidden_layers"] == 64 else 0
    window = meta.integer(_WINDOW, default, minimum=0)
    layer_types = meta.layer_types(config["num_hidden_layers"], 4, window)
    return {"sliding_window": window or None, "layer_types": layer_types}


def _cohere(meta: Metadata, _: Entries) -> Entries:
    return {"logit_scale": meta.number("logit_scale", 1.0), "attention_bias": _attention_bias(meta)}


def _cohere2(meta: Metadata, config: Entries) -> Entries:
    window = meta.integer(_WINDOW)
    layer_types = meta.layer_types(config["num_hidden_layers"], 4, window)
    return {**_cohere(meta, config), "sliding_window": window, "layer_types": layer_types}


def _mistral3(meta: Metadata, config: Entries) -> Entries:
    """Ministral 3 has queries that grow with their position; Mistral Small 3 does not."""
    rate, scaling = meta.number("attention.temperature_scale", 0.0), config["rope_scaling"]
    if not rate:
        return _llama(meta, config)
    if scaling is None or scaling["rope_type"] != "yarn":
        meta.file.fail(f"{meta.architecture}.attention.temperature_scale requires rope.scaling.type yarn")
    log_multiplier = meta.number("rope.scaling.yarn_log_multiplier", 0.0)
    scales = {"mscale": 1.0, "mscale_all_dim": log_multiplier} if log_multiplier else {}
    window = meta.integer(_WINDOW, 0, minimum=0)
    return {
        "model_type": "ministral3",
        "sliding_window": window or None,
        "rope_parameters": {**scaling, **scales, "rope_theta": config["rope_theta"], "llama_4_scaling_beta": rate},
        "rope_theta": None,
        "rope_scaling": None,
    }


def partial_rotary_factor(dimensions: int, head_dim: int) -> float:
    """Return the fraction of a head with which `int(head_dim * fraction)` is a number of dimensions."""
    fraction = dimensions / head_dim
    return fraction if int(head_dim * fraction) == dimensions else math.nextafter(fraction, 2.0)


# ---- the table

_PACKED_GATE: Mapping[str, Sources] = {"mlp.gate_up.weight": "ffn_up.weight"}

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", _llama, interleaved=True, rope_freqs=True),
    "qwen2": Architecture("qwen2", _no_window),
    "qwen3": Architecture("qwen3", _no_window),
    "gemma3": Architecture("gemma3_text", _gemma3, _WINDOWS),
    "arcee": Architecture("arcee", _all_biases, interleaved=True, rope_freqs=True),
    "chatglm": Architecture(
        "glm",
        _only_attention_bias,
        interleaved=True,
        partial=True,
        layer=_PACKED_GATE,
    ),
    "cohere2": Architecture(
        "cohere2", _cohere2, _WINDOWS | {"logit_scale"}, interleaved=True, eps="layer_norm_eps", layer_norm=True
    ),
    "command-r": Architecture(
        "cohere", _cohere, frozenset({"logit_scale"}), interleaved=True, eps="layer_norm_eps", layer_norm=True
    ),
    "exaone4": Architecture("exaone4", _exaone4, _WINDOWS, rope_freqs=True),
    "gemma": Architecture("gemma"),
    "gemma2": Architecture("gemma2", _gemma2, _WINDOWS | {"attn_logit_softcapping", "final_logit_softcapping"}),
    "glm4": Architecture(
        "glm4",
        _only_attention_bias,
        interleaved=True,
        partial=True,
        layer=_PACKED_GATE,
    ),
    "mistral3": Architecture(
        "llama",
        _mistral3,
        frozenset(("attention.temperature_scale", "rope.scaling.yarn_log_multiplier")),
        interleaved=True,
        rope_freqs=True,
    ),
    "nemotron": Architecture("nemotron", _all_biases, partial=True, eps="norm_eps", layer_norm=True),
    "olmo": Architecture("olmo", _olmo, interleaved=True, layer_norm=True),
    "olmo2": Architecture("olmo2", _olmo2, _WINDOWS),
    "phi2": Architecture("phi", partial=True, eps="layer_norm_eps", layer_norm=True),
    "seed_oss": Architecture(
        "seed_oss",
        _seed_oss,
        layer={"mlp_norm.weight": "post_attention_norm.weight"},
    ),
    "stablelm": Architecture(
        "stablelm",
        lambda meta, _: {
            "use_qkv_bias": _attention_bias(meta),
            "use_parallel_residual": not meta.has_tensor("ffn_norm.weight"),
        },
        partial=True,
        eps="layer_norm_eps",
        layer_norm=True,
    ),
    "starcoder2": Architecture(
        "starcoder2",
        lambda meta, _: {"use_bias": _attention_bias(meta)},
        eps="norm_epsilon",
        layer_norm=True,
    ),
}
"""By `general.architecture`."""
