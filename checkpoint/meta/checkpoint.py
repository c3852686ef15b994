"""State dicts of LLaMA-style models in Meta's naming: bare, without a config in the file. Knows no file format.

The names are those of Meta's own releases (github.com/meta-llama/llama, `model.py`) and of the many projects that
follow them. Almost all of a model's shape is seen in its tensors; `meta_config.py` tells the rest.

Rotary positions turn neighbouring pairs of a head's dimensions, as complex numbers; here and in ONNX they turn its
halves. The rows of wq and wk are put into that order when they are loaded, which changes no attention score.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from llm_edge.checkpoint.base import Checkpoint, Source, hash_file
from llm_edge.checkpoint.meta.config import Settings, Stated, StateDictOptions
from llm_edge.checkpoint.meta.side_files import read_text_side
from llm_edge.checkpoint.tensors.tensor_bytes import TYPE_NAMES
from llm_edge.checkpoint.tensors.tensor_file import TensorFile, open_tensor_file
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.registry import find_family
from llm_edge.model.weights import Sources, SourceTensor, WeightTable, bind_weights, half_split
from llm_edge.runtime.errors import CheckpointError

__all__ = ["StateDictOptions", "read_state_dict"]

DEFAULT_CONTEXT = 2048
"""Tokens a context holds where nobody states `max_seq_len`."""
DEFAULT_NORM_EPS = 1e-5
"""Epsilon of the norms where nobody states `norm_eps`; the default of Meta's code."""

_EMBEDDING, _HEAD = "tok_embeddings.weight", "output.weight"
_QUERY, _KEY, _GATE = (f"layers.0.{name}.weight" for name in ("attention.wq", "attention.wk", "feed_forward.w1"))
_OUTER: Mapping[str, Sources] = {
    "embed_tokens.weight": _EMBEDDING,
    "norm.weight": "norm.weight",
    "lm_head.weight": _HEAD,
}
# Tables that are computed anew here: rotary angles, masks, caches.
_IGNORED = r"(.*\.)?(rope\.freqs|freqs_cis|freqs_cos|freqs_sin|inv_freq|causal_mask|mask|cache_k|cache_v)"
_LAYER = re.compile(r"layers\.(\d{1,6})\.")
_SHARD = re.compile(r"consolidated\.\d+\.(pth|pt|safetensors)")


def read_state_dict(path: Path, options: StateDictOptions) -> Checkpoint:
    """Read a state dict with its config and tokenizer.

    Args:
        path: the file of tensors.
        options: what neither the tensors nor the config file say, see `StateDictOptions`.

    Raises:
        CheckpointError: a file is missing or damaged, the config contradicts the tensors, or nobody states the
            number of heads or the base of the rotary frequencies.
    """
    _refuse_shards(path)
    file = open_tensor_file(path)
    settings = Settings.of(options, path)
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
    text = read_text_side(path, settings, options.max_seq_len or config.max_position_embeddings)
    types = Counter(TYPE_NAMES[info.dtype] for info in file.tensors.values() if info.dtype in TYPE_NAMES)
    source = Source(
        name=path.resolve().parent.name if _SHARD.fullmatch(path.name) else path.stem,
        format="safetensors" if path.suffix == ".safetensors" else "PyTorch",
        files=(hash_file(path),),
        weight_types=", ".join(kind for kind, _ in types.most_common()),
    )
    return Checkpoint(
        config, reader.used, weights, text.tokenizer, text.generation, source, text.reasoning, text.guards
    )


def _weight_table(head_dim: int) -> WeightTable:
    convert = half_split(head_dim)
    layer: dict[str, Sources] = {
        "attention_norm.weight": "attention_norm.weight",
        "attention.qkv.weight": (
            SourceTensor("attention.wq.weight", convert),
            SourceTensor("attention.wk.weight", convert),
            "attention.wv.weight",
        ),
        "attention.output.weight": "attention.wo.weight",
        "mlp_norm.weight": "ffn_norm.weight",
        "mlp.gate_up.weight": ("feed_forward.w1.weight", "feed_forward.w3.weight"),
        "mlp.down.weight": "feed_forward.w2.weight",
    }
    return WeightTable(_OUTER, layer, "layers.{}.", _IGNORED)


def _refuse_shards(path: Path) -> None:
    if not _SHARD.fullmatch(path.name):
        return
    try:
        shards = [other.name for other in path.parent.iterdir() if _SHARD.fullmatch(other.name)]
    except OSError as error:
        raise CheckpointError(f"{path.parent}: cannot be read ({error.strerror})") from error
    if len(shards) > 1:
        raise CheckpointError(
            f"{path}: one of {len(shards)} shards, each a slice of every tensor (model parallel), which are not joined "
            "here: give the model's Hugging Face folder"
        )


def _llama_config(file: TensorFile, settings: Settings) -> dict[str, Any]:
    """The keys of a Hugging Face llama config, from the tensors where they show them, else from the settings."""
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
            raise CheckpointError(f"{where}: weights of type {kind}: save them as float32, float16 or bfloat16")

    _agree(settings.integer("dim"), dim, f"{_EMBEDDING} has {dim} columns")
    _agree(settings.integer("ffn_dim"), ffn_dim, f"{_GATE} has {ffn_dim} rows")
    _agree(settings.integer("n_layers"), layers, f"{file.path.name} has {layers} layers")
    vocabulary = settings.integer("vocab_size")
    if vocabulary is not None and vocabulary.value != -1:  # Meta's params.json leave it to the tokenizer so
        _agree(vocabulary, vocab_size, f"{_EMBEDDING} has {vocab_size} rows")

    heads = settings.integer("n_heads")
    if heads is None:
        settings.needs("n_heads", file.path, "the head count cannot be seen in a state dict")
    if heads.value < 1 or query_rows % heads.value or query_rows // heads.value % 2:
        heads.fail(f", but {_QUERY} has {query_rows} rows, which are not so many heads of an even size")
    head_dim = query_rows // heads.value
    _agree(settings.integer("head_dim"), head_dim, f"{_QUERY} has {query_rows} rows for {heads.value} heads")
    key_heads = settings.integer("n_kv_heads")
    shown = f"{_KEY} has {key_rows} rows, which are {key_rows / head_dim:g} heads of {head_dim}"
    if key_rows % head_dim or heads.value % (key_rows // head_dim):
        heads.fail(f", but {shown}")
    _agree(key_heads, key_rows // head_dim, shown)

    theta = settings.number("rope_theta")
    if theta is None:
        settings.needs("rope_theta", file.path, "the base of the rotary frequencies cannot be seen in a state dict")
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
        "max_position_embeddings": _within(settings.context(), 2, 2_097_152, DEFAULT_CONTEXT),
        "rms_norm_eps": _within(settings.number("norm_eps"), 0.0, 1.0, DEFAULT_NORM_EPS),
        "rope_theta": _within(theta, 1.0, 1e12, theta.value),
        "tie_word_embeddings": _tied(file, settings),
        **settings.rope,
    }


def _matrix(file: TensorFile, name: str) -> tuple[int, int]:
    info = file.tensors.get(name)
    if info is None:
        raise CheckpointError(f"{file.path}: tensor {name} is missing: not a whole state dict in Meta's naming")
    if len(info.shape) != 2 or 0 in info.shape:
        raise CheckpointError(f"{file.path}: {name} has shape {info.shape}, two dimensions were expected")
    return info.shape[0], info.shape[1]


def _agree(stated: Stated[int] | None, seen: int, how: str) -> None:
    if stated is not None and stated.value != seen:
        stated.fail(f", but {how}")


def _within(stated: Stated[Any] | None, low: float, high: float, default: Any) -> Any:
    if stated is None:
        return default
    if not low <= stated.value <= high:  # NaN is not
        stated.fail(f"; {low:g} to {high:g} are possible")
    return stated.value


def _tied(file: TensorFile, settings: Settings) -> bool:
    """Whether the head is the embedding: it is left out, or stored twice."""
    stated = settings.tied()
    if _HEAD not in file.tensors:
        if stated is not None and not stated.value:
            stated.fail(f", but {file.path.name} has no {_HEAD}: the checkpoint is incomplete")
        return True
    head, embedding = file.tensors[_HEAD], file.tensors[_EMBEDDING]
    same = head.shape == embedding.shape and head.dtype == embedding.dtype
    same = same and torch.equal(file.load(_HEAD), file.load(_EMBEDDING))
    if stated is not None and stated.value and not same:
        stated.fail(f", but {_HEAD} differs from {_EMBEDDING}")
    return same
