"""Who sits in which row of a batch, and what earlier answers left there. Knows no text, thread or graph.

A row is taken by one answer at a time. What it computed stays when it is done, so that a prompt that begins alike need
not be computed again: in place where most of it serves, else as a copy. What was not used for longest goes first.

Answers sit near each other, for a step takes rows that lie side by side: to copy what was computed takes milliseconds
once, a step of its own takes milliseconds for every token.
"""

from __future__ import annotations

from collections.abc import Sequence

from llm_edge.runtime.scheduling.batch import Batch
from llm_edge.runtime.scheduling.prefixes import common_prefix

GAP = 4  # rows computed for nothing rather than one step more
_WORTH = 0.5  # share of a row's tokens that must serve for it to be taken over


class SlotManager:
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
        idle = self._idle()
        whole = source in idle and length > 0 and length >= _WORTH * batch.lengths[source]
        row = source if source in idle and (len(idle) == 1 or (whole and self._near(source))) else self._place(source)
        if row != source:
            self._clear(row, source)
            if length:
                batch.copy(source, row, length)
                self._touch(source)
            if whole:
                batch.release(source)
        batch.lengths[row] = length
        self._taken.add(row)
        self._texts[row] = prompt
        self._touch(row)
        return row

    def leave(self, row: int, *, keep: bool = True) -> None:
        """Stand up; what was computed stays unless `keep` says no."""
        self._taken.discard(row)
        self._texts[row] = list(self._text(row))
        self._touch(row)
        if not keep:
            self._batch.release(row)
        self.shrink()

    def put(self, tokens: Sequence[int]) -> int:
        """A row for tokens whose keys and values the caller will write; nobody sits in it."""
        row = min(self._idle(), key=lambda row: (self._batch.lengths[row] > 0, self._used[row]))
        self._evict(row)
        self._texts[row] = list(tokens)
        self._touch(row)
        return row

    def shrink(self) -> None:
        """Let the rows that were not used for longest go until the budget holds."""
        while self.kept * self._batch.token_bytes > self._budget:
            self._evict(self._oldest(self._idle()))

    def _text(self, row: int) -> Sequence[int]:
        return self._texts[row][: self._batch.lengths[row]]

    def _idle(self) -> list[int]:
        return [row for row in range(self._batch.rows) if row not in self._taken]

    def _distance(self, row: int) -> int:
        """Rows between this one and those that are taken."""
        if not self._taken:
            return 0
        return max(min(self._taken) - row, row - max(self._taken), 0)

    def _near(self, row: int) -> bool:
        return self._distance(row) <= GAP

    def _place(self, source: int) -> int:
        """An idle row to sit in, another than `source`: near the others, and empty if one is."""
        others = [row for row in self._idle() if row != source]
        lengths = self._batch.lengths
        return min(
            others, key=lambda row: (not self._near(row), lengths[row] > 0, self._distance(row), self._used[row])
        )

    def _clear(self, row: int, source: int) -> None:
        """Make a row empty: what it keeps moves to an empty one, for which the oldest of all may have to go."""
        if not self._batch.lengths[row]:
            return
        others = [each for each in self._idle() if each != source]
        empty = [each for each in others if not self._batch.lengths[each]]
        other = empty[0] if empty else self._oldest(others)
        self._evict(other)
        if other != row:
            self._batch.copy(row, other, self._batch.lengths[row])
            self._texts[other], self._used[other] = self._texts[row], self._used[row]
            self._batch.release(row)

    def _oldest(self, rows: Sequence[int]) -> int:
        """Of those that keep something, the one that was not used for longest."""
        return min((row for row in rows if self._batch.lengths[row]), key=self._used.__getitem__)

    def _evict(self, row: int) -> None:
        self.evicted += bool(self._batch.lengths[row])
        self._batch.release(row)

    def _touch(self, row: int) -> None:
        self._clock += 1
        self._used[row] = self._clock


def spans(rows: Sequence[int]) -> list[range]:
    """Rows that lie side by side, taken together across gaps of at most `GAP` others."""
    found: list[range] = []
    for row in sorted(rows):
        if found and row - found[-1].stop <= GAP:
            found[-1] = range(found[-1].start, row + 1)
        else:
            found.append(range(row, row + 1))
    return found
