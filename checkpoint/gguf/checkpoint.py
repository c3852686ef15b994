"""GGUF files of the llama, qwen2, qwen3 and gemma3 architectures as a checkpoint. `gguf.py` reads the container.

The format is llama.cpp's. What its metadata says is put into the words of a Hugging Face config, so that shapes and
switches are read by the families, in one place. The sources are llama.cpp's converter (`conversion/*.py`), for what
is written, and its loaders (`src/models/*.cpp`, `src/llama-model.cpp`), for what a missing key means.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from llm_edge.checkpoint.base import Checkpoint, Source, hash_file
from llm_edge.checkpoint.gguf.reader import GGUFFile
from llm_edge.checkpoint.gguf.tokenizer import tokenizer_assets
from llm_edge.model.config import LayerConfig, ModelConfig
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.registry import find_family
from llm_edge.model.rope import DividedFrequencies, yarn_amplitude
from llm_edge.model.weights import Sources, SourceTensor, WeightTable, bind_weights, half_split
from llm_edge.runtime.errors import CheckpointError
from llm_edge.runtime.show import show

_MODEL_TYPES = {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "gemma3": "gemma3_text"}
_MOST_LAYERS = 1_024
_GEMMA3_27B_LAYERS = 62
_FREQUENCIES = "rope_freqs.weight"

# Keys behind the architecture's name that are read here ...
_READ = {
    "context_length",
    "embedding_length",
    "block_count",
    "feed_forward_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.value_length",
    "attention.layer_norm_rms_epsilon",
    "attention.sliding_window",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.type",
    "rope.scaling.factor",
    "rope.scaling.attn_factor",
    "rope.scaling.original_context_length",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}
_READ_FOR_GEMMA3 = {"attention.sliding_window_pattern", "rope.freq_base_swa"}
# ... that say nothing of the result (some converters wrote the last two for every architecture) ...
_IGNORED = {
    "vocab_size",
    "tensor_data_layout",
    "rope.scaling.finetuned",
    "attention.layer_norm_epsilon",
    "use_parallel_residual",
}
# ... and that may be there with this value only. Any other key is refused.
_NEUTRAL: Mapping[str, Any] = {
    "attention.causal": True,
    "attention.scale": 0,
    "attention.clamp_kqv": 0,
    "attention.max_alibi_bias": 0,
    "attn_logit_softcapping": 0,
    "final_logit_softcapping": 0,
    "embedding_scale": 1,
    "residual_scale": 1,
    "logit_scale": 1,
    "expert_count": 0,
    "expert_used_count": 0,
    "nextn_predict_layers": 0,
    "pooling_type": 0,
    "rope.scaling.alpha": 0,
    "rope.scaling.yarn_ext_factor": 1,
    "rope.scaling.yarn_log_multiplier": 0,
}
# Key behind `general.sampling.` -> name in generation_config.json, highest value
_SAMPLING = {
    "temp": ("temperature", 100),
    "top_k": ("top_k", 2**31 - 1),
    "top_p": ("top_p", 1),
    "min_p": ("min_p", 1),
}

_OUTER: Mapping[str, Sources] = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


def read_gguf(path: Path) -> Checkpoint:
    """Read a GGUF file.

    Raises:
        CheckpointError: damaged, of another architecture, or with a setting that this decoder does not have.
    """
    file = GGUFFile(path)
    raw = ConfigReader(_hf_config(file), str(path))
    config = find_family(raw.text("model_type"), str(path)).read_config(raw)
    architecture = file.meta_str("general.architecture")
    if architecture == "llama":
        config = _with_frequencies(config, file)
    weights = bind_weights(
        config,
        _weight_table(config, architecture),
        {name: tensor.shape for name, tensor in file.tensors.items()},
        file.load,
        where=str(path),
        block_reader=file,
    )
    tokenizer = tokenizer_assets(file)
    tokens = len(file.meta_strings("tokenizer.ggml.tokens"))
    if tokens > config.vocab_size:
        _fail(file, f"has {tokens} tokens, but an embedding of {config.vocab_size} rows: convert the model again")
    eos = list(tokenizer.eos_token_ids)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": tokenizer.pad_token_id,
    }
    types = Counter(tensor.ggml_type.name for tensor in file.tensors.values())
    return Checkpoint(
        config=config,
        hf_config=raw.used,
        weights=weights,
        tokenizer=tokenizer,
        generation={**{key: value for key, value in ids.items() if value is not None}, **_sampling(file)},
        source=Source(
            name=path.stem,
            format="GGUF",
            files=(hash_file(path),),
            weight_types=", ".join(name for name, _ in types.most_common()),
        ),
    )


# ---- metadata


def _hf_config(file: GGUFFile) -> dict[str, Any]:
    """The metadata in the words of a Hugging Face config.json."""
    architecture = file.meta_str("general.architecture")
    if architecture not in _MODEL_TYPES:
        supported = ", ".join(map(repr, _MODEL_TYPES))
        _fail(file, f"architecture {show(architecture)} is not supported; supported: {supported}")
    kind = file.meta_str("general.type", default="model")
    if kind != "model":
        _fail(file, f"holds no model but {show(kind)} (general.type): give the model's own file")
    _refuse_others(file, architecture)

    def integer(key: str, default: int | None = None, minimum: int = 1, maximum: int | None = None) -> int:
        return file.meta_int(f"{architecture}.{key}", minimum=minimum, maximum=maximum, default=default)

    heads, hidden = integer("attention.head_count"), integer("embedding_length")
    head_dim = integer("attention.key_length", hidden // heads)
    if f"{architecture}.attention.key_length" not in file.metadata and hidden % heads:
        _fail(file, f"{architecture}.embedding_length ({hidden}) is not a multiple of attention.head_count ({heads})")
    for key in ("attention.value_length", "rope.dimension_count"):
        if integer(key, head_dim) != head_dim:
            _fail(file, f"{architecture}.{key} is {integer(key)}, only heads of {head_dim} as a whole are supported")
    layers = integer("block_count", maximum=_MOST_LAYERS)
    config: dict[str, Any] = {
        "model_type": _MODEL_TYPES[architecture],
        "vocab_size": file.tensor("token_embd.weight").shape[0],
        "hidden_size": hidden,
        "intermediate_size": integer("feed_forward_length"),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "max_position_embeddings": integer("context_length"),
        "rms_norm_eps": _number(file, f"{architecture}.attention.layer_norm_rms_epsilon"),
        "tie_word_embeddings": "output.weight" not in file.tensors,
        "rope_theta": _number(file, f"{architecture}.rope.freq_base", 10_000.0),
        "rope_scaling": _scaling(file, architecture),
    }
    window = integer("attention.sliding_window", 0, minimum=0)
    if architecture == "gemma3":
        return config | _gemma3(file, config, window)
    if architecture == "llama" and window:  # the converter calls Mistral's models llama, too
        return config | {"model_type": "mistral", "sliding_window": window}
    if 0 < window < config["max_position_embeddings"]:
        _fail(file, f"{architecture}.attention.sliding_window is {window}, which is not supported")
    if architecture != "qwen2":
        config["attention_bias"] = "blk.0.attn_q.bias" in file.tensors
    if architecture == "llama":
        config["mlp_bias"] = "blk.0.ffn_up.bias" in file.tensors
    return config


def _gemma3(file: GGUFFile, config: Mapping[str, Any], window: int) -> dict[str, Any]:
    layers, heads, hidden = (config[key] for key in ("num_hidden_layers", "num_attention_heads", "hidden_size"))
    key = "gemma3.attention.sliding_window_pattern"
    pattern = file.metadata.get(key, 6)
    if isinstance(pattern, np.ndarray):
        sliding = [bool(item) for item in pattern]
        if len(sliding) != layers:
            _fail(file, f"{key} has {len(sliding)} entries, {layers} are needed")
    else:
        every = file.meta_int(key, minimum=0, default=6)
        sliding = [not every or number % every < every - 1 for number in range(layers)]
    given: dict[str, Any] = {
        "hidden_activation": "gelu_pytorch_tanh",
        # The file does not have it; llama.cpp knows the one size whose scale is not that of its heads.
        "query_pre_attn_scalar": hidden // heads if layers == _GEMMA3_27B_LAYERS else config["head_dim"],
        "rope_local_base_freq": _number(file, "gemma3.rope.freq_base_swa", 10_000.0),
        "layer_types": ["sliding_attention" if window and local else "full_attention" for local in sliding],
    }
    return given | ({"sliding_window": window} if window else {})


def _scaling(file: GGUFFile, architecture: str) -> dict[str, Any] | None:
    """Scaling of the rotary positions as a config's `rope_scaling`; with a factor alone it is linear."""
    prefix = f"{architecture}.rope.scaling"
    kind = file.meta_str(f"{prefix}.type", default="linear")
    amplitude = _number(file, f"{prefix}.attn_factor", 1.0)
    if kind != "yarn" and amplitude != 1:
        _fail(file, f"{prefix}.attn_factor is {amplitude}, which is supported with yarn only")
    old = _number(file, f"{architecture}.rope.scale_linear", 0.0)
    factor = _number(file, f"{prefix}.factor", old) or 1.0
    if kind not in ("none", "linear", "yarn"):
        _fail(file, f"{prefix}.type {show(kind)} is not supported; supported: 'none', 'linear', 'yarn'")
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


def _refuse_others(file: GGUFFile, architecture: str) -> None:
    known = _READ | _IGNORED | (_READ_FOR_GEMMA3 if architecture == "gemma3" else set())
    for name, value in file.metadata.items():
        prefix, _, key = name.partition(".")
        if prefix != architecture or key in known:
            continue
        shown = "an array" if isinstance(value, list | np.ndarray) else show(value)
        if key not in _NEUTRAL:
            _fail(file, f"key {show(name)} ({shown}) is not known here, but may change the result: not a known variant")
        if isinstance(value, list | np.ndarray) or value != _NEUTRAL[key]:
            _fail(file, f"{name} is {shown}, which is not supported; {_NEUTRAL[key]} is")


def _sampling(file: GGUFFile) -> dict[str, Any]:
    """What the file recommends for sampling, under the names of generation_config.json."""
    found: dict[str, Any] = {}
    for key, (name, highest) in _SAMPLING.items():
        key = f"general.sampling.{key}"
        if key not in file.metadata:
            continue
        if name == "top_k":
            found[name] = file.meta_int(key, minimum=0, maximum=highest)
        else:
            found[name] = _number(file, key, minimum=0, maximum=highest)
    if not found or found.get("temperature") == 0:  # at 0 the most likely token is taken, as without all this
        return {}
    return {"do_sample": True, **found}


def _number(
    file: GGUFFile,
    key: str,
    default: float | None = None,
    minimum: float | None = None,
    maximum: float | None = None,
) -> float:
    """A number; of those that round to the same float32, the one with the fewest digits, which was meant."""
    value = file.meta_float(key, default=default, minimum=minimum, maximum=maximum)
    with np.errstate(over="ignore"):
        single = np.float32(value)
    return float(str(single)) if float(single) == value else value


# ---- weights


def _with_frequencies(config: ModelConfig, file: GGUFFile) -> ModelConfig:
    """Take the divisors of the frequencies, as which the converter writes llama3's scaling; no config holds them."""
    if _FREQUENCIES not in file.tensors:
        return config
    factors = file.load(_FREQUENCIES).float()
    if tuple(factors.shape) != (config.head_dim // 2,) or not bool(((factors > 0) & (factors < 1e30)).all()):
        _fail(file, f"tensor {_FREQUENCIES} is not {config.head_dim // 2} positive numbers: convert the model again")
    scaling = DividedFrequencies(tuple(factors.tolist()))

    def scaled(layer: LayerConfig) -> LayerConfig:
        if layer.rope is None:
            return layer
        if layer.rope.scaling is not None:
            _fail(file, f"scales rotary positions twice, with {_FREQUENCIES} and llama.rope.scaling: not supported")
        return dataclasses.replace(layer, rope=dataclasses.replace(layer.rope, scaling=scaling))

    return dataclasses.replace(config, layers=tuple(map(scaled, config.layers)))


def _weight_table(config: ModelConfig, architecture: str) -> WeightTable:
    """Weight names of the format. The norms of gemma3 already include its 1; only llama's heads are interleaved."""
    convert = half_split(config.head_dim) if architecture == "llama" else None
    layer: dict[str, Sources] = {
        "attention_norm.weight": "attn_norm.weight",
        "attention.qkv.weight": (
            SourceTensor("attn_q.weight", convert),
            SourceTensor("attn_k.weight", convert),
            "attn_v.weight",
        ),
        "attention.qkv.bias": (
            SourceTensor("attn_q.bias", convert),
            SourceTensor("attn_k.bias", convert),
            "attn_v.bias",
        ),
        "attention.query_norm.weight": "attn_q_norm.weight",
        "attention.key_norm.weight": "attn_k_norm.weight",
        "attention.output.weight": "attn_output.weight",
        "attention.output.bias": "attn_output.bias",
        "attention_post_norm.weight": "post_attention_norm.weight",
        "mlp_norm.weight": "ffn_norm.weight",
        "mlp.gate_up.weight": ("ffn_gate.weight", "ffn_up.weight"),
        "mlp.gate_up.bias": ("ffn_gate.bias", "ffn_up.bias"),
        "mlp.down.weight": "ffn_down.weight",
        "mlp.down.bias": "ffn_down.bias",
        "mlp_post_norm.weight": "post_ffw_norm.weight",
    }
    ignored = r"rope_freqs\.weight" if architecture == "llama" else "(?!)"
    return WeightTable(_OUTER, layer, "blk.{}.", ignored)


def _fail(file: GGUFFile, reason: str) -> NoReturn:
    raise CheckpointError(f"{file.path}: {reason}")
