"""Next-token sampling over one row of logits; it knows nothing of tokenization, sessions or text.

A draw is a list of small pure functions, in this order (the order of transformers' logits processors):

    processors (see `LogitsProcessor`)                         a row [V] in, it or a new row [V] out
    repetition_penalty -> presence_frequency -> temperature    a row [V] in, a new row [V] out
    keep_top_k -> keep_top_p -> keep_min_p                     a row [N] in, the positions kept out, ascending
    draw                                                       a row [N], a uniform number in, a position out

After each `keep_*` the row shrinks to what was kept, so all that follows works on few numbers. The `keep_*`
functions are exact: they look at few candidates first, and only where those provably hold the answer.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Protocol, TypeGuard, cast

import numpy as np
from numpy.typing import NDArray

from llm_edge.runtime.errors import LogitsError, ParameterError

Row = NDArray[np.float32]
Ids = NDArray[np.intp]

# Below this a temperature is greedy: dividing float32 logits by less only makes infinities.
GREEDY_BELOW = 1e-5
# keep_top_p looks first at the tokens at least this probable (there are at most 1 / floor), then at all.
NUCLEUS_FLOORS = (2.0**-9, 2.0**-13, 2.0**-17)
# Weights are summed in float32 within a block of this many and in float64 across blocks.
BLOCK = 256


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the next token is drawn, and when to stop; a value out of its range raises ParameterError.

    Listed in the order in which they act on the logits:

    max_newlines        newline characters, 0 = off, and so is None, which becomes 0. A token that would put more
                        than this many in a row, the prompt's too, cannot be drawn; tokens without text break a
                        row, and those that end the text can always be drawn.
    single_think_end    true or false. The token that ends the reasoning cannot be drawn once it stands behind
                        the last one that starts it; nothing happens for models without such tokens.
    repetition_penalty  0.01 to 100, 1 = off. Logits of the tokens in the window, each token once: a positive
                        logit is divided by it, a negative one multiplied.
    repetition_window   tokens; how many of the latest, the prompt's too, the repetition penalty looks at.
                        -1 = all, 0 = none.
    presence_penalty    -2 to 2, 0 = off. Subtracted once from the logit of every token generated so far.
    frequency_penalty   -2 to 2, 0 = off. Subtracted once for every time the token was generated.
    temperature         0 to 100. Logits are divided by it. 0 (or below 1e-5) = greedy: the largest logit
                        after the penalties, the lowest id among equals; all below is skipped then.
    top_k               tokens, 0 = off. Keeps the k largest logits, and every logit equal to the k-th.
    top_p               0 to 1, 1 = off. Keeps the fewest most probable tokens that together reach this
                        probability; at least one; among equals the highest ids.
    min_p               0 to 1, 0 = off. Keeps tokens at least min_p times as probable as the most probable.
    seed                0 to 2**64 - 1, or None = different every time. A seed and a machine give one text.

    The first two are `LogitsProcessor`s, which whoever drives the sampler gives to it. It does not act on the
    rest either:

    max_tokens          tokens, 1 or more, those of the reasoning included.
    stop                strings that end the answer; one string may stand alone. What they spell in a reasoning
                        does not end it.
    stop_token_ids      token ids that end the text, the reasoning too.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    repetition_window: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int | None = None
    max_tokens: int = 512
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    max_newlines: int | None = 0
    single_think_end: bool = False

    def __post_init__(self) -> None:
        self._within("temperature", 0.0, 100.0)
        self._within("top_p", 0.0, 1.0)
        self._within("min_p", 0.0, 1.0)
        self._within("repetition_penalty", 0.01, 100.0)
        self._within("presence_penalty", -2.0, 2.0)
        self._within("frequency_penalty", -2.0, 2.0)
        self._within("top_k", 0, 2**31 - 1)
        self._within("repetition_window", -1, 2**31 - 1)
        self._within("max_tokens", 1, 2**31 - 1)
        if self.max_newlines is None:
            object.__setattr__(self, "max_newlines", 0)
        self._within("max_newlines", 0, 2**31 - 1)
        if not isinstance(self.single_think_end, bool):
            raise _refused("single_think_end", self.single_think_end, "true or false")
        if self.seed is not None:
            self._within("seed", 0, 2**64 - 1)
        if isinstance(self.stop, str):
            object.__setattr__(self, "stop", (self.stop,))
        self._items("stop", "strings, none of them empty", lambda item: isinstance(item, str) and item != "")
        self._items("stop_token_ids", "integers of 0 or more", lambda item: _is_integer(item) and item >= 0)

    def _within(self, name: str, low: float, high: float) -> None:
        value, whole = getattr(self, name), isinstance(low, int)
        right = _is_integer(value) or (isinstance(value, float) and not whole)
        if not right or not low <= value <= high:  # NaN compares false; an int beyond any float compares too
            raise _refused(name, value, f"{'an integer' if whole else 'a number'} from {low} to {high}")
        object.__setattr__(self, name, value if whole else float(value))

    def _items(self, name: str, wanted: str, allowed: Callable[[object], bool]) -> None:
        value = getattr(self, name)
        if not isinstance(value, list | tuple) or not all(map(allowed, value)):
            raise _refused(name, value, f"a list of {wanted}")
        object.__setattr__(self, name, tuple(value))


def _is_integer(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _refused(name: str, value: object, wanted: str) -> ParameterError:
    return ParameterError(f"{name}: {reprlib.repr(value)} is not allowed, give {wanted}")


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


def temperature(row: Row, value: float) -> Row:
    """Divide the logits by `value`, which is above 0."""
    return row / np.float32(value)


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


def draw(row: Row, uniform: float) -> int:
    """Position at which the running sum of probabilities passes `uniform`, which is in [0, 1)."""
    weights = _weights(row, row.max())
    blocks = np.cumsum(_block_sums(weights), dtype=np.float64)
    goal = uniform * float(blocks[-1])
    block = _passes(blocks, goal)
    before = float(blocks[block - 1]) if block else 0.0
    inside = np.cumsum(weights[block * BLOCK : (block + 1) * BLOCK], dtype=np.float64)
    return block * BLOCK + _passes(inside, goal - before)


def _unless_nothing_is_left(row: Row, processed: Row) -> Row:
    return row if processed is not row and np.isneginf(processed.max()) else processed


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


class _Counts:
    """Distinct token ids with their counts, as arrays that grow in place."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._slots: dict[int, int] = {}
        self._ids = np.zeros(64, np.intp)
        self._counts = np.zeros(64, np.float32)
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == self._ids.size:
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[slot] = token
        self._counts[slot] += 1

    def arrays(self) -> tuple[Ids, Row]:
        used = len(self._slots)
        return self._ids[:used], self._counts[:used]


class LogitsProcessor(Protocol):
    """Something that changes logits before all else, by what stands before the token to be drawn.

    One belongs to one answer, and may keep what it has learned of the tokens: they only grow.
    """

    def __call__(self, row: Row, tokens: Sequence[int]) -> Row:
        """Return logits [V], `row` itself or a new one; -inf for what must not be drawn.

        Args:
            row: logits [V], to be left as they are.
            tokens: the prompt and what was drawn so far, to be left as they are.
        """


class Sampler:
    """Draws the tokens of one answer, one after another; `tokens` is the prompt and what was drawn so far.

    A processor that leaves nothing to be drawn is passed over for that token.
    """

    def __init__(
        self, params: SamplingParams, prompt_tokens: Sequence[int], processors: Sequence[LogitsProcessor] = ()
    ) -> None:
        self.params = params
        self._processors = tuple(processors)
        self._tokens = [int(token) for token in prompt_tokens]
        if self._tokens and min(self._tokens) < 0:
            raise _refused("prompt_tokens", min(self._tokens), "token ids of 0 or more")
        self._prompt_length = len(self._tokens)
        self._generated = _Counts()
        self._repeats = params.repetition_penalty != 1 and params.repetition_window != 0
        self._seen = _Counts(self._tokens) if self._repeats and params.repetition_window < 0 else None
        self._random = np.random.Generator(np.random.PCG64(params.seed))
        self._filters: list[Callable[[Row], Ids]] = []
        if params.top_k > 0:
            self._filters.append(partial(keep_top_k, k=params.top_k))
        if params.top_p < 1:
            self._filters.append(partial(keep_top_p, p=params.top_p))
        if params.min_p > 0:
            self._filters.append(partial(keep_min_p, p=params.min_p))

    @property
    def tokens(self) -> tuple[int, ...]:
        """The prompt's tokens and the generated ones, oldest first."""
        return tuple(self._tokens)

    @property
    def generated(self) -> tuple[int, ...]:
        """The generated tokens, oldest first."""
        return tuple(self._tokens[self._prompt_length :])

    def sample(self, logits: Row) -> int:
        """Draw the next token from logits [V], which stay as they are, and add it to the history."""
        ids, row = self.survivors(logits)
        uniform = self._random.random()  # one a token, needed or not
        position = draw(row, uniform) if row.size > 1 else 0
        token = position if ids is None else int(ids[position])
        self._tokens.append(token)
        self._generated.add(token)
        if self._seen is not None:
            self._seen.add(token)
        return token

    def survivors(self, logits: Row) -> tuple[Ids | None, Row]:
        """What the next draw chooses from: token ids, ascending (None = all V), and their new logits."""
        if logits.ndim != 1 or logits.size == 0:
            raise _refused("logits", logits.shape, "one row of logits, of shape [V]")
        row, params = logits.astype(np.float32, copy=False), self.params
        greedy = params.temperature < GREEDY_BELOW
        for process in self._processors:
            row = _unless_nothing_is_left(row, process(row, self._tokens))
        with np.errstate(all="ignore"):  # what overflows is caught by the check below
            if self._repeats:
                row = repetition_penalty(row, self._window(), params.repetition_penalty)
            if params.presence_penalty or params.frequency_penalty:
                penalties = params.presence_penalty, params.frequency_penalty
                row = presence_frequency(row, *self._generated.arrays(), *penalties)
            if not greedy and params.temperature != 1:
                row = temperature(row, params.temperature)
            best = int(row.argmax())  # NaN counts as the largest, so this one position tells all
        if not np.isfinite(row[best]):
            raise LogitsError(
                f"logits: the largest of {row.size} is {row[best]}, so no token can be drawn: "
                "the bundle's weights or their number type are at fault, export it again in a wider one"
            )
        if greedy:
            return np.array([best]), row[best : best + 1]
        ids: Ids | None = None
        for keep in self._filters:
            kept = keep(row)
            row = row[kept]
            ids = kept if ids is None else ids[kept]
        return ids, row

    def _window(self) -> Ids:
        if self._seen is not None:
            return self._seen.arrays()[0]
        return np.array(self._tokens[-self.params.repetition_window :], dtype=np.intp)
