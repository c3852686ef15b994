"""Sizes of GGUF files, against files that llama.cpp has written."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import tiny

from llm_edge.checkpoint.huggingface.checkpoint import read_folder
from llm_edge.exporter.quantization.gguf_sizes import gguf_bytes
from llm_edge.model.config import ModelConfig

SHAPES = {  # vocabulary, hidden, inner, heads, key/value heads, head size, layers
    "Gemma 3 270M": (262144, 640, 2048, 4, 1, 256, 18),
    "Llama 3.2 1B": (128256, 2048, 8192, 32, 8, 64, 16),
    "Qwen2.5 0.5B": (151936, 896, 4864, 14, 2, 64, 24),
}


def shape(name: str, folder: Path) -> ModelConfig:
    tiny_config = read_folder(tiny.save_checkpoint(folder, tie_word_embeddings=True)).config
    vocab, hidden, inner, heads, kv_heads, head_dim, layers = SHAPES[name]
    return dataclasses.replace(
        tiny_config,
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=inner,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        layers=(tiny_config.layers[0],) * layers,
    )


@pytest.mark.parametrize(
    ("name", "file_type", "size", "tokenizer"),
    [  # all tensors of the file; the other files are published with their whole size
        ("Gemma 3 270M", "Q4_K_M", 246_587_904, 0),
        ("Llama 3.2 1B", "Q4_K_M", 807_694_464, 7_800_000),
        ("Llama 3.2 1B", "Q4_0", 773_025_920, 7_800_000),
        ("Qwen2.5 0.5B", "Q4_K_M", 397_808_192, 5_900_000),
    ],
)
def test_sizes_are_those_of_known_files(name: str, file_type: str, size: int, tokenizer: int, tmp_path: Path) -> None:
    assert gguf_bytes(shape(name, tmp_path), file_type) == pytest.approx(size - tokenizer, rel=0.004)


def test_an_untied_embedding_has_the_type_of_the_projections(tmp_path: Path) -> None:
    tied = shape("Llama 3.2 1B", tmp_path)
    untied = dataclasses.replace(tied, tie_word_embeddings=False)
    assert gguf_bytes(untied, "Q4_0") - gguf_bytes(tied, "Q4_0") == 128256 * 2048 * 4.5 / 8
