"""Tiny models of every causal language model that transformers knows, in shapes in which mistakes show."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file

from llm_edge.exporter.general import export as export_module
from llm_edge.exporter.texts import Window

LAYERS = 4
_VOCABULARY = 331
_SIZES: Mapping[str, Any] = {
    "vocab_size": _VOCABULARY,
    **dict.fromkeys(("hidden_size", "n_embd", "d_model", "embedding_size", "lru_width"), 64),
    **dict.fromkeys(("intermediate_size", "n_inner", "ffn_dim", "decoder_ffn_dim", "mamba_d_ssm"), 128),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "n_layers", "decoder_layers", "num_layers"), LAYERS),
    **dict.fromkeys(("num_attention_heads", "n_head", "n_heads", "decoder_attention_heads", "num_heads"), 4),
    **dict.fromkeys(("num_key_value_heads", "num_kv_heads", "num_global_key_value_heads"), 2),
    **dict.fromkeys(("head_dim", "v_head_dim", "qk_nope_head_dim", "global_head_dim", "index_head_dim"), 16),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim", "mamba_d_head", "mamba_head_dim"), 16),
    **dict.fromkeys(("mamba_d_state", "ssm_state_size", "state_size", "hidden_size_per_layer_input"), 16),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len"), 1024),
    **dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), 4),
    **dict.fromkeys(("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_top_k"), 2),
    **dict.fromkeys(("moe_intermediate_size", "shared_expert_intermediate_size", "q_lora_rank", "kv_lora_rank"), 32),
    **dict.fromkeys(("qk_rope_head_dim", "rotary_dim", "mamba_n_heads", "mamba_num_heads", "time_step_rank"), 8),
    **dict.fromkeys(("n_group", "topk_group", "n_shared_experts", "first_k_dense_replace", "mamba_n_groups"), 1),
    **dict.fromkeys(("n_groups", "linear_num_key_heads", "mamba_expand"), 2),
    **dict.fromkeys(("sliding_window", "attention_window_size", "chunk_size", "mamba_chunk_size", "window_size"), 16),
    "qk_head_dim": 24,
    "linear_num_value_heads": 4,
    "index_n_heads": 16,  # with few, many scores are 0, and which of them are chosen is undefined
    "index_topk": 16,
    "vocab_size_per_layer_input": _VOCABULARY,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "tie_word_embeddings": False,
}
"""Values of the fields that a config has."""

_WINDOWS = ["sliding_attention", "full_attention"] * (LAYERS // 2)
_LINEAR = ["linear_attention", "full_attention"] * (LAYERS // 2)
_SMALL = {
    "vocab_size": _VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
CHANGES: Mapping[str, Mapping[str, Any]] = {
    **{kind: {"layer_types": _WINDOWS} for kind in ("cohere2", "exaone4", "gemma2", "gemma3_text", "gpt_oss", "olmo3")},
    **{
        kind: {"layer_types": _LINEAR}
        for kind in ("minimax", "olmo_hybrid", "qwen3_5_moe_text", "qwen3_5_text", "qwen3_next")
    },
    **{
        kind: {"num_key_value_heads": 4}
        for kind in (
            *("axk1", "axk2", "deepseek_v2", "deepseek_v3", "deepseek_v32", "glm4_moe_lite"),
            *("glm_moe_dsa", "hy_v4", "minicpm3", "youtu"),
        )
    },
    **{kind: {"layer_types": ["conv", "full_attention"] * (LAYERS // 2)} for kind in ("lfm2", "lfm2_moe")},
    "bailing_hybrid": {"layer_types": _LINEAR, "num_key_value_heads": 4},
    "cohere_compass_text": {
        "layer_types": _WINDOWS,
        "rope_parameters": {
            "full_attention": None,
            "sliding_attention": {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [4, 2, 2]},
        },
    },
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10_000.0, "clip_qkv": 8.0},
    },
    "blt": {
        part: {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128}
        for part in ("patcher_config", "encoder_config", "decoder_config", "global_config")
    }
    | {"encoder_hash_byte_group_vocab": 100},
    "dots3_note_text": {
        "layer_types": ["indexed_attention", "sliding_attention"] * (LAYERS // 2),
        "num_key_value_heads": 4,
        "head_dim": 24,
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 32,
        "swa_kv_lora_rank": 32,
        "swa_head_dim": 24,
        "swa_qk_nope_head_dim": 16,
        "swa_v_head_dim": 16,
    },
    "bamba": {"attn_layer_indices": [1, 3]},
    "falcon": {"new_decoder_architecture": True},
    "fuyu": {"text_config": {"model_type": "persimmon", **_SMALL, "num_key_value_heads": 4}},
    "gemma3n_text": {
        "layer_types": _WINDOWS,
        "intermediate_size": [128] * LAYERS,
        "num_kv_shared_layers": 2,
        "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0],
        "laurel_rank": 8,
        "altup_num_inputs": 2,
    },
    "gemma4_text": {"layer_types": _WINDOWS, "num_kv_shared_layers": 2},
    "gpt_neo": {"attention_types": [[["global", "local"], LAYERS // 2]]},
    "got_ocr2": {"text_config": {"model_type": "qwen2", **_SMALL}, "vision_config": {"num_hidden_layers": 2}},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * (LAYERS // 2), "shared_intermediate_size": 64},
    "hy_v4": {"pad_token_id": None},  # whose embedding is zero, so that all its scores of tokens are equal
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "kimi_linear": {"layer_types": _LINEAR, "num_key_value_heads": 4},
    "longcat_flash": {"num_key_value_heads": 4, "head_dim": 8},
    "minimax_m3_vl_text": {
        "layer_types": ["full_attention", "minimax_m3_sparse"] * (LAYERS // 2),
        "index_n_heads": 2,
        "index_block_size": 4,
        "index_topk_blocks": 4,
    },
    "mamba2": {"num_heads": 8, "expand": 2},
    "zaya": {"num_experts_per_tok": 1},
    "llama4_text": {
        "attention_chunk_size": 16,
        "intermediate_size_mlp": 128,
        "no_rope_layers": [1, 1, 1, 0],
        "floor_scale": 7,
    },
    "nemotron_h": {"layers_block_type": ["mamba", "attention", "moe", "mlp"]},
    "phi3": {"sliding_window": None},
    "phi4_multimodal": {
        "vision_config": {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2},
        "audio_config": {"hidden_size": 32, "intermediate_size": 32, "num_blocks": 1, "num_attention_heads": 2},
    },
    "qwen4_exp_text": {
        "layer_types": ["linear_attention", "indexed_attention"] * (LAYERS // 2),
        "hc_lowrank": 16,
        "indexer_n_heads": 2,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 16,
        "indexer_budget": 512,
        "indexer_compress_ratio": 4,
        "ngram_vocab_size_base": 300,
        "make_ngram_vocab_size_divisible_by": 1,
        "split_ngram_parts": 1,
    },
    "recurrent_gemma": {"block_types": ["recurrent", "attention"]},
    "zamba2": {"layers_block_type": ["mamba", "hybrid"] * (LAYERS // 2)},
    "stablelm": {"use_qkv_bias": True},
}
"""Changes for single architectures, so that each kind of layer occurs."""


def make_config(kind: str, **changes: Any) -> Any:
    """A config of a `model_type`, with every size that it has a field for, and these changes."""
    from transformers import CONFIG_MAPPING

    config_class = CONFIG_MAPPING[kind]
    fields = set(inspect.signature(config_class.__init__).parameters) | set(config_class.attribute_map)
    for each in config_class.__mro__:
        fields |= set(vars(each).get("__annotations__", {}))
    given = {name: value for name, value in _SIZES.items() if name in fields} | dict(CHANGES.get(kind, {})) | changes
    aliases = [name for name, target in config_class.attribute_map.items() if name in given and target in given]
    given = {name: value for name, value in given.items() if name not in aliases}
    # Some configs derive a field, or reject it together with another one.
    rejected: Exception | None = None
    for dropped in ([], ["head_dim"], ["sliding_window"], ["num_layers"], ["rotary_dim"], ["num_hidden_layers"]):
        try:
            return config_class(**{name: value for name, value in given.items() if name not in dropped})
        except Exception as error:  # noqa: BLE001 (whatever validates configs)
            rejected = rejected or error
    assert rejected is not None
    raise rejected


def make_model(kind: str, seed: int = 0, **changes: Any) -> Any:
    """A model with non-uniform attention and routing: with the usual tiny weights they would be plain averages."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(seed)
    config = make_config(kind, **changes)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if not weight.is_floating_point():
                continue
            if weight.ndim == 1:
                weight.add_(torch.randn_like(weight) * 0.1)
            elif any(part in name for part in ("embed", "wte", "wpe")):
                weight.mul_(5)
            elif weight.std() < 0.05:
                weight.mul_(8)
    return model


def shorten_validation(patch: pytest.MonkeyPatch, tokens: int) -> None:
    """Make exports validate on the first tokens of a text."""
    whole = export_module.load_validation
    patch.setattr(export_module, "load_validation", lambda checkpoint: [first(whole(checkpoint)[0], tokens)])


def first(window: Window, tokens: int) -> Window:
    """The first tokens of a window."""
    return Window(window.tokens[:tokens], window.kind)


def save(kind: str, folder: Path, seed: int = 0, **changes: Any) -> Path:
    """Write a model as a Hugging Face folder with the tiny tokenizer; of a wrapper, its text model as a part of it."""
    text_kind = _text_kind(kind)
    make_model(text_kind or kind, seed, **changes).save_pretrained(folder)
    tiny.save_tokenizer(folder)
    if text_kind is not None:
        path, weights = folder / "config.json", folder / "model.safetensors"
        text = json.loads(path.read_text(encoding="utf-8"))
        path.write_text(json.dumps({"model_type": kind, "text_config": text}), encoding="utf-8")
        stored = load_file(weights)
        wrapped = {name.replace("model.", "model.language_model.", 1): tensor for name, tensor in stored.items()}
        save_file({**wrapped, "model.visual.patch.weight": torch.zeros(2, 2)}, weights, {"format": "pt"})
    return folder


def _text_kind(kind: str) -> str | None:
    """The `model_type` of the text model in a model that also reads images or sound; None for models of text alone."""
    from transformers import CONFIG_MAPPING

    text = CONFIG_MAPPING[kind].sub_configs.get("text_config")
    found = getattr(text, "model_type", None)
    return found if isinstance(found, str) and found != kind else None
