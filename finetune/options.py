"""`FinetuneOptions`: every option of a training run, each with its command-line flag and help text."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any, get_args, get_type_hints

from typer import Option

from llm_edge.finetune.data.options import DataOptions


class Method(StrEnum):
    """Which weights are trained."""

    LORA = "lora"
    FULL = "full"


class Schedule(StrEnum):
    """How the learning rate changes after the warm-up."""

    COSINE = "cosine"
    CONSTANT = "constant"


class Precision(StrEnum):
    """Precision of the matrix products; trained weights and optimizer states are always float32."""

    FP32 = "fp32"
    BF16 = "bf16"


@dataclass(frozen=True, slots=True)
class FinetuneOptions(DataOptions):
    """Options of a training run.

    Each field is also an option of `llm-finetune`; its annotation holds the flag and the help text.
    """

    output: Annotated[
        Path | None, Option("--output", "-o", help="Folder to create. Default: artifacts/<name of the model>-tuned.")
    ] = None
    method: Annotated[
        Method, Option(help="lora: train low-rank adapters of all linear layers. full: train all weights.")
    ] = Method.LORA
    rank: Annotated[int, Option(min=1, max=4096, help="LoRA: rank of the adapters.")] = 32
    alpha: Annotated[
        float, Option(min=1e-3, help="LoRA: the adapters are scaled by alpha / sqrt(rank) (rank-stabilized).")
    ] = 16.0
    merge: Annotated[
        bool, Option("--merge/--no-merge", help="LoRA: also save the whole model with the adapters merged in float32.")
    ] = True
    export: Annotated[
        bool,
        Option(
            "--export",
            help="Export the trained model to int8 and int4, and compare the bundle with that of the model before "
            "training.",
        ),
    ] = False
    train_token: Annotated[
        list[str] | None,
        Option(
            help="LoRA: also train the embedding of this token, such as a new control token. May be repeated. Only the "
            "merged model is saved then, no adapter."
        ),
    ] = None
    learning_rate: Annotated[
        float | None, Option("--learning-rate", "--lr", min=0.0, help="Default: 2e-4 with LoRA, 2e-5 with full.")
    ] = None
    schedule: Annotated[Schedule, Option(help="Learning rate after the warm-up: cosine (to 0) or constant.")] = (
        Schedule.COSINE
    )
    warmup: Annotated[float, Option(min=0.0, max=1.0, help="Share of the steps with a rising learning rate.")] = 0.05
    weight_decay: Annotated[float, Option(min=0.0, help="Weight decay of AdamW, for matrices.")] = 0.01
    clip: Annotated[float, Option(min=0.0, help="Maximum norm of the gradient; 0 disables clipping.")] = 1.0
    epochs: Annotated[float, Option(min=0.0, help="How often the data is seen.")] = 3.0
    steps: Annotated[int | None, Option(min=1, help="Number of optimizer steps, in place of --epochs.")] = None
    batch_size: Annotated[int, Option(min=1, help="Conversations per optimizer step.")] = 16
    row_tokens: Annotated[
        int, Option(min=8, help="Tokens in memory at once: a step is split into packed rows of this size.")
    ] = 2048
    precision: Annotated[
        Precision, Option(help="fp32, or bf16 matrix products with fp32 master weights and optimizer states.")
    ] = Precision.FP32
    gradient_checkpointing: Annotated[
        bool,
        Option("--gradient-checkpointing", help="Recompute each layer in the backward pass: less memory, more time."),
    ] = False
    evaluate_every: Annotated[
        int | None, Option(min=1, help="Steps between evaluations. Default: ten evaluations per run.")
    ] = None
    patience: Annotated[
        int, Option(min=0, help="Stop after this many evaluations without improvement; 0 never stops early.")
    ] = 0
    sample_answers: Annotated[
        int, Option(min=0, help="Answers to questions of the evaluation data that are shown at each evaluation.")
    ] = 2
    save_every: Annotated[int | None, Option(min=1, help="Steps between checkpoints. Default: at evaluations.")] = None
    resume: Annotated[
        bool, Option("--resume", help="Continue the interrupted run in the output folder, with its options.")
    ] = False
    seed: Annotated[int, Option(min=0, help="Seed of the order of the data and of new weights.")] = 0
    device: Annotated[str | None, Option(help="cpu or cuda. Default: cuda if available.")] = None
    shard: Annotated[
        bool,
        Option(
            "--shard", help="Under torchrun: distribute the weights over the processes, for models that do not fit."
        ),
    ] = False
    threads: Annotated[int | None, Option(min=1, help="CPU threads. Default: one per core.")] = None
    tensorboard: Annotated[bool, Option("--tensorboard", help="Write TensorBoard events to the output folder.")] = False
    force: Annotated[bool, Option("--force", help="Start anew in an output folder that has an earlier run.")] = False

    @property
    def peak_learning_rate(self) -> float:
        """The learning rate after the warm-up."""
        if self.learning_rate is not None:
            return self.learning_rate
        return 2e-4 if self.method is Method.LORA else 2e-5


def with_stored(options: FinetuneOptions, stored: Mapping[str, Any], given: Collection[str]) -> FinetuneOptions:
    """Return options with those of an interrupted run, JSON values, except for the given ones."""
    hints = get_type_hints(FinetuneOptions)
    changes: dict[str, Any] = {}
    for name in {field.name for field in dataclasses.fields(options)} & stored.keys() - set(given):
        kinds = [kind for kind in (get_args(hints[name]) or (hints[name],)) if isinstance(kind, type)]
        convert = next((kind for kind in kinds if issubclass(kind, StrEnum | Path)), None)
        changes[name] = stored[name] if convert is None or stored[name] is None else convert(stored[name])
    return dataclasses.replace(options, **changes)
