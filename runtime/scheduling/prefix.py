"""`common_prefix`: the length of the prefix that two token sequences share."""

from __future__ import annotations

from collections.abc import Sequence

_BLOCK = 64  # ids compared at once


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """The number of leading tokens that two sequences of the same type share."""
    length = min(len(one), len(other))
    for start in range(0, length, _BLOCK):
        end = min(start + _BLOCK, length)
        if one[start:end] != other[start:end]:
            return next(index for index in range(start, end) if one[index] != other[index])
    return length
