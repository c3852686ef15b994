"""Text embeddings: pools the hidden states of a text's tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from llm_edge.runtime.backend.limits import PREFILL_CHUNK
from llm_edge.runtime.backend.session import HiddenStates
from llm_edge.runtime.errors import LogitsError, ParameterError

POOLINGS = ("mean", "last", "none")


def check_pooling(pooling: str) -> None:
    """Raise ParameterError for an unknown pooling."""
    if pooling not in POOLINGS:
        raise ParameterError(f"pooling is {pooling!r}; use one of {', '.join(POOLINGS)}")


def pooled(
    tokens: Sequence[int], step: Callable[[Sequence[int], int], HiddenStates], pooling: str, *, normalize: bool
) -> HiddenStates:
    """Pool the hidden states of a text as `Model.embed` describes.

    `step` computes the hidden states [n, H] of the last n of the next tokens; 0 = all.

    Raises:
        LogitsError: hidden states are not finite.
    """
    check_pooling(pooling)
    found: list[HiddenStates] = []
    total = np.zeros(1)
    for start in range(0, len(tokens), PREFILL_CHUNK):
        states = step(tokens[start : start + PREFILL_CHUNK], 1 if pooling == "last" else 0)
        if pooling == "mean":
            total = total + states.sum(axis=0, dtype=np.float64)
        else:
            found = [states] if pooling == "last" else [*found, states]
    result = total / len(tokens) if pooling == "mean" else np.concatenate(found).astype(np.float64)
    if not np.isfinite(result).all():
        raise LogitsError("the hidden states of this text are not finite: export the bundle again in a wider type")
    if pooling == "last":
        result = result[0]
    if normalize:
        length = np.linalg.norm(result, axis=-1, keepdims=True)
        result = result / np.where(length, length, 1)
    return result.astype(np.float32)
