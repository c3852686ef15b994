"""Guesses at the next tokens from what stands in the text already (prompt lookup). Knows ids alone.

Where the last few tokens stood earlier, whatever followed there is guessed again: quoted passages and edited files come
out several tokens a step. After Saxena, "Prompt Lookup Decoding" (2023). What is guessed depends on the text and on
what became of earlier guesses alone, never on time or load.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

MOST = 15
"""Tokens a guess holds at most."""
_SIZES = (5, 3)  # tokens that must agree, the longer ones tried first
_FIRST = 4  # tokens of the first guess
_PATIENCE = 64  # tokens drawn in vain make guessing rest at most


class DraftProposer(Protocol):
    """The guesses of one answer, wherever they come from."""

    def guess(self, tokens: list[int], most: int) -> list[int]:
        """What may follow `tokens`, at most so many; none for nothing. `tokens` only grows from call to call."""

    def tell(self, length: int, right: int, drawn: int) -> None:
        """Of a guess of `length` tokens the first `right` ones came; `drawn` tokens stand in the text now."""


class PromptLookup:
    """The guesses of one answer.

    Guesses grow while they are right and shrink while they are wrong; wrong from the first token on, they rest, for
    longer each time.
    """

    def __init__(self) -> None:
        self._places: list[dict[tuple[int, ...], int]] = [{} for _ in _SIZES]
        self._known = 0  # tokens whose endings are among the places
        self._length = _FIRST
        self._rest = 0
        self._until = 0  # tokens in the text before the next guess

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        """What may follow `tokens`, at most so many; none for nothing. `tokens` only grows from call to call."""
        for end in range(self._known, len(tokens)):  # the last token's own ending is not among them yet
            for size, places in zip(_SIZES, self._places, strict=True):
                if end >= size:
                    places[tuple(tokens[end - size : end])] = end
        self._known = len(tokens)
        if len(tokens) < self._until:
            return []
        for size, places in zip(_SIZES, self._places, strict=True):
            place = places.get(tuple(tokens[-size:])) if len(tokens) >= size else None
            if place is not None:
                return list(tokens[place : place + min(self._length, most)])
        return []

    def tell(self, length: int, right: int, drawn: int) -> None:
        """Of a guess of `length` tokens the first `right` ones came; `drawn` tokens stand in the text now."""
        if not length:
            return
        if right == length:
            self._length = min(2 * self._length, MOST)
        else:
            self._length = max(right, _FIRST)
        if right:
            self._rest = 0
        else:
            self._rest = min(2 * self._rest + 1, _PATIENCE)
            self._until = drawn + self._rest
