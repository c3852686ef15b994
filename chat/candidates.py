"""`candidates`: the alternatives to a token of an answer, and what the sampling parameters make of each.

A token record holds only the most probable tokens. The rest, whose total probability is known, is modeled as equally
probable tokens, each slightly less probable than the least probable one of the record: for the rest the result is an
estimate, for the tokens of the record it is exact, because the sampler itself computes it.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from llm_edge.runtime.sampling.logprobs import TokenLogprob
from llm_edge.runtime.sampling.params import GREEDY_BELOW, PARAMETERS, SamplingParams
from llm_edge.runtime.sampling.sampler import Sampler
from llm_edge.runtime.sampling.transforms import FILTERS, Row, log_total

_MAX_REST = 1 << 18  # tokens; larger than any vocabulary
_NOTHING = 1e-6  # a smaller rest is rounding
_ROUNDING = 1e-3  # how far above 0 rounding may put a log-probability


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token that could have been drawn."""

    token: int | None  # None = all tokens that the record does not hold
    before: float  # its probability in the model's distribution
    after: float  # its probability of being drawn with the parameters; 0 = it is dropped
    cut: str  # name of the parameter that drops it, or "greedy"; "" = it is kept
    drawn: bool  # whether it is the token that was drawn


def candidates(record: TokenLogprob, params: SamplingParams) -> list[Candidate]:
    """The tokens of a record after temperature and filters, the most probable first, the rest last.

    Penalties and Mirostat depend on the preceding tokens, which a record does not hold, and are left out; so is XTC,
    which is random. A record without alternatives has no candidates.
    """
    logprobs = {token: value for token, value in record.top if -math.inf < value <= _ROUNDING}
    if not logprobs:
        return []
    least = min(logprobs.values())
    logprobs.setdefault(record.token, min(record.logprob, 0.0) if record.logprob == record.logprob else -math.inf)
    tokens = sorted(logprobs, key=lambda token: -logprobs[token])
    known = np.array([logprobs[token] for token in tokens], np.float32)
    row = np.concatenate([known, _rest(known, least)])
    after, cuts = _filtered(row, params)
    found = [
        Candidate(token, math.exp(logprobs[token]), float(after[place]), cuts[place], token == record.token)
        for place, token in enumerate(tokens)
    ]
    if row.size > known.size:
        rest = slice(known.size, None)
        total = float(after[rest].sum())
        cut = "" if total else cuts[known.size]
        found.append(Candidate(None, float(np.exp(row[rest], dtype=np.float64).sum()), total, cut, drawn=False))
    return found


def _filtered(row: Row, params: SamplingParams) -> tuple[NDArray[np.float64], list[str]]:
    """The probability of each position, and the filter that drops it."""
    if params.temperature < GREEDY_BELOW:
        return np.eye(1, row.size)[0], ["", *["greedy"] * (row.size - 1)]
    current = SamplingParams(temperature=params.temperature, max_tokens=1)
    cuts = [""] * row.size
    after = _probabilities(row, current)
    used = [name for name, spec in PARAMETERS.items() if name in FILTERS and getattr(params, name) != spec.default]
    for name in used:
        current = replace(current, **{name: getattr(params, name)})
        left = _probabilities(row, current)
        cuts = [name if had and not has else cut for cut, had, has in zip(cuts, after, left, strict=True)]
        after = left
    return after, cuts


def _rest(known: Row, least: float) -> Row:
    """Log-probabilities of the tokens that the record does not hold, each below `least`."""
    total = 1.0 - float(np.exp(known, dtype=np.float64).sum())
    if total < _NOTHING:
        return np.zeros(0, np.float32)
    count = min(math.floor(total / max(math.exp(least), _NOTHING / _MAX_REST)) + 1, _MAX_REST)
    return np.full(count, math.log(total / count), np.float32)


def _probabilities(row: Row, params: SamplingParams) -> NDArray[np.float64]:
    """The probability of each position to be drawn; 0 if it is dropped."""
    ids, left = Sampler(params, ()).candidates(row)
    out = np.zeros(row.size, np.float64)
    out[slice(None) if ids is None else ids] = np.exp(left.astype(np.float64) - log_total(left))
    return out
