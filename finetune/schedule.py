"""The learning rate of each step."""

from __future__ import annotations

import math

from llm_edge.finetune.options import Schedule


def learning_rate_factor(step: int, total: int, warmup: float, schedule: Schedule) -> float:
    """Return the factor of the learning rate in a step, counted from 0, of a run of `total` steps.

    It rises linearly over the share `warmup` of the steps, then stays at 1 or falls to 0 along a cosine.
    """
    rising = round(warmup * total)
    if step < rising:
        return (step + 1) / (rising + 1)
    if schedule is Schedule.CONSTANT:
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, total - rising)))
