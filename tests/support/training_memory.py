"""Measures the peak memory of a training step or of an evaluation, each in its own process; prints JSON.

Usage: python training_memory.py lora|full plain|checkpointing|evaluation …
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from llm_edge.finetune.data.sample import Sample
from llm_edge.finetune.distributed import Processes
from llm_edge.finetune.evaluation import evaluation_loss
from llm_edge.finetune.fused import fuse
from llm_edge.finetune.lora import add_lora
from llm_edge.finetune.memory import estimate
from llm_edge.finetune.options import FinetuneOptions
from llm_edge.finetune.preparation import trained_parameters
from llm_edge.finetune.step import accumulate, make_optimizer, update
from llm_edge.model.config import LayerConfig, ModelConfig
from llm_edge.model.decoder import Decoder
from llm_edge.model.rope import Rope
from llm_edge.model.weights import source_rows

CONFIG = ModelConfig(
    vocab_size=8192,
    hidden_size=256,
    intermediate_size=768,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=1024,
    layers=(LayerConfig(Rope(10_000.0, 64)),) * 8,
    norm_eps=1e-5,
    tie_word_embeddings=True,
)


def memory(kind: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:"))


def measure(method: str, mode: str, tokens: int = 1024) -> dict[str, int]:
    """Bytes used beyond the model, after three steps (the forecast of a run), and estimated before the first."""
    torch.manual_seed(0)
    decoder = Decoder(CONFIG)
    fuse(decoder)
    if method == "lora":
        parts = {"qkv": 3, "gate_up": 2}
        add_lora(decoder, lambda name: source_rows(CONFIG, name, parts.get(name.split(".")[-2], 1)), 8, 16.0, 0)
    options = FinetuneOptions(gradient_checkpointing=mode == "checkpointing")
    sample = Sample(
        tuple(i % 8000 for i in range(tokens + 1)), (False,) * (tokens // 2) + (True,) * (tokens // 2 + 1), 1
    )
    short = Sample(sample.ids[:9], (False,) * 8 + (True,), 1)
    parameters = trained_parameters(decoder)
    accumulate(decoder, [[short]], options, Processes(), lambda: False)  # libraries allocate their buffers
    decoder.zero_grad()
    expected = estimate(decoder, tokens, checkpointing=options.gradient_checkpointing)
    optimizer = make_optimizer(parameters, options)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = memory("VmRSS")
    if mode == "evaluation":
        evaluation_loss(decoder, [sample], tokens, Processes())
        return {"used": memory("VmHWM") - before}
    after = []
    for _ in range(6):
        accumulate(decoder, [[sample]], options, Processes(), lambda: False)
        update(optimizer, parameters, 1e-4, 1.0)
        after.append(memory("VmHWM") - before)
    return {"used": after[-1], "forecast": after[2], "estimate": expected.total}


def forked(method: str, mode: str) -> dict[str, int]:
    """Measure in a process of its own."""
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, json.dumps(measure(method, mode)).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        found: dict[str, int] = json.load(file)
    os.wait()
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({mode: forked(sys.argv[1], mode) for mode in sys.argv[2:]}))
