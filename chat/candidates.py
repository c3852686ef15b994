"""What the parameters of drawing make of one token's runners-up, as far as a record knows them. Knows no widgets.

A record holds the most probable tokens and no others. The rest, whose total is known, is taken as equal parts, each
a little less probable than the least probable token of the record: what a filter does to them is an estimate, what it
does to the tokens of the record is what the sampler would do, for it is the sampler that does it here.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from llm_edge.runtime.sampling.logprobs import TokenLogprob
from llm_edge.runtime.sampling.params import GREEDY_BELOW, SamplingParams
from llm_edge.runtime.sampling.sampler import Sampler
from llm_edge.runtime.sampling.transforms import Row, log_total

_MOST_PARTS = 1 << 18  # no vocabulary has more tokens
_NOTHING = 1e-6  # a rest of less is rounding
_ROUNDING = 1e-3  # a log-probability may be so much above 0
# In the order in which the sampler applies them; each beside the parameters that come before it.
_FILTERS = ("top_k", "top_p", "min_p")


@dataclass(frozen=True, slots=True)
class Candidate:
    """A token that could have come.

    Attributes:
        token: its id; None = all that the record does not hold.
        before: its probability in the model's own distribution.
        after: its probability of being drawn by these parameters; 0 where it is cut away.
        cut: what cuts it away: "greedy", "top_k", "top_p", "min_p"; "" = it stays.
        drawn: whether it is the one that came.
    """

    token: int | None
    before: float
    after: float
    cut: str
    drawn: bool


def candidates(record: TokenLogprob, params: SamplingParams) -> list[Candidate]:
    """The tokens of a record, the most probable first, the rest last, as the parameters leave them.

    They are temperature, top-k, top-p and min-p. Penalties, and what else looks at the tokens before, are left out: a
    record does not know them. Nothing is known of a record without runners-up, so nothing comes of it.
    """
    logprobs = {token: value for token, value in record.top if -math.inf < value <= _ROUNDING}
    if not logprobs:
        return []
    least = min(logprobs.values())
    logprobs.setdefault(record.token, min(record.logprob, 0.0) if record.logprob == record.logprob else -math.inf)
    tokens = sorted(logprobs, key=lambda token: -logprobs[token])
    known = np.array([logprobs[token] for token in tokens], np.float32)
    row = np.concatenate([known, _rest(known, least)])
    usual = SamplingParams(temperature=params.temperature, max_tokens=1)
    cuts = [""] * row.size
    if params.temperature < GREEDY_BELOW:
        cuts[1:] = ["greedy"] * (row.size - 1)
        after = np.eye(1, row.size)[0]
    else:
        after = _probabilities(row, usual)
        for name in _FILTERS:
            usual = replace(usual, **{name: getattr(params, name)})
            left = _probabilities(row, usual)
            cuts = [name if had and not has else cut for cut, had, has in zip(cuts, after, left, strict=True)]
            after = left
    found = [
        Candidate(token, math.exp(logprobs[token]), float(after[place]), cuts[place], token == record.token)
        for place, token in enumerate(tokens)
    ]
    if row.size > known.size:
        rest = slice(known.size, None)
        still = float(after[rest].sum())
        cut = "" if still else cuts[known.size]
        found.append(Candidate(None, float(np.exp(row[rest], dtype=np.float64).sum()), still, cut, drawn=False))
    return found


def _rest(known: Row, least: float) -> Row:
    """Log-probabilities, each below `least`, of what is not known; none where there is nothing."""
    total = 1.0 - float(np.exp(known, dtype=np.float64).sum())
    if total < _NOTHING:
        return np.zeros(0, np.float32)
    parts = min(math.floor(total / max(math.exp(least), _NOTHING / _MOST_PARTS)) + 1, _MOST_PARTS)
    return np.full(parts, math.log(total / parts), np.float32)


def _probabilities(row: Row, params: SamplingParams) -> NDArray[np.float64]:
    """Of each position to be drawn; 0 for those cut away."""
    ids, left = Sampler(params, ()).candidates(row)
    out = np.zeros(row.size, np.float64)
    out[slice(None) if ids is None else ids] = np.exp(left.astype(np.float64) - log_total(left))
    return out
