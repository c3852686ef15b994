"""Log-probabilities in the model's own distribution, before any sampling transform."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from llm_edge.runtime.sampling.parameter_spec import refused
from llm_edge.runtime.sampling.transforms import Row, keep_top_k, log_total


@dataclass(frozen=True, slots=True)
class TokenLogprob:
    """A token id, its natural log-probability, and those of the most probable ids in descending order."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


def log_probabilities(logits: Row, token: int, top: int) -> TokenLogprob:
    """The log-softmax of logits [V] at a token and at the `top` largest logits; lower ids first among equals.

    Raises:
        ParameterError: `logits` is not a vector, or has no logit for this token.
    """
    if logits.ndim != 1 or not 0 <= token < logits.size:
        raise refused("token", token, f"a token within logits of shape {logits.shape}")
    row = logits.astype(np.float32, copy=False)
    total = log_total(row)
    best = keep_top_k(row, top) if top > 0 else np.zeros(0, np.intp)
    best = best[np.argsort(-row[best], kind="stable")[:top]]
    return TokenLogprob(token, float(row[token]) - total, tuple((int(i), float(row[i]) - total) for i in best))
