"""The training loop."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from llm_edge.finetune.checkpoint_files import CheckpointFiles, Progress
from llm_edge.finetune.data.sample import Sample
from llm_edge.finetune.distributed import Processes, reshard
from llm_edge.finetune.evaluation import Answer, answer, evaluation_loss
from llm_edge.finetune.options import FinetuneOptions
from llm_edge.finetune.packing import Plan
from llm_edge.finetune.preparation import trained_parameters
from llm_edge.finetune.schedule import learning_rate_factor
from llm_edge.finetune.step import accumulate, autocast, check_finite, make_optimizer, update
from llm_edge.model.decoder import Decoder

_EVALUATIONS = 10  # per run by default


@dataclass(frozen=True, slots=True)
class Step:
    """What a finished step reports: its number from 1, of `total`, mean loss, tokens and seconds."""

    number: int
    total: int
    loss: float
    learning_rate: float
    gradient_norm: float
    tokens: int
    seconds: float


class Listener:
    """Is called as a run proceeds; this one ignores everything."""

    def on_step(self, step: Step) -> None:
        """A step is finished."""

    def on_evaluation(self, step: int, loss: float, best: bool, answers: Sequence[Answer]) -> None:
        """The evaluation after a step is finished; step 0 is before training."""

    def on_interruption(self) -> None:
        """Ctrl-C or SIGTERM arrived: the run will end after this step, or this evaluation."""


def total_steps(plan: Plan, options: FinetuneOptions) -> int:
    """Return the number of optimizer steps of a run."""
    return options.steps or max(1, math.ceil(options.epochs * plan.steps_per_epoch))


def train(
    decoder: Decoder,
    plan: Plan,
    evaluation: Sequence[Sample],
    options: FinetuneOptions,
    files: CheckpointFiles,
    listener: Listener,
    processes: Processes,
) -> Progress:
    """Train until the last step, an early stop, or an interruption; the decoder then has the best weights.

    Raises:
        KeyboardInterrupt: the run was interrupted, and a complete checkpoint is saved.
        MachineError: a checkpoint cannot be written; the previous one is intact.
        ParameterError: the loss is no longer finite.
    """
    parameters = trained_parameters(decoder)
    optimizer = make_optimizer(parameters, options)
    progress = files.load(parameters, optimizer) if options.resume else Progress()
    run = _Run(decoder, plan, evaluation, options, files, listener, processes, parameters, optimizer, progress)
    total = total_steps(plan, options)
    evaluate_every = options.evaluate_every or max(1, total // _EVALUATIONS)
    save_every = options.save_every or evaluate_every
    with interruptions(listener.on_interruption) as interrupted:
        if progress.step == 0 and not progress.evaluations:
            run.evaluate()
            run.save()
        while progress.step < total and not progress.stopped:
            finished = run.step(total, interrupted)
            if not finished or processes.any(interrupted()):
                run.save()
                raise KeyboardInterrupt
            if progress.step == total or progress.step % evaluate_every == 0:
                run.evaluate()
            if progress.step == total or progress.step % save_every == 0 or progress.stopped:
                run.save()
    if progress.best_loss is not None and progress.best_step != progress.step:
        files.load_best(parameters)
    return progress


@dataclass
class _Run:
    """The parts of a run, and what happens in each round of the loop."""

    decoder: Decoder
    plan: Plan
    evaluation: Sequence[Sample]
    options: FinetuneOptions
    files: CheckpointFiles
    listener: Listener
    processes: Processes
    parameters: dict[str, nn.Parameter]
    optimizer: torch.optim.Optimizer
    progress: Progress

    def step(self, total: int, interrupted: Callable[[], bool]) -> bool:
        """Take the next optimizer step; return False if it was interrupted, which changes nothing."""
        started, number, options = time.monotonic(), self.progress.step, self.options
        rate = options.peak_learning_rate * learning_rate_factor(number, total, options.warmup, options.schedule)
        rows = self.plan.rows(number)
        # Several processes must not leave a step at different rows: they are asked after it.
        leave = interrupted if self.processes.count == 1 else lambda: False
        loss = accumulate(self.decoder, rows, options, self.processes, leave)
        if loss is None:
            return False
        norm = update(self.optimizer, self.parameters, rate, options.clip)
        check_finite(loss, norm, number + 1, rate)
        self.progress.step += 1
        self.progress.steps.append({"loss": loss, "learning_rate": rate, "norm": norm})
        tokens = sum(len(sample.ids) - 1 for row in rows for sample in row)
        self.listener.on_step(Step(number + 1, total, loss, rate, norm, tokens, time.monotonic() - started))
        return True

    def evaluate(self) -> None:
        """Measure the evaluation loss, keep the weights if they are the best so far, and answer some questions."""
        if not self.evaluation:
            return
        progress = self.progress
        with autocast(self.decoder, self.options.precision):
            loss = evaluation_loss(self.decoder, self.evaluation, self.plan.tokens, self.processes)
            answering = self.processes.is_first or self.processes.sharded
            shown = self.evaluation[: self.options.sample_answers] if answering else []
            answers = [answer(self.decoder, sample) for sample in shown]
        reshard(self.decoder)
        best = progress.best_loss is None or loss < progress.best_loss
        progress.evaluations.append({"step": progress.step, "loss": loss})
        progress.stale = 0 if best else progress.stale + 1
        if best:
            progress.best_loss, progress.best_step = loss, progress.step
            if self.processes.is_first or self.processes.sharded:
                self.files.save_best(self.parameters, write=self.processes.is_first)
        progress.stopped = 0 < self.options.patience <= progress.stale
        self.listener.on_evaluation(progress.step, loss, best, answers)

    def save(self) -> None:
        """Write a complete checkpoint; no process returns before it is written."""
        if self.processes.is_first or self.processes.sharded:
            self.files.save(self.progress, self.parameters, self.optimizer, write=self.processes.is_first)
        self.processes.wait()  # torchrun ends all processes as soon as one leaves


@contextlib.contextmanager
def interruptions(report: Callable[[], None]) -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether Ctrl-C or SIGTERM arrived; a second one interrupts at once.

    `report` is called when the first one arrives.
    """
    arrived: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if arrived:
            signal.default_int_handler(number, frame)
        arrived.append(number)
        with contextlib.suppress(OSError, RuntimeError):  # a closed terminal; within another write to the same stream
            report()

    before: dict[int, Any] = {}
    with contextlib.suppress(ValueError):  # not in the main thread, where no signal arrives
        for number in (int(signal.SIGINT), int(signal.SIGTERM)):
            before[number] = signal.signal(number, handle)
    try:
        yield lambda: bool(arrived)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
