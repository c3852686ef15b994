"""Prefixes that sequences share, and where prompts can be split."""

from __future__ import annotations

from collections.abc import Sequence

from llm_edge.runtime.backend.limits import CHUNK_ALIGNMENT

MIN_COMPUTED = 2
"""Tokens at the end of a prompt that are always computed, for the logits of the last one; see docs/decisions.md."""
WORTH_KEEPING = 8 * CHUNK_ALIGNMENT
"""Tokens that a prefix must share with another prompt before a step ends there or a prompt waits for it."""
_BLOCK = 64  # tokens that `common_prefix` compares at once


def aligned_prefix(length: int, prompt_length: int) -> int:
    """How many of `length` cached tokens a prompt can reuse; see `TokenSequence.reuse`."""
    return max(min(length, prompt_length - MIN_COMPUTED) // CHUNK_ALIGNMENT * CHUNK_ALIGNMENT, 0)


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """The number of leading tokens that two sequences of the same type share."""
    length = min(len(one), len(other))
    for start in range(0, length, _BLOCK):
        end = min(start + _BLOCK, length)
        if one[start:end] != other[start:end]:
            return next(index for index in range(start, end) if one[index] != other[index])
    return length
