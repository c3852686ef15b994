"""Shows a run's progress in the terminal, and plots its losses."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TextIO

from llm_edge.finetune.checkpoint_files import Progress
from llm_edge.finetune.data.problems import counted
from llm_edge.finetune.evaluation import Answer
from llm_edge.finetune.memory import peak_memory
from llm_edge.finetune.status_line import StatusLine
from llm_edge.finetune.training import Listener, Step

_FORECAST_STEPS = 3
_SHOWN = 160  # characters of a text
_BARS = "▁▂▃▄▅▆▇█"

Decode = Callable[[Sequence[int]], str]
"""Turns token ids into text."""


class Display(Listener):
    """Progress on stderr; see `StatusLine`."""

    def __init__(self, decode: Decode, device: str, stream: TextIO | None = None) -> None:
        self._decode = decode
        self._device = device
        self._line = StatusLine(stream)
        self._seen = 0
        self._seconds, self._tokens = 0.0, 0

    def on_step(self, step: Step) -> None:
        self._seen += 1
        self._seconds += step.seconds
        self._tokens += step.tokens
        left = (step.total - step.number) * self._seconds / self._seen
        line = (
            f"step {step.number}/{step.total}  loss {step.loss:.4f}  lr {step.learning_rate:.1e}  "
            f"{self._tokens / max(self._seconds, 1e-9):,.0f} tokens/s  {duration(left)} left"
        )
        self._line.update(line, at_once=step.number in (1, step.total))
        if self._seen == _FORECAST_STEPS and step.number < step.total:
            peak = peak_memory(self._device)
            used = f", peak memory {peak / 1e9:.1f} GB" if peak is not None else ""
            self.message(f"about {duration(left)} for the remaining {counted(step.total - step.number, 'step')}{used}")

    def on_evaluation(self, step: int, loss: float, best: bool, answers: Sequence[Answer]) -> None:
        when = "before training" if step == 0 else f"after step {step}"
        self.message(f"evaluation {when}: loss {loss:.4f}{' (best)' if best and step else ''}")
        for answer in answers:
            self.message(f"  question  {self._text(answer.prompt, end=True)}")
            self.message(f"  expected  {self._text(answer.expected)}")
            self.message(f"  answer    {self._text(answer.generated)}")

    def message(self, text: str) -> None:
        """Print a line."""
        self._line.message(text)

    def on_interruption(self) -> None:
        self.message("stopping: a checkpoint will be saved (Ctrl-C again to stop at once)")

    def _text(self, ids: Sequence[int], *, end: bool = False) -> str:
        text = repr(self._decode(ids))[1:-1]
        if len(text) <= _SHOWN:
            return text
        return f"…{text[-_SHOWN:]}" if end else f"{text[:_SHOWN]}…"


class TensorBoard(Listener):
    """Writes losses as TensorBoard events."""

    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder))

    def on_step(self, step: Step) -> None:
        for name, value in (("loss", step.loss), ("learning rate", step.learning_rate), ("norm", step.gradient_norm)):
            self._writer.add_scalar(f"train/{name}", value, step.number)

    def on_evaluation(self, step: int, loss: float, best: bool, answers: Sequence[Answer]) -> None:  # noqa: ARG002
        self._writer.add_scalar("evaluation/loss", loss, step)
        self._writer.flush()


class Listeners(Listener):
    """Calls several listeners."""

    def __init__(self, *listeners: Listener) -> None:
        self._listeners = listeners

    def on_step(self, step: Step) -> None:
        for listener in self._listeners:
            listener.on_step(step)

    def on_evaluation(self, step: int, loss: float, best: bool, answers: Sequence[Answer]) -> None:
        for listener in self._listeners:
            listener.on_evaluation(step, loss, best, answers)

    def on_interruption(self) -> None:
        for listener in self._listeners:
            listener.on_interruption()


def bar_plot(values: Sequence[float], width: int = 60) -> str:
    """Return a line of bars, one for the mean of each group of consecutive values."""
    if not values:
        return ""
    width = min(width, len(values))
    edges = [len(values) * index // width for index in range(width + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(_BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(_BARS[round((value - low) * scale)] for value in means)


def save_plot(path: Path, progress: Progress) -> bool:
    """Plot the losses of a run to a file; return False if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(range(1, len(progress.steps) + 1), [step["loss"] for step in progress.steps], label="training")
    found = progress.evaluations
    if found:
        axes.plot([each["step"] for each in found], [each["loss"] for each in found], marker="o", label="evaluation")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.legend()
    figure.savefig(path)
    return True


def duration(seconds: float) -> str:
    """Return a duration as minutes and seconds, from an hour on with hours."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
