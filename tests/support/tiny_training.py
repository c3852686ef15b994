"""A tiny training run on random samples, also as a process that kills itself at chosen points.

Usage: python tiny_training.py FOLDER SEED COUNT
Kills a run at COUNT random lines of the source, resumes each, and prints the digests of the final weights as JSON.

Usage: torchrun tiny_training.py FOLDER | torchrun tiny_training.py FOLDER shard
Trains in several processes, with all weights in each or with shards; with shards also resumed in the middle.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import random
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from training_data import samples

import llm_edge.finetune
from llm_edge.finetune.checkpoint_files import CheckpointFiles, Progress, remove_partial_files
from llm_edge.finetune.distributed import Processes, gather, processes, shard
from llm_edge.finetune.lora import add_lora
from llm_edge.finetune.options import FinetuneOptions
from llm_edge.finetune.packing import Plan
from llm_edge.finetune.training import Listener, Step, train
from llm_edge.model.config import LayerConfig, ModelConfig
from llm_edge.model.decoder import Decoder
from llm_edge.model.rope import Rope
from llm_edge.model.weights import source_rows

CONFIG = ModelConfig(
    vocab_size=331,
    hidden_size=32,
    intermediate_size=64,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=8,
    max_position_embeddings=128,
    layers=(LayerConfig(Rope(10_000.0, 8)),) * 2,
    norm_eps=1e-5,
    tie_word_embeddings=True,
)
OPTIONS = FinetuneOptions(steps=8, batch_size=6, row_tokens=80, learning_rate=1e-2, evaluate_every=3, sample_answers=0)


def tiny_decoder(*, lora: bool = False) -> Decoder:
    """A random decoder of `CONFIG`, with all weights or adapters to train."""
    torch.manual_seed(0)
    decoder = Decoder(CONFIG)
    if lora:
        parts = {"qkv": 3, "gate_up": 2}
        add_lora(decoder, lambda name: source_rows(CONFIG, name, parts.get(name.split(".")[-2], 1)), 4, 8.0, 0)
    return decoder


class SlowFiles(CheckpointFiles):
    """Checkpoints on a slow disk: a process that does not write is ahead of the one that does."""

    def _write(self, name: str, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
        time.sleep(0.3)
        super()._write(name, tensors, content)


def run(
    folder: Path,
    decoder: Decoder | None = None,
    *,
    listener: Listener | None = None,
    group: Processes | None = None,
    evaluation: int = 6,
    **options: Any,
) -> tuple[Decoder, Progress]:
    """Train on random samples; `options` replace those of `OPTIONS`."""
    decoder = decoder or tiny_decoder()
    chosen = dataclasses.replace(OPTIONS, **options)
    plan = Plan(samples(20), chosen.batch_size, chosen.row_tokens, chosen.seed)
    kind = SlowFiles if group is not None else CheckpointFiles
    files = kind(folder, {"learning_rate": chosen.learning_rate})
    held = samples(evaluation, seed=9)
    return decoder, train(decoder, plan, held, chosen, files, listener or Listener(), group or Processes())


def digest(decoder: Decoder) -> str:
    """SHA-256 of all weights."""
    found = hashlib.sha256()
    for _, parameter in decoder.named_parameters():
        found.update(parameter.detach().numpy().tobytes())
    return found.hexdigest()


class LineCounter:
    """Counts the lines of the package that are run, and kills the process at one of them."""

    def __init__(self, last: int | None = None) -> None:
        self.count = 0
        self._last = last
        self._package = str(Path(llm_edge.finetune.__file__).parent)

    def trace(self, frame: FrameType, event: str, _: Any) -> Any:
        if not frame.f_code.co_filename.startswith(self._package):
            return None
        if event == "line":
            self.count += 1
            if self.count == self._last:
                os.kill(os.getpid(), signal.SIGKILL)
        return self.trace


def killed_run(folder: Path, line: int) -> None:
    """Run in a forked process that is killed when it has run `line` lines."""
    child = os.fork()
    if child == 0:
        sys.settrace(LineCounter(line).trace)
        run(folder)
        os._exit(1)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), status


def train_together(folder: Path, group: Processes, *, sharded: bool) -> None:
    """Train in several processes."""
    if not sharded:
        run(folder, group=group)
        return
    decoder = tiny_decoder()
    first = shard(decoder, group, "cpu")
    with contextlib.suppress(KeyboardInterrupt):
        run(folder, decoder, group=first, listener=Stop(4), gradient_checkpointing=True)
    decoder = tiny_decoder()
    run(folder, decoder, group=shard(decoder, group, "cpu"), resume=True, sample_answers=1)
    gather(decoder)
    if group.is_first:
        save_file(dict(decoder.named_parameters()), folder / "gathered.safetensors")


class Stop(Listener):
    """Interrupts a run after a step."""

    def __init__(self, step: int) -> None:
        self._step = step

    def on_step(self, step: Step) -> None:
        if step.number == self._step:
            os.kill(os.getpid(), signal.SIGINT)


def main(arguments: Sequence[str]) -> None:
    """Print the digest of a whole run, and those of the resumed ones; or train in several processes."""
    torch.set_num_threads(1)
    if len(arguments) < 3:
        with processes("cpu") as group:
            train_together(Path(arguments[0]), group, sharded=len(arguments) == 2)
        return
    folder, seed, count = Path(arguments[0]), int(arguments[1]), int(arguments[2])
    counter = LineCounter()
    sys.settrace(counter.trace)
    whole = digest(run(folder / "whole")[0])
    sys.settrace(None)
    resumed = {}
    for line in sorted(random.Random(seed).sample(range(1, counter.count), count)):
        killed = folder / str(line)
        killed_run(killed, line)
        files = CheckpointFiles(killed, {})
        left = len(list(files.folder.glob(".*.partial")))
        remove_partial_files(files.folder)
        resumed[line] = digest(run(killed, resume=files.exists)[0])
        print(f"killed at line {line} of {counter.count}, {left} partial files", file=sys.stderr)
    print(json.dumps({"whole": whole, "resumed": resumed}))
    sys.exit(any(found != whole for found in resumed.values()))


if __name__ == "__main__":
    main(sys.argv[1:])
