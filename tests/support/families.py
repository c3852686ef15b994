"""Small random transformers models of every family, in awkward shapes, as Hugging Face folders."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tiny
import torch

_LLAMA: Mapping[str, Any] = {
    "vocab_size": 331,
    "hidden_size": 64,
    "intermediate_size": 136,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # not hidden_size / num_attention_heads
    "max_position_embeddings": 256,
    "bos_token_id": 0,
    "eos_token_id": 2,
    "pad_token_id": 2,
}
_SPLIT = {key: value for key, value in _LLAMA.items() if key != "head_dim"}
_SHORT, _LONG = ([1 + step * i for i in range(16)] for step in (0.01, 0.3))


def _rope(kind: str, **more: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 10_000.0, **more}}


CASES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("llama", _LLAMA),
    "llama with biases, tied": (
        "llama",
        {**_LLAMA, "attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True},
    ),
    "llama with heads of 24": ("llama", {**_LLAMA, "head_dim": 24, "num_key_value_heads": 1}),
    "llama with heads of 6": ("llama", {**_LLAMA, "head_dim": 6}),
    "llama, linear": ("llama", {**_LLAMA, **_rope("linear", factor=3.0)}),
    "llama, llama3": (
        "llama",
        {
            **_LLAMA,
            **_rope(
                "llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64
            ),
        },
    ),
    "llama, yarn": ("llama", {**_LLAMA, **_rope("yarn", factor=4.0, original_max_position_embeddings=32)}),
    "llama, yarn with all its settings": (
        "llama",
        {
            **_LLAMA,
            **_rope(
                "yarn",
                factor=6.0,
                original_max_position_embeddings=48,
                beta_fast=20.0,
                beta_slow=2.0,
                mscale=0.7,
                mscale_all_dim=1.1,
                truncate=False,
            ),
        },
    ),
    "llama, longrope": (
        "llama",
        {
            **_LLAMA,
            **_rope(
                "longrope",
                factor=4.0,
                original_max_position_embeddings=32,
                short_factor=_SHORT,
                long_factor=_LONG,
            ),
        },
    ),
    "mistral": ("mistral", {**_LLAMA, "sliding_window": 16}),
    "ministral3": (
        "ministral3",
        {
            **_LLAMA,
            "sliding_window": 40,
            **_rope(
                "yarn",
                factor=16.0,
                original_max_position_embeddings=16,
                mscale=1.0,
                mscale_all_dim=1.0,
                llama_4_scaling_beta=0.5,
            ),
        },
    ),
    "qwen2": ("qwen2", {**_SPLIT, "use_sliding_window": True, "sliding_window": 12, "max_window_layers": 1}),
    "qwen3": ("qwen3", {**_LLAMA, "tie_word_embeddings": True}),
    "qwen3 with a window and biases": (
        "qwen3",
        {
            **_LLAMA,
            "use_sliding_window": True,
            "sliding_window": 12,
            "max_window_layers": 1,
            "attention_bias": True,
        },
    ),
    "smollm3": (
        "smollm3",
        {
            **_LLAMA,
            "num_hidden_layers": 3,
            "no_rope_layer_interval": 2,
            "use_sliding_window": True,
            "sliding_window": 10,
        },
    ),
    "phi3": ("phi3", {**_SPLIT, "sliding_window": 20}),
    "phi3, longrope on a part of each head": (
        "phi3",
        {
            **_SPLIT,
            "max_position_embeddings": 160,
            "original_max_position_embeddings": 32,
            **_rope("longrope", partial_rotary_factor=0.75, short_factor=_SHORT[:6], long_factor=_LONG[:6]),
        },
    ),
    "gemma2": (
        "gemma2",
        {
            **_LLAMA,
            "hidden_activation": "gelu_pytorch_tanh",
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 16,
            "query_pre_attn_scalar": 48,
            "attn_logit_softcapping": 3.0,
            "final_logit_softcapping": 5.0,
        },
    ),
    "gemma2 without softcapping": (
        "gemma2",
        {**_LLAMA, "num_key_value_heads": 1, "attn_logit_softcapping": None, "final_logit_softcapping": None},
    ),
    "gemma3_text": (
        "gemma3_text",
        {
            **_LLAMA,
            "num_hidden_layers": 3,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
            "sliding_window": 16,
            "query_pre_attn_scalar": 48,
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "olmo2": ("olmo2", _SPLIT),
    "olmo3": (
        "olmo3",
        {
            **_SPLIT,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 16,
            "rope_parameters": {
                "full_attention": {
                    "rope_type": "yarn",
                    "rope_theta": 1e4,
                    "factor": 4.0,
                    "original_max_position_embeddings": 32,
                },
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            },
        },
    ),
    "seed_oss": ("seed_oss", {**_LLAMA, "attention_out_bias": True}),
    "arcee": ("arcee", {**_LLAMA, "mlp_bias": True}),
    "gemma": ("gemma", {**_LLAMA, "num_key_value_heads": 1}),
    "starcoder2": ("starcoder2", {**_SPLIT, "sliding_window": 16}),
    "stablelm": ("stablelm", {**_SPLIT, "use_qkv_bias": True}),
    "stablelm with parallel blocks": (
        "stablelm",
        {**_SPLIT, "use_parallel_residual": True, **_rope("default", partial_rotary_factor=0.5)},
    ),
    "olmo": ("olmo", _SPLIT),
    "nemotron": ("nemotron", {**_LLAMA, "mlp_bias": True}),
    "helium": ("helium", {**_SPLIT, "head_dim": 16, "mlp_bias": True, "attention_bias": True}),
    "glm": ("glm", _LLAMA),
    "glm4": ("glm4", {**_LLAMA, "head_dim": 24, "attention_bias": False}),
    "exaone4": (
        "exaone4",
        {
            **_LLAMA,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 16,
            "sliding_window_pattern": "LG",
        },
    ),
    "exaone4 without windows": (
        "exaone4",
        {**_SPLIT, "layer_types": ["full_attention"] * 2, "sliding_window": None, "tie_word_embeddings": True},
    ),
    "cohere": ("cohere", {**_SPLIT, "logit_scale": 2.0}),
    "cohere2": (
        "cohere2",
        {
            **_SPLIT,
            "num_attention_heads": 2,
            "layer_types": ["sliding_attention", "full_attention"],
            "sliding_window": 16,
            "logit_scale": 2.0,
            "attention_bias": True,
        },
    ),
    "granite": (
        "granite",
        {
            **_SPLIT,
            "embedding_multiplier": 12.0,
            "logits_scaling": 0.5,
            "residual_multiplier": 0.22,
            "attention_multiplier": 0.1,
            "mlp_bias": True,
            "attention_bias": True,
            "tie_word_embeddings": True,
        },
    ),
    "gpt2": (
        "gpt2",
        {
            "vocab_size": 331,
            "n_embd": 60,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
    ),
    "phi": ("phi", {**_SPLIT, "num_attention_heads": 2}),
    "gpt_bigcode": (
        "gpt_bigcode",
        {
            "vocab_size": 331,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 256,
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
    ),
    "gpt_bigcode with keys for each head": (
        "gpt_bigcode",
        {
            "vocab_size": 331,
            "n_embd": 64,
            "n_layer": 2,
            "n_head": 2,
            "n_inner": 200,
            "n_positions": 256,
            "multi_query": False,
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
    ),
    "gpt_neo": (
        "gpt_neo",
        {
            "vocab_size": 331,
            "hidden_size": 64,
            "num_layers": 2,
            "num_heads": 4,
            "max_position_embeddings": 256,
            "window_size": 16,
            "attention_types": [[["global", "local"], 1]],
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox": (
        "gpt_neox",
        {
            "vocab_size": 331,
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "intermediate_size": 200,
            "max_position_embeddings": 256,
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
    ),
    "gpt_neox with sequential blocks": (
        "gpt_neox",
        {
            "vocab_size": 331,
            "hidden_size": 60,
            "num_hidden_layers": 2,
            "num_attention_heads": 5,
            "intermediate_size": 200,
            "max_position_embeddings": 256,
            "use_parallel_residual": False,
            "rotary_pct": 0.5,
            "bos_token_id": 0,
            "eos_token_id": 2,
        },
    ),
}
"""By name: `model_type`, and its config."""


def model(name: str, seed: int = 0) -> Any:
    """A transformers model with non-uniform attention: with the usual tiny weights it would be a plain average."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    kind, config = CASES[name]
    torch.manual_seed(seed)
    created = AutoModelForCausalLM.from_config(CONFIG_MAPPING[kind](**config), attn_implementation="eager").eval()
    with torch.no_grad():
        for weight_name, weight in created.named_parameters():
            if weight.ndim == 1:
                weight.add_(torch.randn_like(weight) * 0.1)
            else:
                embedding = any(part in weight_name for part in ("embed", "wte", "wpe"))
                weight.mul_(5 if embedding else 8)
    return created


def save(model: Any, folder: Path) -> Path:
    """Write a model with the tiny tokenizer."""
    model.save_pretrained(folder)
    tiny.save_tokenizer(folder)
    return folder
