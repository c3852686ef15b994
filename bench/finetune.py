"""Compares training steps with transformers' Trainer and peft: tokens per second and peak memory.

Both train the same LoRA adapters of the same model on the same conversations, each in its own process. Tokens are
counted without padding.

    python -m llm_edge.bench.finetune [--model smollm2] [--tokens 256] [--variation 0.5] [--precision fp32]
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

RANK, ALPHA, BATCH, STEPS = 32, 16.0, 8, 6


def conversations(count: int, tokens: int, variation: float, vocabulary: int) -> list[tuple[list[int], int]]:
    """Random token ids with the length of their question: half of the ids, which are not trained."""
    chosen = random.Random(0)  # noqa: S311 (not for cryptography)
    made = []
    for _ in range(count):
        length = round(tokens * chosen.uniform(1 - variation, 1 + variation))
        made.append(([chosen.randrange(100, vocabulary) for _ in range(length)], length // 2))
    return made


def run_ours(folder: Path, data: list[tuple[list[int], int]], precision: str, rows: int) -> list[tuple[int, float]]:
    """Train with this project; returns tokens and seconds of each step."""
    from llm_edge.checkpoint.source import SourceOptions, open_checkpoint
    from llm_edge.finetune.checkpoint_files import CheckpointFiles
    from llm_edge.finetune.data.sample import Sample
    from llm_edge.finetune.distributed import Processes
    from llm_edge.finetune.options import FinetuneOptions, Precision
    from llm_edge.finetune.packing import Plan
    from llm_edge.finetune.preparation import prepare
    from llm_edge.finetune.training import Listener, Step, train

    options = FinetuneOptions(
        rank=RANK, alpha=ALPHA, steps=STEPS, batch_size=BATCH, row_tokens=rows, precision=Precision(precision)
    )
    checkpoint = open_checkpoint(str(folder), SourceOptions(), lambda _: None)
    samples = [Sample(tuple(ids), tuple(at >= start for at in range(len(ids))), 1) for ids, start in data]
    measured = []

    class Recorder(Listener):
        def on_step(self, step: Step) -> None:
            measured.append((step.tokens, step.seconds))

    plan = Plan(samples, BATCH, rows, 0)
    files = CheckpointFiles(folder.parent / "ours", {})
    train(prepare(checkpoint, options, "cpu"), plan, [], options, files, Recorder(), Processes())
    return measured


def run_trainer(folder: Path, data: list[tuple[list[int], int]], precision: str, rows: int) -> list[tuple[int, float]]:
    """Train with transformers' Trainer and peft; returns tokens and seconds of each step."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

    model = get_peft_model(
        AutoModelForCausalLM.from_pretrained(folder),
        LoraConfig(r=RANK, lora_alpha=int(ALPHA), use_rslora=True, target_modules="all-linear", task_type="CAUSAL_LM"),
    )
    tokens: list[int] = []

    def collate(batch: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        width = max(len(item["ids"]) for item in batch)
        tokens.append(sum(len(item["ids"]) - 1 for item in batch))
        padded = [item["ids"] + [0] * (width - len(item["ids"])) for item in batch]
        mask = [[1] * len(item["ids"]) + [0] * (width - len(item["ids"])) for item in batch]
        labels = [
            [-100] * item["start"] + item["ids"][item["start"] :] + [-100] * (width - len(item["ids"]))
            for item in batch
        ]
        names = ("input_ids", "attention_mask", "labels")
        return {name: torch.tensor(value) for name, value in zip(names, (padded, mask, labels), strict=True)}

    seconds: list[float] = []

    class Recorder(TrainerCallback):
        def on_step_begin(self, *_: Any, **__: Any) -> None:
            self.started = time.monotonic()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            seconds.append(time.monotonic() - self.started)

    per_row = max(1, rows // max(len(ids) for ids, _ in data))  # conversations in memory at once, as in our rows
    size = next(size for size in range(min(per_row, BATCH), 0, -1) if BATCH % size == 0)
    arguments = TrainingArguments(
        output_dir=str(folder.parent / "trainer"),
        per_device_train_batch_size=size,
        gradient_accumulation_steps=BATCH // size,
        max_steps=STEPS,
        learning_rate=2e-4,
        bf16=precision == "bf16",
        use_cpu=True,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    items = [{"ids": ids, "start": start} for ids, start in data]
    Trainer(model, arguments, train_dataset=items, data_collator=collate, callbacks=[Recorder()]).train()
    each = BATCH // size
    return [(sum(tokens[index * each : (index + 1) * each]), seconds[index]) for index in range(len(seconds))]


def measure(engine: str, folder: Path, arguments: argparse.Namespace) -> dict[str, float]:
    """Run an engine in its own process."""
    command = [sys.executable, "-m", "llm_edge.bench.finetune", "--engine", engine, "--model", str(folder)]
    for name in ("tokens", "variation", "precision", "rows"):
        command += [f"--{name}", str(getattr(arguments, name))]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def worker(arguments: argparse.Namespace) -> None:
    """Train with one engine and print what was measured."""
    import resource

    folder = Path(arguments.model)
    config = json.loads((folder / "config.json").read_text())
    data = conversations(BATCH * STEPS, arguments.tokens, arguments.variation, config["vocab_size"])
    engine = run_ours if arguments.engine == "ours" else run_trainer
    steps = engine(folder, data, arguments.precision, arguments.rows)[1:]  # the first step allocates
    best = max(tokens / seconds for tokens, seconds in steps)
    mean = sum(tokens for tokens, _ in steps) / sum(seconds for _, seconds in steps)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6
    print(json.dumps({"tokens_per_second": round(mean, 1), "best": round(best, 1), "peak_mb": round(peak)}))


def as_folder(model: str, folder: Path) -> Path:
    """Save a checkpoint as a Hugging Face folder, which both engines read."""
    from llm_edge.checkpoint.source import SourceOptions, open_checkpoint
    from llm_edge.finetune.options import FinetuneOptions
    from llm_edge.finetune.preparation import prepare
    from llm_edge.finetune.saving import save_model

    options = SourceOptions()
    checkpoint = open_checkpoint(model, options, lambda _: None)
    save_model(folder, prepare(checkpoint, FinetuneOptions(), "cpu"), checkpoint, options.state_dict, Path(model))
    return folder


def main() -> None:
    """Compare both engines and print a table, and the figures as JSON in the last line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--tokens", type=int, default=256, help="mean tokens of a conversation")
    parser.add_argument("--variation", type=float, default=0.5, help="lengths differ by this share from the mean")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--rows", type=int, default=1024, help="tokens in memory at once")
    parser.add_argument("--engine", choices=("ours", "trainer"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.engine:
        worker(arguments)
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = as_folder(arguments.model, Path(temporary) / "model")
        found = {engine: measure(engine, folder, arguments) for engine in ("trainer", "ours")}
    for engine, row in found.items():
        print(f"{engine:>8}  {row['tokens_per_second']:8.1f} tokens/s  {row['peak_mb']:8.0f} MB")
    speed = found["ours"]["tokens_per_second"] / found["trainer"]["tokens_per_second"]
    memory = found["ours"]["peak_mb"] / found["trainer"]["peak_mb"]
    print(f"{'ratio':>8}  {speed:8.2f}           {memory:8.2f}")
    print(json.dumps({**found, "speed": round(speed, 2), "memory": round(memory, 2)}))


if __name__ == "__main__":
    main()
