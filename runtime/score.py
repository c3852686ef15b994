"""`Score`: the log-probabilities of a text's tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from llm_edge.runtime.backend.limits import PREFILL_CHUNK
from llm_edge.runtime.backend.session import Logits
from llm_edge.runtime.errors import LogitsError, ParameterError


@dataclass(frozen=True, slots=True)
class Score:
    """The log-probabilities of a text.

    Attributes:
        tokens: token ids of the text.
        logprobs: natural log-probabilities of all tokens but the first, each given the tokens before it.
    """

    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]

    @property
    def total(self) -> float:
        """Log-probability of the text after its first token."""
        return math.fsum(self.logprobs)

    @property
    def perplexity(self) -> float:
        """exp of the mean negative log-probability."""
        return math.exp(min(-self.total / len(self.logprobs), 700.0))


def scored(tokens: Sequence[int], step: Callable[[Sequence[int]], Logits]) -> Score:
    """Score a text; `step` computes the logits [n, V] of the next n tokens.

    Raises:
        ParameterError: fewer than two tokens.
        LogitsError: logits are not finite.
    """
    if len(tokens) < 2:
        raise ParameterError("the text has fewer than two tokens: nothing to score")
    found: list[float] = []
    for start in range(0, len(tokens) - 1, PREFILL_CHUNK):
        following = np.array(tokens[start + 1 : start + PREFILL_CHUNK + 1])
        logits = step(tokens[start : start + len(following)]).astype(np.float64)  # [n, V]
        logits -= logits.max(axis=1, keepdims=True)
        chosen = logits[np.arange(len(following)), following]
        found += (chosen - np.log(np.exp(logits).sum(axis=1))).tolist()
    if not all(map(math.isfinite, found)):
        raise LogitsError("the logits of this text are not finite: export the bundle again in a wider type")
    return Score(tuple(tokens), tuple(found))
