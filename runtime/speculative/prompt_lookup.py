"""`DraftProposer`, the interface of draft tokens, and `PromptLookup`: those that followed earlier in the text.

Quoted passages and edited files are then generated several tokens per step. After Saxena, "Prompt Lookup Decoding"
(2023). Proposals depend only on the text and on earlier acceptances, never on time or load.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

MAX_DRAFT_TOKENS = 15
"""Maximum number of draft tokens in a step."""
_NGRAM_SIZES = (5, 3)  # tokens that must match, longer ones first
_INITIAL_LENGTH = 4  # draft tokens of the first proposal
_MAX_PAUSE = 64  # tokens generated without a proposal after rejections


class DraftProposer(Protocol):
    """Proposes draft tokens for one generation: `PromptLookup` or `DraftModelProposer`."""

    def propose(self, tokens: list[int], limit: int) -> list[int]:
        """Up to `limit` draft tokens to follow `tokens`, possibly none. Across calls, `tokens` is only appended to."""

    def record_acceptance(self, proposed: int, accepted: int, total: int) -> None:
        """Report that the first `accepted` of `proposed` draft tokens were right; the text has `total` tokens now."""


class PromptLookup:
    """Draft tokens for one generation, from its own text.

    Proposals grow while they are accepted and shrink otherwise; after a rejection from the first token on, proposing
    pauses, longer each time.
    """

    def __init__(self) -> None:
        self._positions: list[dict[tuple[int, ...], int]] = [{} for _ in _NGRAM_SIZES]  # where an n-gram ends
        self._indexed = 0  # tokens whose n-grams are among the positions
        self._length = _INITIAL_LENGTH
        self._pause = 0
        self._paused_until = 0  # tokens in the text before the next proposal

    def propose(self, tokens: Sequence[int], limit: int) -> list[int]:
        """See `DraftProposer`."""
        for end in range(self._indexed, len(tokens)):  # the n-gram of the last token itself is not indexed yet
            for size, positions in zip(_NGRAM_SIZES, self._positions, strict=True):
                if end >= size:
                    positions[tuple(tokens[end - size : end])] = end
        self._indexed = len(tokens)
        if len(tokens) < self._paused_until:
            return []
        for size, positions in zip(_NGRAM_SIZES, self._positions, strict=True):
            position = positions.get(tuple(tokens[-size:])) if len(tokens) >= size else None
            if position is not None:
                return list(tokens[position : position + min(self._length, limit)])
        return []

    def record_acceptance(self, proposed: int, accepted: int, total: int) -> None:
        """See `DraftProposer`."""
        if not proposed:
            return
        if accepted == proposed:
            self._length = min(2 * self._length, MAX_DRAFT_TOKENS)
        else:
            self._length = max(accepted, _INITIAL_LENGTH)
        if accepted:
            self._pause = 0
        else:
            self._pause = min(2 * self._pause + 1, _MAX_PAUSE)
            self._paused_until = total + self._pause
