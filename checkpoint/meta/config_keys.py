"""Keys that the config of a model with Meta's tensor names may have.

An unknown key may affect what the model computes, so it is rejected; keys of training, naming and memory use are
ignored. The `config.json` of a Hugging Face llama is exempt, because transformers ignores unknown keys too.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from llm_edge.model.config_reader import ConfigReader
from llm_edge.runtime.safe_io import short_repr

KEYS: Mapping[str, tuple[str, ...]] = {  # setting -> its keys in files
    "dim": ("dim", "hidden_size"),
    "ffn_dim": ("ffn_dim", "hidden_dim", "intermediate_size"),
    "n_layers": ("n_layers", "num_hidden_layers"),
    "n_heads": ("n_heads", "num_attention_heads"),
    "n_kv_heads": ("n_kv_heads", "num_key_value_heads"),
    "head_dim": ("head_dim",),
    "vocab_size": ("vocab_size",),
    "max_seq_len": ("max_seq_len", "max_position_embeddings"),
    "norm_eps": ("norm_eps", "rms_norm_eps"),
    "rope_theta": ("rope_theta",),
    "tied": ("tie_word_embeddings", "tie_embeddings", "tied_embeddings", "tie_weights", "weight_tying"),
}
SCALED_ROPE = ("rope_scaling_factor", "rope_high_freq_factor")
"""Keys that require `use_scaled_rope`."""

_ROPE = frozenset(
    {"use_scaled_rope", "rope_parameters", "rope_scaling", "original_max_position_embeddings", "partial_rotary_factor"}
)
_SECTIONS = frozenset({"model", "paths", "tokens", "generation"})
# Must be missing, null, false, 0 or empty: the weights do not show these settings, and the decoder lacks them.
_UNSUPPORTED = frozenset({
    "attention_bias", "attn_logit_softcapping", "bias", "final_logit_softcapping", "lora_args", "mlp_bias", "moe",
    "num_experts", "parallel_residual", "qk_norm", "qkv_bias", "quantization", "quantization_args", "sliding_window",
    "use_bias", "use_biases", "use_qk_norm", "window", "window_size",
})  # fmt: skip
_SILU = frozenset({"silu", "swish", "swiglu"})
_RMS_NORM = frozenset({"rmsnorm", "rms_norm", "rms"})
_ROTARY = frozenset({"rope", "rotary"})
_NAMES: Mapping[str, frozenset[str]] = {  # key -> supported values
    **dict.fromkeys(("act_fn", "activation", "activation_function", "ffn_type", "hidden_act", "mlp_type"), _SILU),
    **dict.fromkeys(("norm", "norm_type"), _RMS_NORM),
    **dict.fromkeys(("pos_encoding", "position_embedding_type", "positional_encoding"), _ROTARY),
}
_IGNORED = frozenset({
    # determine the width of the MLP, which is read from the weights
    "multiple_of", "ffn_dim_multiplier",
    # training
    "attention_dropout", "attn_dropout", "checkpoint_activations", "dropout", "embd_dropout", "ffn_dropout",
    "grad_checkpointing", "gradient_checkpointing", "hidden_dropout", "init_std", "initializer_range",
    "resid_dropout", "residual_dropout", "seed", "use_gradient_checkpointing", "z_loss",
    # names
    "_name_or_path", "architecture", "architectures", "description", "model_name", "name", "size",
    "transformers_version", "version",
    # numbers and memory
    "compile", "device", "dtype", "flash", "flash_attention", "flash_attn", "max_batch_size", "model_parallel_size",
    "precision", "pretraining_tp", "torch_dtype", "use_cache", "use_flash", "use_flash_attention", "use_flash_attn",
    "use_sdpa",
    # tokens, which are read from the tokenizer's files
    "bos_id", "bos_token_id", "eos_id", "eos_token_id", "pad_id", "pad_token_id", "padding_idx",
})  # fmt: skip
_KNOWN = frozenset(
    {
        "model_type",
        *(key for keys in KEYS.values() for key in keys),
        *SCALED_ROPE,
        *_ROPE,
        *_SECTIONS,
        *_UNSUPPORTED,
        *_NAMES,
        *_IGNORED,
    }
)
_MAX_SHOWN = 3


def check_keys(model: ConfigReader, content: Mapping[str, Any]) -> None:
    """Reject unknown keys, and values that describe another model than a LLaMA.

    Raises:
        CheckpointError: a key is unknown, or its value is not supported.
    """
    model.require("model_type", "llama")
    model.require("partial_rotary_factor", 1)
    model.reject(*sorted(_UNSUPPORTED))
    for key, allowed in _NAMES.items():
        name = model.text(key, "")
        if name and name.lower() not in allowed:
            model.fail(f"{key} {short_repr(name)} is not supported; supported: {', '.join(map(repr, sorted(allowed)))}")
    if "hidden_size" in content and ("model_type" in content or "architectures" in content):
        return  # a Hugging Face llama
    unknown = [short_repr(key) for key, value in content.items() if value is not None and key not in _KNOWN]
    if unknown:
        more = f" and {len(unknown) - _MAX_SHOWN} more" if len(unknown) > _MAX_SHOWN else ""
        model.fail(
            f"unknown key: {', '.join(unknown[:_MAX_SHOWN])}{more}: remove keys that do not affect the model's "
            "output; other models than LLaMA (RMSNorm, rotary positions, SwiGLU) are not supported"
        )
