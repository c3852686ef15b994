"""Reads state dicts of LLaMA-style models with Meta's tensor names (github.com/meta-llama/llama, `model.py`).

Most sizes are derived from the tensors; `config.py` supplies the rest. These models rotate adjacent pairs of a head's
dimensions, the decoder and ONNX rotate its halves: the rows of wq and wk are reordered on loading, which does not
change the attention scores.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from llm_edge.checkpoint.base import Checkpoint, Source, by_frequency, hash_file
from llm_edge.checkpoint.meta.config import Setting, Settings, StateDictOptions
from llm_edge.checkpoint.meta.shards import ModelParallelShards, ModelTensors, find_shards
from llm_edge.checkpoint.meta.text_assets import read_text_assets
from llm_edge.checkpoint.tensors.tensor_data import TYPE_NAMES
from llm_edge.checkpoint.tensors.tensor_file import TensorFile, open_tensor_file
from llm_edge.checkpoint.tensors.wrapper_names import find_prefix
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.registry import find_family
from llm_edge.model.weights import Sources, SourceTensor, WeightTable, bind_weights, half_split, interleave
from llm_edge.runtime.errors import CheckpointError

DEFAULT_CONTEXT = 2048
"""Context length if `max_seq_len` is not specified."""
DEFAULT_NORM_EPS = 1e-5
"""Epsilon of the norms if `norm_eps` is not specified; the default of Meta's code."""

_EMBEDDING, _HEAD = "tok_embeddings.weight", "output.weight"
_QUERY, _KEY, _GATE = (f"layers.0.{name}.weight" for name in ("attention.wq", "attention.wk", "feed_forward.w1"))
_OUTER: Mapping[str, Sources] = {
    "embed_tokens.weight": _EMBEDDING,
    "norm.weight": "norm.weight",
    "lm_head.weight": _HEAD,
}
# Buffers that the decoder computes itself: rotary angles, masks, caches.
_IGNORED = r"(.*\.)?(rope\.freqs|freqs_cis|freqs_cos|freqs_sin|inv_freq|causal_mask|mask|cache_k|cache_v)"
_LAYER = re.compile(r"layers\.(\d{1,6})\.")


def read_state_dict(path: Path, options: StateDictOptions) -> Checkpoint:
    """Read a state dict, or all shards of one given any of them, with its config and tokenizer.

    Raises:
        CheckpointError: a file is missing or damaged, the config contradicts the tensors, or the number of heads or
            the rotary base is not specified.
    """
    paths = find_shards(path)
    settings = Settings.of(options, path)
    opened = [_open_model(each, settings) for each in paths]
    file: ModelTensors = opened[0][0] if len(paths) == 1 else ModelParallelShards([shard for shard, _ in opened])
    notes = opened[0][1]
    raw = _llama_config(file, settings)
    reader = ConfigReader(raw, str(path))
    for key in ("architectures", "model_type"):
        reader.value(key)
    config = find_family("llama").read_config(reader)
    weights = bind_weights(
        config,
        _weight_table(config.head_dim),
        {name: info.shape for name, info in file.tensors.items()},
        file.load,
        str(path),
    )
    text = read_text_assets(path, settings, options.max_seq_len or config.max_position_embeddings)
    source = Source(
        name=path.resolve().parent.name if path.name.startswith("consolidated.") else path.stem,
        format="safetensors" if path.suffix == ".safetensors" else "PyTorch",
        files=tuple(map(hash_file, paths)),
        weight_types=by_frequency(TYPE_NAMES[info.dtype] for info in file.tensors.values() if info.dtype in TYPE_NAMES),
    )
    return Checkpoint(
        config,
        reader.used,
        weights,
        text.tokenizer,
        text.generation,
        source,
        text.reasoning,
        text.guards,
        (*notes, *text.notes),
    )


def has_meta_names(names: Collection[str]) -> bool:
    """Whether tensors have Meta's names, possibly within another module."""
    return any(name == inner or name.endswith(f".{inner}") for name in names for inner in (_EMBEDDING, _QUERY))


def _open_model(path: Path, settings: Settings) -> tuple[TensorFile, tuple[str, ...]]:
    """Open the model in a file, with a note if it is within another module.

    If the settings say that embedding and head are tied, the weight may be stored under either of their names, as
    safetensors' `save_model` does.
    """
    file, notes = open_tensor_file(path), []
    prefix = find_prefix(file.tensors, _QUERY, "", str(path))
    if prefix is None:
        nested = next((name for name in file.tensors if name.endswith(f".{_EMBEDDING}")), None)
        if nested is not None:
            raise CheckpointError(
                f"{path}: its tensors are nested in another module ({nested}): save the state_dict of the model itself"
            )
    elif prefix:
        others = [name for name in file.tensors if not name.startswith(prefix)]
        notes.append(
            f"the model is read from the module {prefix.removesuffix('.')}"
            + (f"; {len(others)} tensors outside of it are left out, such as {others[0]}" if others else "")
        )
        file = file.within(prefix)
    tied = settings.tied()
    if tied is not None and tied.value and _EMBEDDING not in file.tensors and _HEAD in file.tensors:
        file = file.renamed(_HEAD, _EMBEDDING)
    return file, tuple(notes)


def _weight_table(head_dim: int) -> WeightTable:
    order = half_split(head_dim), interleave(head_dim)
    layer: dict[str, Sources] = {
        "attention_norm.weight": "attention_norm.weight",
        "attention.qkv.weight": (
            SourceTensor("attention.wq.weight", *order),
            SourceTensor("attention.wk.weight", *order),
            "attention.wv.weight",
        ),
        "attention.output.weight": "attention.wo.weight",
        "mlp_norm.weight": "ffn_norm.weight",
        "mlp.gate_up.weight": ("feed_forward.w1.weight", "feed_forward.w3.weight"),
        "mlp.down.weight": "feed_forward.w2.weight",
    }
    return WeightTable(_OUTER, layer, "layers.{}.", _IGNORED)


def _llama_config(file: ModelTensors, settings: Settings) -> dict[str, Any]:
    """Build a Hugging Face llama config from the tensors and, where they do not determine it, the settings."""
    where = str(file.path)
    vocab_size, dim = _matrix(file, _EMBEDDING)
    ffn_dim, _ = _matrix(file, _GATE)
    query_rows, _ = _matrix(file, _QUERY)
    key_rows, _ = _matrix(file, _KEY)
    numbers = {int(match[1]) for name in file.tensors if (match := _LAYER.match(name))}
    layers = max(numbers) + 1
    if layers != len(numbers):
        missing = min(set(range(len(numbers) + 1)) - numbers)
        raise CheckpointError(f"{where}: layer {missing} of {layers} is missing: the checkpoint is incomplete")
    for info in (info for name, info in file.tensors.items() if not re.fullmatch(_IGNORED, name)):
        if not info.dtype.is_floating_point:
            kind = str(info.dtype).removeprefix("torch.")
            raise CheckpointError(
                f"{where}: weights of type {kind} are not supported: save them as float32, float16 or bfloat16"
            )

    _check_equal(settings.integer("dim"), dim, f"{_EMBEDDING} has {dim} columns")
    _check_equal(settings.integer("ffn_dim"), ffn_dim, f"{_GATE} has {ffn_dim} rows")
    _check_equal(settings.integer("n_layers"), layers, f"{file.path.name} has {layers} layers")
    vocabulary = settings.integer("vocab_size")
    if vocabulary is not None and vocabulary.value != -1:  # in Meta's params.json: determined by the tokenizer
        _check_equal(vocabulary, vocab_size, f"{_EMBEDDING} has {vocab_size} rows")

    heads = settings.integer("n_heads")
    if heads is None:
        settings.fail_missing("n_heads", file.path, "a state dict does not contain the head count")
    if heads.value < 1 or query_rows % heads.value or query_rows // heads.value % 2:
        heads.fail(f", but the {query_rows} rows of {_QUERY} do not divide into that many heads of an even size")
    head_dim = query_rows // heads.value
    _check_equal(settings.integer("head_dim"), head_dim, f"{_QUERY} has {query_rows} rows for {heads.value} heads")
    key_heads = settings.integer("n_kv_heads")
    shown = f"{_KEY} has {key_rows} rows, {key_rows / head_dim:g} heads of {head_dim}"
    if key_rows % head_dim or heads.value % (key_rows // head_dim):
        heads.fail(f", but {shown}")
    _check_equal(key_heads, key_rows // head_dim, shown)

    theta = settings.number("rope_theta")
    if theta is None:
        settings.fail_missing("rope_theta", file.path, "a state dict does not contain the rotary base")
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": vocab_size,
        "hidden_size": dim,
        "intermediate_size": ffn_dim,
        "num_hidden_layers": layers,
        "num_attention_heads": heads.value,
        "num_key_value_heads": key_rows // head_dim,
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": _bounded(settings.context(), 2, 2_097_152, DEFAULT_CONTEXT),
        "rms_norm_eps": _bounded(settings.number("norm_eps"), 0.0, 1.0, DEFAULT_NORM_EPS),
        "rope_theta": _bounded(theta, 1.0, 1e12, theta.value),
        "tie_word_embeddings": _tied(file, settings),
        **settings.rope,
    }


def _matrix(file: ModelTensors, name: str) -> tuple[int, int]:
    info = file.tensors.get(name)
    if info is None:
        raise CheckpointError(f"{file.path}: tensor {name} is missing: not a complete state dict with Meta's names")
    if len(info.shape) != 2 or 0 in info.shape:
        raise CheckpointError(f"{file.path}: {name} has shape {info.shape}, not two dimensions")
    return info.shape[0], info.shape[1]


def _check_equal(setting: Setting[int] | None, actual: int, evidence: str) -> None:
    if setting is not None and setting.value != actual:
        setting.fail(f", but {evidence}")


def _bounded(setting: Setting[Any] | None, low: float, high: float, default: Any) -> Any:
    if setting is None:
        return default
    if not low <= setting.value <= high:  # also rejects NaN
        setting.fail(f"; it must be {low:g} to {high:g}")
    return setting.value


def _tied(file: ModelTensors, settings: Settings) -> bool:
    """Whether the head shares the embedding's weight: it is missing, or stored as an equal tensor."""
    setting = settings.tied()
    if _HEAD not in file.tensors:
        if setting is not None and not setting.value:
            setting.fail(f", but {file.path.name} has no {_HEAD}: the checkpoint is incomplete")
        return True
    head, embedding = file.tensors[_HEAD], file.tensors[_EMBEDDING]
    same = head.shape == embedding.shape and head.dtype == embedding.dtype
    same = same and torch.equal(file.load(_HEAD), file.load(_EMBEDDING))
    if setting is not None and setting.value and not same:
        setting.fail(f", but {_HEAD} differs from {_EMBEDDING}")
    return same
