"""Reads GGUF files of the architectures that our own decoder computes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_edge.checkpoint.base import Checkpoint, Source, TokenizerAssets, by_frequency, hash_file
from llm_edge.checkpoint.gguf.architectures import ARCHITECTURES, Architecture
from llm_edge.checkpoint.gguf.config import EMBEDDING, HEAD, hf_config
from llm_edge.checkpoint.gguf.file import GGUFFile
from llm_edge.checkpoint.gguf.general import GENERAL_ARCHITECTURES
from llm_edge.checkpoint.gguf.sampling import recommended_sampling
from llm_edge.checkpoint.gguf.split import base_name
from llm_edge.checkpoint.gguf.tokenizer import read_tokenizer
from llm_edge.model.config import LayerConfig, ModelConfig
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.families.common import multiplied
from llm_edge.model.registry import find_family
from llm_edge.model.rope import FrequencyDivisors
from llm_edge.model.weights import Convert, Sources, SourceTensor, WeightTable, bind_weights, half_split
from llm_edge.runtime.errors import UnknownFamilyError
from llm_edge.runtime.safe_io import short_repr

_ROPE_FREQS = "rope_freqs.weight"
_OUTER: Mapping[str, Sources] = {
    "embed_tokens.weight": EMBEDDING,
    "norm.weight": "output_norm.weight",
    "norm.bias": "output_norm.bias",
    "lm_head.weight": HEAD,
    "lm_head.bias": "output.bias",
}


def read_gguf(path: Path) -> Checkpoint:
    """Read a GGUF file, or all parts of a split model given the first.

    Raises:
        CheckpointError: the file is damaged, or its architecture or a setting is not supported.
    """
    file = GGUFFile(path)
    known = _own_architecture(file)
    raw = ConfigReader(hf_config(file, known), str(path))
    config = find_family(raw.text("model_type"), str(path)).read_config(raw)
    architecture = file.meta_str("general.architecture")
    if known.rope_freqs:
        config = _with_rope_freqs(config, file)
    table = weight_table(config, architecture, packed="blk.0.attn_qkv.weight" in file.tensors)
    if config.hidden_scale != 1:  # Cohere: the last norm includes the factor of the logits
        norm = multiplied("output_norm.weight", 1 / config.hidden_scale)
        table = dataclasses.replace(table, outer={**table.outer, "norm.weight": norm})
    if config.tie_word_embeddings and HEAD in file.tensors:
        table = _with_smaller_of_equals(table, file)
    weights = bind_weights(
        config,
        table,
        {name: tensor.shape for name, tensor in file.tensors.items()},
        file.load,
        where=str(path),
        block_reader=file,
        unused=(EMBEDDING, HEAD),
    )
    tokenizer = read_tokenizer(file)
    generation, notes = gguf_generation(file, tokenizer, config.vocab_size)
    return Checkpoint(
        config=config,
        hf_config=raw.used,
        weights=weights,
        tokenizer=tokenizer,
        generation=generation,
        source=gguf_source(file),
        notes=notes,
    )


def _own_architecture(file: GGUFFile) -> Architecture:
    """Return how files of the architecture are read; raise CheckpointError if our decoder does not compute it."""
    architecture = file.meta_str("general.architecture")
    if architecture in ARCHITECTURES:
        return ARCHITECTURES[architecture]
    if architecture in GENERAL_ARCHITECTURES:
        error = UnknownFamilyError(
            f"{file.path}: architecture {architecture!r} is not supported by our own decoder, only through transformers"
        )
        error.path = file.path
        raise error
    supported = ", ".join(map(repr, (*ARCHITECTURES, *GENERAL_ARCHITECTURES)))
    return file.fail(f"architecture {short_repr(architecture)} is not supported; supported: {supported}")


def gguf_generation(
    file: GGUFFile, tokenizer: TokenizerAssets, vocab_size: int
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return special tokens and sampling parameters as a `generation_config.json`, and notes.

    Raises:
        CheckpointError: there are more tokens than rows of the embedding.
    """
    tokens = len(file.meta_strings("tokenizer.ggml.tokens"))
    if tokens > vocab_size:
        file.fail(f"has {tokens} tokens, but an embedding of {vocab_size} rows: convert the model again")
    sampling, notes = recommended_sampling(file)
    eos = list(tokenizer.eos_token_ids)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return {**{key: value for key, value in ids.items() if value is not None}, **sampling}, notes


def gguf_source(file: GGUFFile) -> Source:
    """Return where a checkpoint came from."""
    return Source(
        name=base_name(file.path),
        format="GGUF",
        files=tuple(map(hash_file, file.parts)),
        weight_types=by_frequency(tensor.ggml_type.name for tensor in file.tensors.values()),
    )


def _with_rope_freqs(config: ModelConfig, file: GGUFFile) -> ModelConfig:
    """Apply the frequency divisors to which the converter reduces llama3 scaling; the metadata does not have them."""
    if _ROPE_FREQS not in file.tensors:
        return config
    factors = file.load(_ROPE_FREQS).float()
    if tuple(factors.shape) != (config.head_dim // 2,) or not bool(((factors > 0) & (factors < 1e30)).all()):
        file.fail(f"tensor {_ROPE_FREQS} is not {config.head_dim // 2} positive numbers: convert the model again")
    scaling = FrequencyDivisors(tuple(factors.tolist()))

    def scaled(layer: LayerConfig) -> LayerConfig:
        if layer.rope is None:
            return layer
        if layer.rope.scaling is not None:
            file.fail(f"{_ROPE_FREQS} and rope.scaling both scale the rotary positions, which is not supported")
        return dataclasses.replace(layer, rope=dataclasses.replace(layer.rope, scaling=scaling))

    return dataclasses.replace(config, layers=tuple(map(scaled, config.layers)))


def _with_smaller_of_equals(table: WeightTable, file: GGUFFile) -> WeightTable:
    """Read a tied embedding from the smaller of two tensors with the same numbers."""
    smaller = min(EMBEDDING, HEAD, key=lambda name: file.tensor(name).nbytes)
    return dataclasses.replace(table, outer={**table.outer, "embed_tokens.weight": smaller})


def weight_table(config: ModelConfig, architecture: str, *, packed: bool = False) -> WeightTable:
    """Return the weight table of the format; with `packed`, queries, keys and values are one tensor.

    Norms already include the 1 that Gemma and Nemotron add.
    """
    known = ARCHITECTURES[architecture]
    rotated = next((layer.rope.dim for layer in config.layers if layer.rope is not None), config.head_dim)
    convert = half_split(config.head_dim, rotated) if known.interleaved else None
    layer: dict[str, Sources] = {
        "attention_norm.weight": "attn_norm.weight",
        "attention_norm.bias": "attn_norm.bias",
        "attention.qkv.weight": _qkv(config, convert, "weight", packed=packed),
        "attention.qkv.bias": _qkv(config, convert, "bias", packed=packed),
        "attention.query_norm.weight": "attn_q_norm.weight",
        "attention.key_norm.weight": "attn_k_norm.weight",
        "attention.output.weight": "attn_output.weight",
        "attention.output.bias": "attn_output.bias",
        "attention_post_norm.weight": "post_attention_norm.weight",
        "mlp_norm.weight": "ffn_norm.weight",
        "mlp_norm.bias": "ffn_norm.bias",
        "mlp.gate_up.weight": ("ffn_gate.weight", "ffn_up.weight"),
        "mlp.gate_up.bias": ("ffn_gate.bias", "ffn_up.bias"),
        "mlp.up.weight": "ffn_up.weight",
        "mlp.up.bias": "ffn_up.bias",
        "mlp.down.weight": "ffn_down.weight",
        "mlp.down.bias": "ffn_down.bias",
        "mlp_post_norm.weight": "post_ffw_norm.weight",
    }
    ignored = r"rope_freqs\.weight" if known.rope_freqs else "(?!)"
    return WeightTable(_OUTER, {**layer, **known.layer}, "blk.{}.", ignored)


def _qkv(config: ModelConfig, convert: Convert | None, kind: str, *, packed: bool) -> Sources:
    if not packed:
        return (
            SourceTensor(f"attn_q.{kind}", convert),
            SourceTensor(f"attn_k.{kind}", convert),
            f"attn_v.{kind}",
        )
    if convert is None:
        return f"attn_qkv.{kind}"
    reorder, keys = convert, config.key_value_size

    def convert_packed(weight: Tensor) -> Tensor:
        queries, key_rows, values = torch.split(weight, [config.query_size, keys, keys])
        return torch.cat([reorder(queries), reorder(key_rows), values])

    return SourceTensor(f"attn_qkv.{kind}", convert_packed)
