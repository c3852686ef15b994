"""Measures peak memory and time of exports: `python -m llm_edge.bench.export_memory FOLDER [SIZE …]`.

Creates random sharded bfloat16 checkpoints with the shapes of LLaMA, and of Qwen2.5 at 1.5B (a 7B takes 14 GB of
disk), exports each in a separate process, and prints one line per size. Existing checkpoints are reused.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Size:
    """Shape of a model, and the precisions to export."""

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    vocab: int = 32_000
    tied: bool = False
    precisions: str = "int4"


SIZES = {
    "1b": Size(2048, 8192, 16, 32, 8),
    "1.5b": Size(1536, 8960, 28, 12, 2, vocab=151_936, tied=True, precisions="int8,int4"),
    "3b": Size(3072, 8192, 28, 24, 8),
    "7b": Size(4096, 11008, 32, 32, 32),
}
_SHARD_BYTES = 2 << 30


def make_checkpoint(folder: Path, size: str) -> Path:
    """Write a random checkpoint of a size with one shard in memory at a time."""
    import torch
    from safetensors.torch import save_file

    shape = SIZES[size]
    hidden, inner, layers, heads = shape.hidden, shape.inner, shape.layers, shape.heads
    target = folder / size
    if (target / "model.safetensors.index.json").exists():
        return target
    target.mkdir(parents=True, exist_ok=True)
    head_dim = hidden // heads
    shapes = {"model.embed_tokens.weight": (shape.vocab, hidden)}
    if not shape.tied:
        shapes["lm_head.weight"] = (shape.vocab, hidden)
    for number in range(layers):
        prefix = f"model.layers.{number}."
        for name, rows, width in (
            ("self_attn.q_proj", heads * head_dim, hidden),
            ("self_attn.k_proj", shape.kv_heads * head_dim, hidden),
            ("self_attn.v_proj", shape.kv_heads * head_dim, hidden),
            ("self_attn.o_proj", hidden, heads * head_dim),
            ("mlp.gate_proj", inner, hidden),
            ("mlp.up_proj", inner, hidden),
            ("mlp.down_proj", hidden, inner),
        ):
            shapes[f"{prefix}{name}.weight"] = (rows, width)
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

    for name, (rows, width) in shapes.items():
        shard[name] = torch.randn(rows, width, generator=generator, dtype=torch.bfloat16) * width**-0.5
        shard_bytes += shard[name].nbytes
        if shard_bytes >= _SHARD_BYTES:
            write()
    norms = ["model.norm", *(f"model.layers.{i}.{n}_layernorm" for i in range(layers) for n in _NORMS)]
    shard.update({f"{name}.weight": torch.ones(hidden, dtype=torch.bfloat16) for name in norms})
    write()
    (target / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))
    _write_config(target, size)
    _write_tokenizer(target / "tokenizer.json")
    return target


def _write_config(folder: Path, size: str) -> None:
    shape = SIZES[size]
    config = {
        "model_type": "llama",
        "vocab_size": shape.vocab,
        "hidden_size": shape.hidden,
        "intermediate_size": shape.inner,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10_000.0,
        "tie_word_embeddings": shape.tied,
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


_NORMS = ("input", "post_attention")


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
