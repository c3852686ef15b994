"""Measures peak memory and time of exports: `python -m llm_edge.bench.export_memory FOLDER [SIZE …]`.

Creates random sharded bfloat16 checkpoints with the shapes of LLaMA, of Qwen2.5 at 1.5B, and of Qwen3 with experts (a
7B takes 14 GB of disk, the 30B 61 GB), exports each in a separate process, and prints one line per size. Existing
checkpoints are reused.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Size:
    """Shape of a model, and the precisions to export; `inner` is the width of each expert if there are `experts`."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int = 32_000
    tied: bool = False
    precisions: str = "int4"
    head_dim: int = 128
    experts: int = 0


SIZES = {
    "1b": Size(2048, 8192, 16, 32, 8, head_dim=64),
    "1.5b": Size(1536, 8960, 28, 12, 2, vocab=151_936, tied=True, precisions="int8,int4"),
    "3b": Size(3072, 8192, 28, 24, 8),
    "7b": Size(4096, 11008, 32, 32, 32),
    "3b-moe": Size(1024, 512, 28, 16, 4, vocab=49_152, tied=True, head_dim=64, experts=64),
    "30b-a3b": Size(2048, 768, 48, 32, 4, vocab=151_936, experts=128),
}
_SHARD_BYTES = 2 << 30


def make_checkpoint(folder: Path, size: str) -> Path:
    """Write a random checkpoint of a size with one shard in memory at a time."""
    import torch
    from safetensors.torch import save_file

    target = folder / size
    if (target / "model.safetensors.index.json").exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    shard: dict[str, torch.Tensor] = {}
    index: dict[str, str] = {}
    shard_bytes = count = 0

    def write() -> None:
        nonlocal shard_bytes, count
        count += 1
        name = f"model-{count:05}.safetensors"
        save_file(shard, target / name, {"format": "pt"})
        index.update(dict.fromkeys(shard, name))
        shard.clear()
        shard_bytes = 0

    for name, (rows, width) in _matrices(SIZES[size]):
        shard[name] = torch.randn(rows, width, generator=generator, dtype=torch.bfloat16) * width**-0.5
        shard_bytes += shard[name].nbytes
        if shard_bytes >= _SHARD_BYTES:
            write()
    shard.update({name: torch.ones(width, dtype=torch.bfloat16) for name, width in _norms(SIZES[size])})
    write()
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    _write_config(target, size)
    _write_tokenizer(target / "tokenizer.json")
    return target


def _matrices(shape: Size) -> Iterator[tuple[str, tuple[int, int]]]:
    """Yield names of matrices, their rows and columns."""
    hidden, queries, keys = shape.hidden, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    yield "model.embed_tokens.weight", (shape.vocab, hidden)
    if not shape.tied:
        yield "lm_head.weight", (shape.vocab, hidden)
    for number in range(shape.layers):
        prefix = f"model.layers.{number}."
        for name, rows, width in (
            ("q_proj", queries, hidden),
            ("k_proj", keys, hidden),
            ("v_proj", keys, hidden),
            ("o_proj", hidden, queries),
        ):
            yield f"{prefix}self_attn.{name}.weight", (rows, width)
        if shape.experts:
            yield f"{prefix}mlp.gate.weight", (shape.experts, hidden)
        for mlp in [f"mlp.experts.{expert}" for expert in range(shape.experts)] or ["mlp"]:
            yield f"{prefix}{mlp}.gate_proj.weight", (shape.inner, hidden)
            yield f"{prefix}{mlp}.up_proj.weight", (shape.inner, hidden)
            yield f"{prefix}{mlp}.down_proj.weight", (hidden, shape.inner)


def _norms(shape: Size) -> Iterator[tuple[str, int]]:
    """Yield names of the scales of norms, and their widths."""
    yield "model.norm.weight", shape.hidden
    for number in range(shape.layers):
        prefix = f"model.layers.{number}."
        yield f"{prefix}input_layernorm.weight", shape.hidden
        yield f"{prefix}post_attention_layernorm.weight", shape.hidden
        if shape.experts:
            yield f"{prefix}self_attn.q_norm.weight", shape.head_dim
            yield f"{prefix}self_attn.k_norm.weight", shape.head_dim


def _write_config(folder: Path, size: str) -> None:
    shape = SIZES[size]
    config: dict[str, Any] = {
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": shape.tied,
    }
    if shape.experts:
        config |= {
            "architectures": ["Qwen3MoeForCausalLM"],
            "model_type": "qwen3_moe",
            "moe_intermediate_size": shape.inner,
            "num_experts": shape.experts,
            "num_experts_per_tok": 8,
            "norm_topk_prob": True,
        }
    (folder / "config.json").write_text(json.dumps(config))


def _write_tokenizer(path: Path) -> None:
    """Write a tokenizer of single bytes."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    alphabet = {char: number for number, char in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocab=alphabet, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(path))


def measure(checkpoint: Path, output: Path, precisions: str) -> tuple[float, float, str]:
    """Export a checkpoint; return peak memory in bytes, seconds, and the printed report."""
    program = "from llm_edge.exporter.cli import main; main()"
    arguments = [str(checkpoint), "-o", str(output), "--precision", precisions, "--force"]
    started = time.monotonic()
    with subprocess.Popen([sys.executable, "-c", program, *arguments], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        printed = process.stdout.read()
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(process.returncode)
    return usage.ru_maxrss * 1024, time.monotonic() - started, printed


def main() -> None:
    """Run the benchmark."""
    folder, *sizes = sys.argv[1:]
    for size in sizes or SIZES:
        checkpoint = make_checkpoint(Path(folder), size)
        peak, seconds, printed = measure(checkpoint, Path(folder) / f"{size}-bundle", SIZES[size].precisions)
        print(printed, flush=True)
        print(f"{size}: peak memory {peak / 1e9:.2f} GB, {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
