"""Measures the peak memory of a training step or of an evaluation, each in its own process; prints JSON.

Usage: python training_memory.py MODEL-METHOD-PRECISION-MODE …, such as llama-lora-fp32-checkpointing
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from pathlib import Path

import torch

from llm_edge.finetune.data.sample import Sample
from llm_edge.finetune.distributed import Processes
from llm_edge.finetune.evaluation import evaluation_loss
from llm_edge.finetune.fused import fuse
from llm_edge.finetune.lora import add_lora, lora_layers
from llm_edge.finetune.memory import estimate, return_freed_memory
from llm_edge.finetune.options import FinetuneOptions, Precision
from llm_edge.finetune.preparation import trained_parameters
from llm_edge.finetune.step import accumulate, make_optimizer, update
from llm_edge.model.config import Activation, LayerConfig, ModelConfig, QKNorm
from llm_edge.model.decoder import Decoder
from llm_edge.model.rope import Rope
from llm_edge.model.weights import source_rows

LLAMA = ModelConfig(
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
GEMMA = dataclasses.replace(
    LLAMA,
    num_key_value_heads=1,
    layers=(LayerConfig(Rope(10_000.0, 64), 256),) * 6 + (LayerConfig(Rope(1e6, 64)),) * 2,
    post_norm=True,
    qk_norm=QKNorm.HEAD,
    activation=Activation.GELU_TANH,
    embedding_scale=16.0,
)


def memory(kind: str) -> int:
    """VmRSS or VmHWM of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{kind}:"))


def prepared(config: ModelConfig, method: str, precision: Precision) -> Decoder:
    """A random decoder, as a run prepares it."""
    torch.manual_seed(0)
    decoder = Decoder(config)
    fuse(decoder)
    if method == "lora":
        parts = {"qkv": 3, "gate_up": 2}
        add_lora(decoder, lambda name: source_rows(config, name, parts.get(name.split(".")[-2], 1)), 8, 16.0, 0)
        for _, module in lora_layers(decoder) if precision is Precision.BF16 else ():
            module.weight.data = module.weight.data.bfloat16()
    return decoder


def measure(case: str, tokens: int = 1024) -> dict[str, int]:
    """Bytes estimated before the first step, and used beyond the model in two steps of two rows."""
    model, method, kind, mode = case.split("-")
    precision = Precision(kind)
    decoder = prepared(LLAMA if model == "llama" else GEMMA, method, precision)
    options = FinetuneOptions(gradient_checkpointing=mode == "checkpointing", precision=precision)
    sample = Sample(
        tuple(i % 8000 for i in range(tokens + 1)), (False,) * (tokens // 8) + (True,) * (tokens - tokens // 8 + 1), 1
    )
    parameters = trained_parameters(decoder)
    optimizer = make_optimizer(parameters, options)
    expected = estimate(decoder, tokens, checkpointing=options.gradient_checkpointing, precision=precision)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = memory("VmRSS")
    if mode == "evaluation":
        evaluation_loss(decoder, [sample], tokens, Processes())
        return {"used": memory("VmHWM") - before}
    for _ in range(2):
        accumulate(decoder, [[sample], [sample]], options, Processes(), lambda: False)
        update(optimizer, parameters, 1e-4, 1.0)
    return {"used": memory("VmHWM") - before, "estimate": expected.total}


def forked(case: str) -> dict[str, int]:
    """Measure in a process of its own."""
    read, write = os.pipe()
    if os.fork() == 0:
        os.write(write, json.dumps(measure(case)).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as file:
        found: dict[str, int] = json.load(file)
    os.wait()
    return found


if __name__ == "__main__":
    return_freed_memory()  # as a run does
    torch.set_num_threads(1)
    print(json.dumps({case: forked(case) for case in sys.argv[1:]}))
