"""Incremental statistics of the tokens so far: counts, n-grams and repetitions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

import numpy as np

from llm_edge.runtime.sampling.transforms import Ids, Row


class Counts:
    """Distinct token ids with their counts, as arrays that grow in place."""

    def __init__(self, tokens: Iterable[int] = ()) -> None:
        self._slots: dict[int, int] = {}
        self._ids = np.zeros(64, np.intp)
        self._counts = np.zeros(64, np.float32)
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        """Append the next token."""
        slot = self._slots.setdefault(token, len(self._slots))
        if slot == self._ids.size:
            self._ids = np.concatenate([self._ids, np.zeros_like(self._ids)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._ids[slot] = token
        self._counts[slot] += 1

    def arrays(self) -> tuple[Ids, Row]:
        """The ids [N] and how often each was added [N]."""
        used = len(self._slots)
        return self._ids[:used], self._counts[:used]


class Ngrams:
    """The tokens that followed each (size - 1)-gram."""

    def __init__(self, tokens: Iterable[int], size: int) -> None:
        self._size = size
        self._latest: tuple[int, ...] = ()
        self._next: dict[tuple[int, ...], set[int]] = {}
        for token in tokens:
            self.add(token)

    def add(self, token: int) -> None:
        if len(self._latest) == self._size - 1:
            self._next.setdefault(self._latest, set()).add(token)
            self._latest = (*self._latest[1:], token) if self._latest else ()
        else:
            self._latest = (*self._latest, token)

    def repeating(self) -> Ids:
        """The ids, unordered, that would repeat an n-gram of `size` tokens."""
        found = self._next.get(self._latest, ())
        return np.fromiter(found, np.intp, len(found))


class Repetitions:
    """Earlier occurrences of the latest tokens and their lengths; no match contains or continues with a breaker.

    Keeps the length of every match and updates all of them with array operations, so that the cost of a token does not
    depend on how repetitive the text is. Only the latest `window` tokens are searched, -1 = all.
    """

    # Longer matches count as this long; the penalty is at its maximum by then.
    LONGEST = 256

    def __init__(self, tokens: Sequence[int], breakers: Collection[int], window: int = -1) -> None:
        self._breakers = frozenset(breakers)
        self._window = window
        self._used = len(tokens)
        # -1 marks breakers and unused capacity.
        self._tokens = np.full(2 * max(self._used, 512), -1, np.intp)
        self._tokens[: self._used] = [-1 if token in self._breakers else token for token in tokens]
        # For each earlier position, the number of latest tokens that also precede it.
        self._lengths = np.zeros(self._tokens.size, np.intp)
        text = self._tokens[: self._used]  # [T]
        ends = np.arange(self._used - 1)
        for back in range(min(self.LONGEST, self._used - 1)):
            ends = ends[ends >= back]
            ends = ends[(text[ends - back] == text[-1 - back]) & (text[-1 - back] >= 0)]
            self._lengths[ends] += 1

    def add(self, token: int) -> None:
        used = self._used
        if used == self._tokens.size:
            self._tokens = np.concatenate([self._tokens, np.full(used, -1, np.intp)])
            self._lengths = np.concatenate([self._lengths, np.zeros(used, np.intp)])
        lengths = self._lengths[:used]
        if token in self._breakers:
            lengths[:] = 0
            token = -1
        else:
            lengths[1:] = lengths[:-1] + 1
            lengths[:1] = 1
            lengths *= self._tokens[:used] == token
        self._tokens[used] = token
        self._used += 1

    def following(self, least: int) -> tuple[Ids, Ids]:
        """The ids that followed at least `least` of the latest tokens, and the longest such match of each: [N], [N]."""
        first = max(0, self._used - self._window) if self._window >= 0 else 0
        lengths = self._lengths[first : max(first, self._used - 1)]
        ends = np.flatnonzero(lengths >= least)
        lengths = np.minimum(lengths[ends], np.minimum(ends + 1, self.LONGEST))  # no match begins before the window
        ids = self._tokens[first + ends + 1]
        usable = (ids >= 0) & (lengths >= least)
        # Sorted by id, then by length: the last of each id is its longest.
        ids, lengths = np.divmod(np.sort(ids[usable] * (self.LONGEST + 1) + lengths[usable]), self.LONGEST + 1)
        last = np.ones(ids.size, np.bool_)
        last[:-1] = ids[1:] != ids[:-1]
        return ids[last], lengths[last]
