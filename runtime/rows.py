"""Who sits in which row of a batch, and what earlier answers left there. Knows no text, thread or graph.

A row is taken by one answer at a time. What it computed stays when it is done, so that a prompt that begins alike need
not be computed again: in place where most of it serves, else as a copy. What was not used for longest goes first.
"""

from __future__ import annotations

from collections.abc import Sequence

from llm_edge.runtime.batch import Batch
from llm_edge.runtime.prefixes import common_prefix

_WORTH = 0.5  # share of a row's tokens that must serve for it to be taken over


class Rows:
    """The rows of a batch.

    Args:
        batch: whose rows.
        budget: bytes that rows nobody sits in may keep.

    Attributes:
        evicted: how many times tokens were let go.
    """

    def __init__(self, batch: Batch, budget: int) -> None:
        self._batch = batch
        self._budget = budget
        self._texts: list[Sequence[int]] = [[] for _ in range(batch.rows)]
        self._taken: set[int] = set()
        self._used = [0] * batch.rows
        self._clock = 0
        self.evicted = 0

    @property
    def kept(self) -> int:
        """Tokens in rows that nobody sits in."""
        return sum(self._batch.lengths[row] for row in range(self._batch.rows) if row not in self._taken)

    def longest(self, prompt: Sequence[int]) -> tuple[int, int]:
        """The row that begins like a prompt for longest, and for how many tokens."""
        found = [(common_prefix(self._text(row), prompt), row) for row in range(self._batch.rows)]
        length, row = max(found, key=lambda each: (each[0], -each[1]))
        return row, length

    def take(self, prompt: list[int], source: int, length: int) -> int:
        """Sit down: a row that holds the first `length` tokens, which are those of row `source`.

        Args:
            prompt: the answer's tokens; the list may grow later, as the row does.
        """
        batch = self._batch
        idle = [row for row in range(batch.rows) if row not in self._taken]
        whole = length >= _WORTH * batch.lengths[source] and length > 0
        row = source if source in idle and (whole or len(idle) == 1) else self._place(idle, source)
        if row != source and batch.lengths[row]:
            self._release(row)
        if row != source and length:
            batch.copy(source, row, length)
        batch.lengths[row] = length
        self._taken.add(row)
        self._texts[row] = prompt
        self._touch(row)
        self._touch(source)
        return row

    def leave(self, row: int, *, keep: bool = True) -> None:
        """Stand up; what was computed stays unless `keep` says no."""
        self._taken.discard(row)
        self._texts[row] = list(self._text(row))
        self._touch(row)
        if not keep:
            self._release(row)
        self.shrink()

    def put(self, tokens: Sequence[int]) -> int:
        """A row for tokens whose keys and values the caller will write; nobody sits in it."""
        row = self._place([row for row in range(self._batch.rows) if row not in self._taken], -1)
        self._release(row)
        self._texts[row] = list(tokens)
        self._touch(row)
        return row

    def shrink(self) -> None:
        """Let the rows that were not used for longest go until the budget holds."""
        while self.kept * self._batch.token_bytes > self._budget:
            idle = [row for row in range(self._batch.rows) if row not in self._taken and self._batch.lengths[row]]
            self._release(min(idle, key=self._used.__getitem__))

    def _text(self, row: int) -> Sequence[int]:
        return self._texts[row][: self._batch.lengths[row]]

    def _place(self, idle: list[int], source: int) -> int:
        """An idle row: empty and beside the others, or else the one that was not used for longest."""
        others = [row for row in idle if row != source] or idle
        empty = [row for row in others if not self._batch.lengths[row]]
        if empty:
            middle = sum(self._taken) / len(self._taken) if self._taken else 0
            return min(empty, key=lambda row: abs(row - middle))
        return min(others, key=self._used.__getitem__)

    def _release(self, row: int) -> None:
        self.evicted += bool(self._batch.lengths[row])
        self._batch.release(row)
        self._texts[row] = []

    def _touch(self, row: int) -> None:
        self._clock += 1
        self._used[row] = self._clock


def spans(rows: Sequence[int], gap: int) -> list[range]:
    """Rows that lie side by side, taken together across gaps of at most so many others."""
    found: list[range] = []
    for row in sorted(rows):
        if found and row - found[-1].stop <= gap:
            found[-1] = range(found[-1].start, row + 1)
        else:
            found.append(range(row, row + 1))
    return found
