"""GGUF files of the `llama` architecture as a checkpoint. The container itself is read by `gguf.py`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from llm_edge.exporter.checkpoint.base import Checkpoint, Part, Source, bind_weights, hash_file
from llm_edge.exporter.checkpoint.gguf import GGUFFile
from llm_edge.exporter.checkpoint.gguf_tokenizer import tokenizer_assets
from llm_edge.exporter.config import ModelConfig
from llm_edge.runtime.errors import CheckpointError

OUTER: Mapping[str, tuple[Part, ...]] = {
    "embed_tokens.weight": (Part("token_embd.weight"),),
    "norm.weight": (Part("output_norm.weight"),),
    "lm_head.weight": (Part("output.weight"),),
}


def _layer(config: ModelConfig) -> dict[str, tuple[Part, ...]]:
    def half_split(weight: Tensor) -> Tensor:
        """Rows of each head from interleaved pairs, as the format keeps them, to half-split rotary form."""
        rows, width = weight.shape
        pairs = weight.view(rows // config.head_dim, config.head_dim // 2, 2, width)
        return pairs.transpose(1, 2).reshape(rows, width)

    return {
        "attention_norm.weight": (Part("attn_norm.weight"),),
        "attention.qkv.weight": (
            Part("attn_q.weight", half_split),
            Part("attn_k.weight", half_split),
            Part("attn_v.weight"),
        ),
        "attention.output.weight": (Part("attn_output.weight"),),
        "mlp_norm.weight": (Part("ffn_norm.weight"),),
        "mlp.gate_up.weight": (Part("ffn_gate.weight"), Part("ffn_up.weight")),
        "mlp.down.weight": (Part("ffn_down.weight"),),
    }


def read_gguf(path: Path) -> Checkpoint:
    """Read a GGUF file.

    Raises:
        CheckpointError: damaged, of another architecture, or with a setting that this decoder does not have.
    """
    file = GGUFFile(path)
    config = _config(file)
    layer = _layer(config)
    weights = bind_weights(
        config,
        OUTER,
        layer,
        "blk.{}.",
        {name: tensor.shape for name, tensor in file.tensors.items()},
        file.load,
        ignored=lambda _: False,
        where=str(path),
    )
    tokenizer = tokenizer_assets(file)
    eos = list(tokenizer.eos_token_ids)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": eos[0] if len(eos) == 1 else eos or None,
        "pad_token_id": tokenizer.pad_token_id,
    }
    types = Counter(tensor.ggml_type.name for tensor in file.tensors.values())
    return Checkpoint(
        config=config,
        weights=weights,
        tokenizer=tokenizer,
        generation={key: value for key, value in ids.items() if value is not None},
        source=Source(
            name=path.stem,
            format="GGUF",
            files=(hash_file(path),),
            weight_types=", ".join(name for name, _ in types.most_common()),
        ),
    )


def _config(file: GGUFFile) -> ModelConfig:
    architecture = file.meta_str("general.architecture")
    if architecture != "llama":
        raise CheckpointError(f"{file.path}: architecture {architecture!r} is not supported; supported: 'llama'")
    if "rope_freqs.weight" in file.tensors or file.meta_str("llama.rope.scaling.type", default="none") != "none":
        raise CheckpointError(f"{file.path}: scaled rotary positions (llama.rope.scaling) are not supported")
    if "llama.expert_count" in file.metadata:
        raise CheckpointError(f"{file.path}: mixtures of experts (llama.expert_count) are not supported")
    heads = file.meta_int("llama.attention.head_count", minimum=1)
    hidden = file.meta_int("llama.embedding_length", minimum=1)
    head_dim = file.meta_int("llama.attention.key_length", minimum=1, default=hidden // heads)
    if file.meta_int("llama.attention.value_length", minimum=1, default=head_dim) != head_dim:
        raise CheckpointError(f"{file.path}: key and value heads of different size are not supported")
    if file.meta_int("llama.rope.dimension_count", minimum=1, default=head_dim) != head_dim:
        raise CheckpointError(f"{file.path}: llama.rope.dimension_count rotates a part of each head, not supported")
    embedding = file.tensor("token_embd.weight")
    return ModelConfig(
        vocab_size=embedding.shape[0],
        hidden_size=hidden,
        intermediate_size=file.meta_int("llama.feed_forward_length", minimum=1),
        num_hidden_layers=file.meta_int("llama.block_count", minimum=1),
        num_attention_heads=heads,
        num_key_value_heads=file.meta_int("llama.attention.head_count_kv", minimum=1, default=heads),
        head_dim=head_dim,
        max_position_embeddings=file.meta_int("llama.context_length", minimum=1),
        rms_norm_eps=file.meta_float("llama.attention.layer_norm_rms_epsilon"),
        rope_theta=file.meta_float("llama.rope.freq_base", default=10_000.0),
        tie_word_embeddings="output.weight" not in file.tensors,
    )
