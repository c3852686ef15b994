"""`fit_to_context`: drops the oldest turns of a conversation that exceeds the model's context."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from llm_edge.runtime.errors import ContextLengthError
from llm_edge.runtime.text.prompts import Message

T = TypeVar("T")


def fit_to_context(
    start: Callable[[list[Message]], T], system: Sequence[Message], turns: Sequence[Message], question: Message
) -> tuple[T, list[Message], int]:
    """Start an answer, without the oldest turns if the conversation is too long.

    Args:
        start: starts an answer to messages; raises ContextLengthError if they do not fit.
        system: the system prompt, if there is one.
        turns: questions and answers in turn.
        question: the latest question.

    Returns:
        What `start` returned, the turns that were kept, and the context's length in tokens (0 if all were kept).

    Raises:
        ContextLengthError: the question alone does not fit.
    """
    kept, limit = list(turns), 0
    while True:
        try:
            return start([*system, *kept, question]), kept, limit
        except ContextLengthError as error:
            if not kept:
                raise
            kept, limit = kept[2:], error.limit


def dropped_note(count: int, limit: int) -> str:
    """One line that reports dropped turns."""
    dropped = "turn was" if count == 1 else f"{count} turns were"
    return f"the oldest {dropped} left out: the model's context holds {limit} tokens"
