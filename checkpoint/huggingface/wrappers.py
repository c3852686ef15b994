"""Finds the text model in the config of a model that also reads images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_edge.runtime.errors import CheckpointError, UnknownFamilyError
from llm_edge.runtime.safe_io import short_repr

WRAPPERS: Mapping[str, bool] = {  # model_type -> whether the head is tied if the config does not say so
    "aya_vision": True,
    "cohere2_vision": True,
    "gemma3": True,
    "internvl": True,
    "llava": False,
    "llava_next": False,
    "mistral3": True,
    "qwen2_5_vl": False,
    "qwen2_vl": False,
    "qwen3_vl": False,
}
"""Models that, without images, compute what the model of their `text_config` computes, apart from `_WITHIN`."""

# model_type in `text_config` -> family. Others may differ within a wrapper.
_TEXT_TYPES: Mapping[str, str] = {
    **{name: name for name in ("cohere", "cohere2", "gemma3_text", "llama", "ministral3", "mistral", "qwen2", "qwen3")},
    # With text only, the three rotary positions of a token are equal.
    "qwen2_5_vl_text": "qwen2",
    "qwen2_vl_text": "qwen2",
    "qwen3_vl_text": "qwen3",
}
_WITHIN: Mapping[str, Mapping[str, Any]] = {kind: {"logit_scale": 1.0} for kind in ("cohere", "cohere2")}
"""Settings of text models that have this value within a wrapper: it has a head of its own, without the factor."""
_FLAT = {"qwen2_5_vl": "qwen2_5_vl_text", "qwen2_vl": "qwen2_vl_text"}
"""Text models whose config is, in published folders, at the top level of the wrapper's."""
_IMAGE_KEYS = ("mrope_section", "mrope_interleaved")  # of rotary positions
_OUTER_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config", "tie_word_embeddings")
_7B = {"hidden_size": 4096, "num_hidden_layers": 32, "num_attention_heads": 32}
_DEFAULTS: Mapping[str, Mapping[str, Any]] = {  # sizes that published configs omit because they are transformers' own
    "gemma3_text": {"vocab_size": 262_208, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256},
    "llama": {"vocab_size": 32_000, "intermediate_size": 11_008, **_7B},
    "mistral": {"vocab_size": 32_000, "intermediate_size": 14_336, **_7B},
    **{kind: {"rms_norm_eps": 1e-5, "rope_theta": 1e6, "max_window_layers": 80} for kind in _FLAT.values()},
}


def text_config(content: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], str, tuple[str, ...]]:
    """Return the config of the text model, where it is, and notes; other configs are returned unchanged.

    Raises:
        CheckpointError: the config of a wrapper has no text model that is supported.
    """
    kind = content.get("model_type")
    if not isinstance(kind, str) or kind not in WRAPPERS:
        return content, where, ()
    text = content.get("text_config")
    if text is None and kind in _FLAT:
        text = {key: value for key, value in content.items() if key != "vision_config"} | {"model_type": _FLAT[kind]}
    if not isinstance(text, Mapping):
        raise CheckpointError(f"{where}: text_config is {short_repr(text)}, not an object")
    given = {key: value for key, value in text.items() if value is not None or key not in _OUTER_KEYS}
    model_type = given.get("model_type")
    if not isinstance(model_type, str) or model_type not in _TEXT_TYPES:
        raise UnknownFamilyError(
            f"{where}: text_config: model_type {short_repr(model_type)} is not supported within {kind}; "
            f"supported: {', '.join(sorted(_TEXT_TYPES))}"
        )
    outer = {key: content[key] for key in _OUTER_KEYS if content.get(key) is not None}
    found = {**_DEFAULTS.get(model_type, {}), **given, **_WITHIN.get(model_type, {})}
    found |= {"model_type": _TEXT_TYPES[model_type], "tie_word_embeddings": WRAPPERS[kind], **outer}
    if kind in _FLAT and given.get("tie_word_embeddings") is True:  # older folders have it there alone
        found["tie_word_embeddings"] = True
    for key in ("rope_parameters", "rope_scaling"):
        if isinstance(found.get(key), Mapping):
            found[key] = {name: value for name, value in found[key].items() if name not in _IMAGE_KEYS}
            found[key] |= {name: "default" for name in ("type", "rope_type") if found[key].get(name) == "mrope"}
    note = f"{kind} is exported as a text model: its image part is left out"
    return found, f"{where}: text_config", (note,)
