"""What two texts begin with alike. Knows ids alone."""

from __future__ import annotations

from collections.abc import Sequence

_TOGETHER = 64  # ids compared at once


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """How many tokens two texts, both of one type of sequence, begin with alike."""
    length = min(len(one), len(other))
    for start in range(0, length, _TOGETHER):
        end = min(start + _TOGETHER, length)
        if one[start:end] != other[start:end]:
            return next(index for index in range(start, end) if one[index] != other[index])
    return length
