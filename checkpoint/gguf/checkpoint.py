"""Reads GGUF files of the llama, qwen2, qwen3 and gemma3 architectures."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from llm_edge.checkpoint.base import Checkpoint, Source, by_frequency, hash_file
from llm_edge.checkpoint.gguf.config import EMBEDDING, HEAD, hf_config
from llm_edge.checkpoint.gguf.file import GGUFFile
from llm_edge.checkpoint.gguf.sampling import recommended_sampling
from llm_edge.checkpoint.gguf.split import base_name
from llm_edge.checkpoint.gguf.tokenizer import read_tokenizer
from llm_edge.model.config import LayerConfig, ModelConfig
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.registry import find_family
from llm_edge.model.rope import FrequencyDivisors
from llm_edge.model.weights import Sources, SourceTensor, WeightTable, bind_weights, half_split

_ROPE_FREQS = "rope_freqs.weight"
_OUTER: Mapping[str, Sources] = {
    "embed_tokens.weight": EMBEDDING,
    "norm.weight": "output_norm.weight",
    "lm_head.weight": HEAD,
}


def read_gguf(path: Path) -> Checkpoint:
    """Read a GGUF file, or all parts of a split model given the first.

    Raises:
        CheckpointError: the file is damaged, or its architecture or a setting is not supported.
    """
    file = GGUFFile(path)
    raw = ConfigReader(hf_config(file), str(path))
    config = find_family(raw.text("model_type"), str(path)).read_config(raw)
    architecture = file.meta_str("general.architecture")
    if architecture == "llama":
        config = _with_rope_freqs(config, file)
    table = weight_table(config, architecture)
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
    tokens = len(file.meta_strings("tokenizer.ggml.tokens"))
    if tokens > config.vocab_size:
        file.fail(f"has {tokens} tokens, but an embedding of {config.vocab_size} rows: convert the model again")
    sampling, notes = recommended_sampling(file)
    eos = list(tokenizer.eos_token_ids)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": tokenizer.pad_token_id,
    }
    return Checkpoint(
        config=config,
        hf_config=raw.used,
        weights=weights,
        tokenizer=tokenizer,
        generation={**{key: value for key, value in ids.items() if value is not None}, **sampling},
        source=Source(
            name=base_name(path),
            format="GGUF",
            files=tuple(map(hash_file, file.parts)),
            weight_types=by_frequency(tensor.ggml_type.name for tensor in file.tensors.values()),
        ),
        notes=notes,
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
            file.fail(f"{_ROPE_FREQS} and llama.rope.scaling both scale the rotary positions, which is not supported")
        return dataclasses.replace(layer, rope=dataclasses.replace(layer.rope, scaling=scaling))

    return dataclasses.replace(config, layers=tuple(map(scaled, config.layers)))


def _with_smaller_of_equals(table: WeightTable, file: GGUFFile) -> WeightTable:
    """Read a tied embedding from the smaller of two tensors with the same numbers."""
    smaller = min(EMBEDDING, HEAD, key=lambda name: file.tensor(name).nbytes)
    return dataclasses.replace(table, outer={**table.outer, "embed_tokens.weight": smaller})


def weight_table(config: ModelConfig, architecture: str) -> WeightTable:
    """Return the weight table of the format.

    The norms of gemma3 already include the added 1, and only llama's queries and keys are interleaved.
    """
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
