"""Conversations that outgrow a model's context: whole turns go, the oldest first. Knows no store and no screen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from llm_edge.runtime.errors import ContextLengthError
from llm_edge.runtime.text.prompts import Message

Begun = TypeVar("Begun")


def fit_to_context(
    begin: Callable[[list[Message]], Begun], opening: Sequence[Message], turns: Sequence[Message], question: Message
) -> tuple[Begun, list[Message], int]:
    """Begin an answer to the opening, the turns (question, answer, question, answer …) and a question.

    Returns:
        what `begin` gave, the turns it was given, and the model's limit of tokens, which is 0 where none were dropped.

    Raises:
        ContextLengthError: the question alone does not fit.
    """
    kept, limit = list(turns), 0
    while True:
        try:
            return begin([*opening, *kept, question]), kept, limit
        except ContextLengthError as error:
            if not kept:
                raise
            kept, limit = kept[2:], error.limit


def dropped_note(count: int, limit: int) -> str:
    """That turns were left out, in a line."""
    gone = "turn was" if count == 1 else f"{count} turns were"
    return f"the oldest {gone} left out: the model's context holds {limit} tokens"
