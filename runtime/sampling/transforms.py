"""Sampling transforms: small pure functions of the logits of one token.

    add, mask_tokens, repetition_penalty,
    presence_frequency, dry, temperature     logits [V] -> new logits [V]
    keep_*                                   logits [N] -> positions kept, ascending
    draw                                     logits [N], uniform number -> position
    log_total, surprise                      logits [N] -> number

Arguments are never modified. The `keep_*` functions are exact: they consider a few candidates first where these
provably contain the result. Token ids outside the vocabulary are ignored.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

Row = NDArray[np.float32]
Ids = NDArray[np.intp]
Filter = Callable[[Row, Any], Ids]

# keep_top_p looks first at the tokens at least this probable (there are at most 1 / floor), then at all.
NUCLEUS_FLOORS = (2.0**-9, 2.0**-13, 2.0**-17)
# keep_typical looks first at the tokens whose surprise is at most this far, in nats, from the mean, then at all.
TYPICAL_REACHES = (1.0, 4.0)
# exp of less is 0 in float32.
MIN_EXPONENT = np.float32(-200)
# The most that DRY subtracts: in effect a ban that keeps the order of the banned.
MAX_DRY = 100.0
# Weights are summed in float32 within a block of this many and in float64 across blocks.
BLOCK = 256

FILTERS: dict[str, Filter] = {}
"""Filters by the name of the parameter that controls them; `Sampler` applies them in the order of `PARAMETERS`."""


def filter_of(parameter: str) -> Callable[[Filter], Filter]:
    """Register a function as the filter of a parameter; it is applied when the value is not the default one."""

    def register(keep: Filter) -> Filter:
        FILTERS[parameter] = keep
        return keep

    return register


def add(row: Row, ids: Ids, amounts: Row) -> Row:
    """Add `amounts` to the logits at `ids`, all distinct."""
    inside = ids < row.size
    out = row.copy()
    out[ids[inside]] += amounts[inside]
    return out


def mask_tokens(row: Row, ids: Ids) -> Row:
    """Set the logits at `ids` to -inf; returns `row` itself if that changes nothing."""
    ids = ids[ids < row.size]
    if ids.size == 0:
        return row
    out = row.copy()
    out[ids] = -np.inf
    return out


def repetition_penalty(row: Row, ids: Ids, penalty: float) -> Row:
    """Lower (penalty above 1) or raise (below 1) the logits at `ids`; an id listed twice counts once."""
    ids = ids[ids < row.size]  # a tokenizer may know ids that the model has no logit for
    seen = row[ids]
    out = row.copy()
    out[ids] = np.where(seen < 0, seen * np.float32(penalty), seen / np.float32(penalty))
    return out


def presence_frequency(row: Row, ids: Ids, counts: Row, presence: float, frequency: float) -> Row:
    """Subtract `presence + frequency * count` from the logits at `ids`, all distinct, with counts above 0."""
    out = row.copy()
    out[ids] -= np.float32(presence) + np.float32(frequency) * counts
    return out


def dry(row: Row, ids: Ids, lengths: Ids, multiplier: float, base: float, allowed_length: int) -> Row:
    """Lower the logits at `ids`, all distinct, each of which would continue a repetition of `lengths` tokens.

    multiplier * base ** (length - allowed_length) is subtracted, at most `MAX_DRY`
    (https://github.com/oobabooga/text-generation-webui/pull/5677).
    """
    inside = ids < row.size
    if not inside.any():
        return row
    amounts = multiplier * np.power(base, (lengths[inside] - allowed_length).astype(np.float64))
    out = row.copy()
    out[ids[inside]] -= np.minimum(amounts, MAX_DRY).astype(np.float32)
    return out


def temperature(row: Row, value: float) -> Row:
    """Divide the logits by `value`, which is above 0."""
    return row / np.float32(value)


@filter_of("top_n_sigma")
def keep_top_n_sigma(row: Row, n: float) -> Ids:
    """Positions of the logits at most `n` standard deviations of the finite logits below the largest.

    Top-nsigma, https://arxiv.org/abs/2411.07641.
    """
    finite = row if row.min() > -np.inf else row[row > -np.inf]
    sigma = float(finite.std())
    if not math.isfinite(sigma):  # squares beyond float32
        sigma = float(finite.std(dtype=np.float64))
    return np.flatnonzero(row >= np.float32(float(row.max()) - n * sigma))


@filter_of("top_k")
def keep_top_k(row: Row, k: int) -> Ids:
    """Positions of all logits that are at least the k-th largest; ties with it stay."""
    if k >= row.size:
        return np.arange(row.size)
    # Fold the row into columns. At least k logits reach the k-th largest column maximum, so it is at most the
    # k-th largest logit; with a few times k columns, little more than k logits reach it.
    columns = max(4 * k, 512)
    depth = row.size // columns
    if depth < 2:
        return np.flatnonzero(row >= _kth_largest(row, k))
    maxima = row[: depth * columns].reshape(depth, columns).max(axis=0)  # [columns]
    ids = np.flatnonzero(row >= _kth_largest(maxima, k))
    few = row[ids]
    return ids[few >= _kth_largest(few, k)]


@filter_of("top_p")
def keep_top_p(row: Row, p: float) -> Ids:
    """Positions of the nucleus: the fewest largest logits whose probabilities sum to `p` or more.

    As in transformers, a token is dropped if it and all less probable ones sum to 1 - p or less; one is always kept.
    Of equal logits those at lower positions are dropped first, as with a stable sort (torch's need not be stable).
    """
    top = row.max()
    total = float(_block_sums(_weights(row, top)).sum(dtype=np.float64))
    rest = np.float32(1.0 - p)
    for floor in (*(NUCLEUS_FLOORS if row.size > BLOCK else ()), 0.0):
        # For any bound {logits >= bound} is the head of the sorted row, so its running sums are the row's.
        bound = float(top) + math.log(total * floor) if floor else -math.inf
        ids = np.flatnonzero(row >= np.float32(min(bound, float(top))))
        few = row[ids]
        descending = np.sort(few)[::-1]
        running = np.cumsum(_weights(descending, top), dtype=np.float64)
        after = ((total - running) / total).astype(np.float32)  # [n] probability of all less likely tokens
        if floor == 0 or after[-1] <= rest:
            break  # the nucleus ends among these
    # A token is kept if it and all less likely ones together exceed 1 - p.
    size = 1 + int(np.count_nonzero(after[:-1] > rest))
    least = descending[size - 1]
    kept: NDArray[np.bool_] = few >= least
    surplus = int(np.count_nonzero(kept)) - size
    if surplus:
        kept[np.flatnonzero(few == least)[:surplus]] = False
    return ids[kept]


@filter_of("min_p")
def keep_min_p(row: Row, p: float) -> Ids:
    """Positions of the tokens at least `p` (above 0) times as probable as the most probable."""
    top = row.max()
    # A bound in logits with a margin for float32 rounding; the exact definition is applied to what passes it.
    bound = float(top) + math.log(p) - 1e-3 - 1e-6 * abs(float(top))
    ids = np.flatnonzero(row >= np.float32(max(bound, float(np.finfo(np.float32).min))))
    return ids[_weights(row[ids], top) >= np.float32(p)]


@filter_of("typical_p")
def keep_typical(row: Row, p: float) -> Ids:
    """Positions of the tokens whose surprise -ln(probability) is nearest to the entropy and that together reach `p`.

    As in transformers, all that are as near as the last of them are kept too (https://arxiv.org/abs/2202.00666).
    """
    shifted = np.maximum(row - row.max(), MIN_EXPONENT)  # no infinities, which 0 * inf would make NaN
    weights = np.exp(shifted)
    total = float(_block_sums(weights).sum(dtype=np.float64))
    mean = float(_block_sums(weights * shifted).sum(dtype=np.float64)) / total
    distances = np.abs(shifted - np.float32(mean))  # surprise is log(total) - shifted, so log(total) cancels
    for reach in (*(TYPICAL_REACHES if row.size > BLOCK else ()), math.inf):
        ids = np.flatnonzero(distances <= reach)
        few = distances[ids]
        order = np.argsort(few)
        running = np.cumsum(weights[ids][order], dtype=np.float64)
        last = int(np.count_nonzero(running < p * total))
        if last < ids.size or reach == math.inf:
            break  # the cutoff lies within these candidates
    farthest = few[order[min(last, ids.size - 1)]]
    return cast(Ids, ids[few <= farthest])


@filter_of("epsilon_cutoff")
def keep_epsilon_cutoff(row: Row, epsilon: float) -> Ids:
    """Positions of the tokens at least `epsilon` probable; of the most probable one in any case.

    Epsilon sampling, https://arxiv.org/abs/2210.15191; as in transformers, ties with the most probable are kept too.
    """
    top = row.max()
    weights = _weights(row, top)
    bound = epsilon * float(_block_sums(weights).sum(dtype=np.float64))
    return np.flatnonzero((weights >= bound) | (row == top))


@filter_of("eta_cutoff")
def keep_eta_cutoff(row: Row, eta: float) -> Ids:
    """Positions of the tokens at least min(eta, sqrt(eta) * exp(-entropy)) probable; ties with the top are kept too.

    Eta sampling, https://arxiv.org/abs/2210.15191, as in transformers.
    """
    shifted = np.maximum(row - row.max(), MIN_EXPONENT)  # no infinities, which 0 * inf would make NaN
    weights = np.exp(shifted)
    total = float(_block_sums(weights).sum(dtype=np.float64))
    entropy = math.log(total) - float(_block_sums(weights * shifted).sum(dtype=np.float64)) / total
    return keep_epsilon_cutoff(row, min(eta, math.sqrt(eta) * math.exp(-entropy)))


def keep_xtc(row: Row, threshold: float) -> Ids:
    """Positions of all tokens except those at least `threshold` probable, of which only the least probable is kept.

    Among equals that is the one at the highest position. Nothing is dropped if fewer than two are so probable
    (https://github.com/oobabooga/text-generation-webui/pull/6335).
    """
    weights = _weights(row, row.max())
    bound = threshold * float(_block_sums(weights).sum(dtype=np.float64))
    top = np.flatnonzero((weights >= bound) & (weights > 0))
    kept = np.ones(row.size, np.bool_)
    if top.size > 1:
        kept[top] = False
        kept[top[top.size - 1 - row[top][::-1].argmin()]] = True
    return np.flatnonzero(kept)


def keep_mirostat(row: Row, limit: float) -> Ids:
    """Positions of the tokens whose surprise is at most `limit` bits; the most probable one in any case."""
    bound = log_total(row) - limit * math.log(2)
    return np.flatnonzero(row >= np.float32(min(bound, float(row.max()))))


def draw(row: Row, uniform: float) -> int:
    """Position at which the cumulative probability exceeds `uniform`, which is in [0, 1)."""
    weights = _weights(row, row.max())
    blocks = np.cumsum(_block_sums(weights), dtype=np.float64)
    target = uniform * float(blocks[-1])
    block = _passes(blocks, target)
    before = float(blocks[block - 1]) if block else 0.0
    inside = np.cumsum(weights[block * BLOCK : (block + 1) * BLOCK], dtype=np.float64)
    return block * BLOCK + _passes(inside, target - before)


def log_total(row: Row) -> float:
    """The logarithm of the sum of exp: a logit less this is its log-probability."""
    top = row.max()
    return float(top) + math.log(float(_block_sums(_weights(row, top)).sum(dtype=np.float64)))


def surprise(row: Row, position: int) -> float:
    """-log2 of the probability at a position, in bits."""
    return (log_total(row) - float(row[position])) / math.log(2)


def _weights(row: Row, top: np.float32) -> Row:
    """Probabilities up to a factor: exp(row - top)."""
    out: Row = row - top
    np.exp(out, out=out)
    return out


def _block_sums(weights: Row) -> Row:
    return np.add.reduceat(weights, np.arange(0, weights.size, BLOCK))


def _passes(running: NDArray[np.float64], target: float) -> int:
    """First position whose running sum exceeds `target`; never one of weight 0, even with rounding errors."""
    last = running.searchsorted(running[-1], side="left")
    return int(min(running.searchsorted(target, side="right"), last))


def _kth_largest(row: Row, k: int) -> np.float32:
    place = row.size - k
    return cast(np.float32, np.partition(row, place)[place])
