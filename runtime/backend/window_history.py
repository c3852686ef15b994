"""`WindowHistory`: which keys and values of a sequence layers with sliding windows still hold.

A position attends to the `window` positions up to itself, so those before are freed as a sequence grows, except in
front of lengths that were kept, to which the sequence can return. Attention multiplies the freed ones, which are zeros
then, by zero: results are the same bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator

from llm_edge.runtime.backend.limits import CHUNK_ALIGNMENT

Range = tuple[int, int]

_SLACK = 64  # tokens in front of a window that remain: sequences return to a few tokens before a length
_MARGIN = 2 * CHUNK_ALIGNMENT  # by which callers may return to less than is available
_STEP = 64  # tokens that are freed at once


class WindowHistory:
    """What is freed of one sequence.

    Args:
        window: number of tokens that a position attends to, including itself.

    Attributes:
        freed: ranges of positions, in order.
    """

    def __init__(self, window: int) -> None:
        self._reach = window + _SLACK
        self._kept: list[int] = []
        self._end = 0  # positions before it are freed, or in front of a kept length
        self.freed: list[Range] = []

    def advance(self, length: int) -> list[Range]:
        """Free what `length` tokens do not need; returns the ranges that are to be freed now."""
        end = (length - self._reach) // _STEP * _STEP
        if end <= self._end:
            return []
        self._end = end
        return self._free()

    def keep(self, length: int) -> list[Range]:
        """Keep what is needed to return to this length and the shortest that was kept; returns what to free now."""
        self._kept = [*self._kept[:1], length] if self._kept and self._kept[0] < length else [length]
        return self._free()

    def available(self, length: int) -> int:
        """The most of the first `length` tokens after which, or up to `_MARGIN` before, the sequence can continue."""
        found = length
        while (blocking := self._blocking(found)) is not None:
            found = blocking[0] // CHUNK_ALIGNMENT * CHUNK_ALIGNMENT
        return found

    def rewind(self, length: int) -> None:
        """Return to a length that is available."""
        self._kept = [each for each in self._kept if each <= length]
        self._end = min(self._end, length)
        self.freed = [(start, min(end, length)) for start, end in self.freed if start < length]

    def held(self, length: int) -> Iterator[Range]:
        """The ranges of the first `length` positions that are not freed."""
        start = 0
        for first, end in self.freed:
            if first >= length:
                break
            if first > start:
                yield start, first
            start = end
        if start < length:
            yield start, length

    def take_over(self, other: WindowHistory, length: int) -> None:
        """Begin with what another sequence holds of its first `length` tokens, which is available there."""
        self._kept, self._end, self.freed = list(other._kept), other._end, list(other.freed)
        self.rewind(length)

    def begin(self, length: int) -> list[Range]:
        """Begin with the window of `length` tokens alone; returns what is to be freed."""
        self._kept, self._end, self.freed = [], 0, []
        return self.advance(length)

    def _blocking(self, length: int) -> Range | None:
        """The last freed range that a position at this length or in the margin before it attends to."""
        first = length - (self._reach - _SLACK) + 1 - _MARGIN
        return next((each for each in reversed(self.freed) if each[0] < length and each[1] > first), None)

    def _free(self) -> list[Range]:
        wanted, start = [], 0
        for kept in [*sorted(self._kept), self._end + self._reach]:
            if start < (before := min(kept - self._reach, self._end)):
                wanted.append((start, before))
            start = max(start, min(kept, self._end))
        new = [part for each in wanted for part in _without(each, self.freed)]
        self.freed = _joined([*self.freed, *new])
        return new


def _without(given: Range, others: list[Range]) -> Iterator[Range]:
    start, end = given
    for first, last in others:
        if last <= start or first >= end:
            continue
        if first > start:
            yield start, first
        start = max(start, last)
    if start < end:
        yield start, end


def _joined(ranges: list[Range]) -> list[Range]:
    found: list[Range] = []
    for start, end in sorted(ranges):
        if found and start <= found[-1][1]:
            found[-1] = found[-1][0], max(found[-1][1], end)
        else:
            found.append((start, end))
    return found
