"""The training loop."""

from __future__ import annotations

import contextlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from llm_edge.finetune.checkpoint_files import CheckpointFiles, Progress
from llm_edge.finetune.data.sample import Sample
from llm_edge.finetune.distributed import Processes
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
    parameters, total = trained_parameters(decoder), total_steps(plan, options)
    optimizer = make_optimizer(parameters, options)
    progress = files.load(parameters, optimizer) if options.resume else Progress()
    evaluate_every = options.evaluate_every or max(1, total // _EVALUATIONS)
    save_every = options.save_every or evaluate_every

    def evaluate() -> None:
        with autocast(decoder, options.precision):
            loss = evaluation_loss(decoder, evaluation, plan.tokens, processes)
            shown = evaluation[: options.sample_answers] if processes.is_first else []
            answers = [answer(decoder, sample) for sample in shown]
        best = progress.best_loss is None or loss < progress.best_loss
        progress.evaluations.append({"step": progress.step, "loss": loss})
        progress.stale = 0 if best else progress.stale + 1
        if best:
            progress.best_loss, progress.best_step = loss, progress.step
            if processes.is_first:
                files.save_best(parameters)
        progress.stopped = 0 < options.patience <= progress.stale
        listener.on_evaluation(progress.step, loss, best, answers)

    def save() -> None:
        if processes.is_first:
            files.save(progress, parameters, optimizer)

    with interruptions() as interrupted:
        if progress.step == 0 and evaluation and not progress.evaluations:
            evaluate()
            save()
        while progress.step < total and not progress.stopped:
            factor = learning_rate_factor(progress.step, total, options.warmup, options.schedule)
            rate = options.peak_learning_rate * factor
            started = time.monotonic()
            rows = plan.rows(progress.step)
            alone = processes.count == 1
            loss = accumulate(decoder, rows, options, processes, interrupted if alone else lambda: False)
            if loss is not None:
                norm = update(optimizer, parameters, rate, options.clip)
                progress.step += 1
                check_finite(loss, norm, progress.step, rate)
                progress.steps.append({"loss": loss, "learning_rate": rate, "norm": norm})
                tokens = sum(len(sample.ids) - 1 for row in rows for sample in row)
                seconds = time.monotonic() - started
                listener.on_step(Step(progress.step, total, loss, rate, norm, tokens, seconds))
            if loss is None or processes.any(interrupted()):
                save()
                raise KeyboardInterrupt
            due = progress.step == total or progress.step % evaluate_every == 0
            if due and evaluation:
                evaluate()
            if progress.step == total or progress.step % save_every == 0 or progress.stopped:
                save()
    if progress.best_loss is not None and progress.best_step != progress.step:
        files.load_best(parameters)
    return progress


@contextlib.contextmanager
def interruptions() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether Ctrl-C or SIGTERM arrived; a second one interrupts at once."""
    arrived: list[int] = []

    def handle(number: int, frame: Any) -> None:
        if arrived:
            signal.default_int_handler(number, frame)
        arrived.append(number)

    before: dict[int, Any] = {}
    with contextlib.suppress(ValueError):  # not in the main thread, where no signal arrives
        for number in (int(signal.SIGINT), int(signal.SIGTERM)):
            before[number] = signal.signal(number, handle)
    try:
        yield lambda: bool(arrived)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
