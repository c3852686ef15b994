"""What sampling does to one row of logits, as small pure functions; they know nothing of texts, seeds or history.

    add, without, repetition_penalty, presence_frequency,
    dry, temperature                                         a row [V] in, a new row [V] out
    keep_*                                                   a row [N] in, the positions kept out, ascending
    draw                                                     a row [N], a uniform number in, a position out
    log_total, surprise                                      numbers about a row [N]

Rows stay as they are. The `keep_*` functions are exact: they look at few candidates first, and only where those
provably hold the answer. Token ids that a row has no logit for do nothing.
"""

from __future__ import annotations

import math
from typing import cast

import numpy as np
from numpy.typing import NDArray

Row = NDArray[np.float32]
Ids = NDArray[np.intp]

# keep_top_p looks first at the tokens at least this probable (there are at most 1 / floor), then at all.
NUCLEUS_FLOORS = (2.0**-9, 2.0**-13, 2.0**-17)
# keep_typical looks first at the tokens whose surprise is at most this far, in nats, from the mean, then at all.
TYPICAL_REACHES = (1.0, 4.0)
# exp of less is 0 in float32.
LEAST_EXPONENT = np.float32(-200)
# The most that DRY takes from a logit: as good as a ban, and the order of what it takes it from remains.
DRY_MOST = 100.0
# Weights are summed in float32 within a block of this many and in float64 across blocks.
BLOCK = 256


def add(row: Row, ids: Ids, amounts: Row) -> Row:
    """Add `amounts` to the logits at `ids`, all distinct."""
    inside = ids < row.size
    out = row.copy()
    out[ids[inside]] += amounts[inside]
    return out


def without(row: Row, ids: Ids) -> Row:
    """-inf at `ids`; the row itself, where that changes nothing."""
    ids = ids[ids < row.size]
    if ids.size == 0:
        return row
    out = row.copy()
    out[ids] = -np.inf
    return out


def repetition_penalty(row: Row, ids: Ids, penalty: float) -> Row:
    """Push the logits at `ids` down (penalty above 1) or up (below 1); an id listed twice counts once."""
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
    """Push down `ids`, all distinct: each would go on with a repetition of `lengths` tokens, allowed_length or more.

    multiplier * base ** (length - allowed_length) is subtracted, `DRY_MOST` at most
    (https://github.com/oobabooga/text-generation-webui/pull/5677).
    """
    inside = ids < row.size
    if not inside.any():
        return row
    amounts = multiplier * np.power(base, (lengths[inside] - allowed_length).astype(np.float64))
    out = row.copy()
    out[ids[inside]] -= np.minimum(amounts, DRY_MOST).astype(np.float32)
    return out


def temperature(row: Row, value: float) -> Row:
    """Divide the logits by `value`, which is above 0."""
    return row / np.float32(value)


def keep_top_n_sigma(row: Row, n: float) -> Ids:
    """Positions of the logits at most `n` standard deviations of the finite logits below the largest.

    Top-nsigma, https://arxiv.org/abs/2411.07641.
    """
    finite = row if row.min() > -np.inf else row[row > -np.inf]
    sigma = float(finite.std())
    if not math.isfinite(sigma):  # squares beyond float32
        sigma = float(finite.std(dtype=np.float64))
    return np.flatnonzero(row >= np.float32(float(row.max()) - n * sigma))


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


def keep_top_p(row: Row, p: float) -> Ids:
    """Positions of the nucleus: the fewest largest logits whose probabilities sum to `p` or more.

    As in transformers, a token goes if it and all less probable ones sum to 1 - p or less; one always stays.
    Of equal logits those at lower positions go first, as by a stable sort (torch's need not be one).
    """
    top = row.max()
    total = float(_block_sums(_weights(row, top)).sum(dtype=np.float64))
    rest = np.float32(1.0 - p)
    for floor in (*(NUCLEUS_FLOORS if row.size > BLOCK else ()), 0.0):
        # {logits >= bound} is the head of the sorted row, whatever the bound: its running sums are the row's.
        bound = float(top) + math.log(total * floor) if floor else -math.inf
        ids = np.flatnonzero(row >= np.float32(min(bound, float(top))))
        few = row[ids]
        descending = np.sort(few)[::-1]
        running = np.cumsum(_weights(descending, top), dtype=np.float64)
        after = ((total - running) / total).astype(np.float32)  # [n] what stands below each token
        if floor == 0 or after[-1] <= rest:
            break  # the nucleus ends among these
    # A token stays when what stands below its predecessor, itself included, is more than 1 - p.
    size = 1 + int(np.count_nonzero(after[:-1] > rest))
    least = descending[size - 1]
    kept: NDArray[np.bool_] = few >= least
    surplus = int(np.count_nonzero(kept)) - size
    if surplus:
        kept[np.flatnonzero(few == least)[:surplus]] = False
    return ids[kept]


def keep_min_p(row: Row, p: float) -> Ids:
    """Positions of the tokens at least `p` (above 0) times as probable as the most probable."""
    top = row.max()
    # The bound in logits, with room for float32 rounding; the definition itself runs on what passes it.
    bound = float(top) + math.log(p) - 1e-3 - 1e-6 * abs(float(top))
    ids = np.flatnonzero(row >= np.float32(max(bound, float(np.finfo(np.float32).min))))
    return ids[_weights(row[ids], top) >= np.float32(p)]


def keep_typical(row: Row, p: float) -> Ids:
    """Positions of the tokens whose surprise -ln(probability) is nearest to the mean one, which reach `p` together.

    As in transformers, all that are as near as the last of them stay too (https://arxiv.org/abs/2202.00666).
    """
    shifted = np.maximum(row - row.max(), LEAST_EXPONENT)  # no infinities, which 0 * inf would make NaN
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
            break  # the tokens that reach p end among these
    farthest = few[order[min(last, ids.size - 1)]]
    return cast(Ids, ids[few <= farthest])


def keep_xtc(row: Row, threshold: float) -> Ids:
    """Positions of all tokens but those at least `threshold` probable, of which only the least probable stays.

    Among equals that is the one at the highest position. Nothing goes where fewer than two are so probable
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


def keep_mirostat(row: Row, most: float) -> Ids:
    """Positions of the tokens whose surprise is at most `most` bits; of the most probable in any case."""
    bound = log_total(row) - most * math.log(2)
    return np.flatnonzero(row >= np.float32(min(bound, float(row.max()))))


def draw(row: Row, uniform: float) -> int:
    """Position at which the running sum of probabilities passes `uniform`, which is in [0, 1)."""
    weights = _weights(row, row.max())
    blocks = np.cumsum(_block_sums(weights), dtype=np.float64)
    goal = uniform * float(blocks[-1])
    block = _passes(blocks, goal)
    before = float(blocks[block - 1]) if block else 0.0
    inside = np.cumsum(weights[block * BLOCK : (block + 1) * BLOCK], dtype=np.float64)
    return block * BLOCK + _passes(inside, goal - before)


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


def _passes(running: NDArray[np.float64], goal: float) -> int:
    """First position whose running sum is above `goal`; never one of weight 0, whatever the rounding."""
    last = running.searchsorted(running[-1], side="left")
    return int(min(running.searchsorted(goal, side="right"), last))


def _kth_largest(row: Row, k: int) -> np.float32:
    place = row.size - k
    return cast(np.float32, np.partition(row, place)[place])
