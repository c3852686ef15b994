"""`DraftProposer`: the interface of `PromptLookup` and `DraftModelProposer`."""

from __future__ import annotations

from typing import Protocol

MAX_DRAFT_TOKENS = 15
"""Maximum number of draft tokens in a step."""


class DraftProposer(Protocol):
    """Proposes draft tokens for one generation."""

    def propose(self, tokens: list[int], limit: int) -> list[int]:
        """Up to `limit` draft tokens to follow `tokens`, possibly none. Across calls, `tokens` is only appended to."""

    def record_acceptance(self, proposed: int, accepted: int, total: int) -> None:
        """Report that the first `accepted` of `proposed` draft tokens were right; the text has `total` tokens now."""
