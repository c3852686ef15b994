"""Finds a learning rate by a range test: the loss of short steps while the learning rate rises (arXiv:1506.01186)."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llm_edge.finetune.distributed import Processes
from llm_edge.finetune.options import FinetuneOptions
from llm_edge.finetune.packing import Plan
from llm_edge.finetune.preparation import trained_parameters
from llm_edge.finetune.step import accumulate, make_optimizer, update
from llm_edge.model.decoder import Decoder
from llm_edge.runtime.errors import ParameterError

_LOWEST, _HIGHEST = 1e-6, 1e-1
TRIALS = 60
"""Maximum number of learning rates that are tried."""
_SMOOTHING = 0.8  # weight of the earlier losses in the moving average
_DIVERGED = 1.3  # times the lowest smoothed loss


@dataclass(frozen=True, slots=True)
class Trial:
    """A learning rate, the smoothed loss that was reached with it, and its number from 1."""

    number: int
    learning_rate: float
    loss: float


def find_learning_rate(
    decoder: Decoder, plan: Plan, options: FinetuneOptions, report: Callable[[Trial], None]
) -> tuple[float, list[Trial]]:
    """Train with a rising learning rate until the loss diverges, and suggest one. The decoder is changed.

    Returns:
        the learning rate at which the smoothed loss fell fastest, and all trials.

    Raises:
        ParameterError: the loss never fell.
    """
    parameters = trained_parameters(decoder)
    optimizer = make_optimizer(parameters, options)
    trials: list[Trial] = []
    average = 0.0
    for step in range(TRIALS):
        rate = _LOWEST * (_HIGHEST / _LOWEST) ** (step / (TRIALS - 1))
        loss = accumulate(decoder, plan.rows(step), options, Processes(), lambda: False)
        assert loss is not None
        if not math.isfinite(loss):
            break
        average = _SMOOTHING * average + (1 - _SMOOTHING) * loss
        trials.append(Trial(step + 1, rate, average / (1 - _SMOOTHING ** (step + 1))))
        report(trials[-1])
        if trials[-1].loss > _DIVERGED * min(trial.loss for trial in trials):
            break
        update(optimizer, parameters, rate, options.clip)
    return suggest(trials), trials


def suggest(trials: Sequence[Trial]) -> float:
    """Return the learning rate at which the loss falls fastest over the logarithm of the rate.

    Raises:
        ParameterError: the loss never fell.
    """
    lowest = min(range(len(trials)), key=lambda index: trials[index].loss) if trials else 0
    slopes = {index: trials[index + 1].loss - trials[index - 1].loss for index in range(1, lowest)}
    if not slopes or min(slopes.values()) >= 0:
        raise ParameterError("--find-lr: the loss did not fall at any learning rate: check the data")
    return trials[min(slopes, key=lambda index: slopes[index])].learning_rate
