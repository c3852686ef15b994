"""`choose_evaluation`: which conversations are kept for evaluation."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

MAX_CONVERSATIONS = 200  # each is computed several times during training


def choose_evaluation(keys: Iterable[bytes], share: float, seed: int) -> frozenset[bytes]:
    """The conversations, by `Conversation.key`, of which no copy may be trained.

    The choice depends on their content and the seed alone, not on their order in the file. With a share above 0 it has
    at least one conversation, unless there is only one.
    """
    distinct = sorted(set(keys), key=lambda key: hashlib.sha256(seed.to_bytes(8, "little") + key).digest())
    if share <= 0 or len(distinct) < 2:
        return frozenset()
    return frozenset(distinct[: min(MAX_CONVERSATIONS, max(1, round(share * len(distinct))))])
