"""Titles that the model writes: when one is asked for, and what is made of its answer."""

from __future__ import annotations

import pytest

from llm_edge.chat.attachments import Attachment, with_attachments
from llm_edge.chat.history.conversation import Conversation, Message, title_of
from llm_edge.chat.titles import cleaned_title, needs_title


def conversation(*questions: str, title: str | None = None) -> Conversation:
    messages = {}
    for number, question in enumerate(questions):
        first = 2 * number + 1
        messages[first] = Message(first, first - 1 or None, "user", question)
        messages[first + 1] = Message(first + 1, first, "assistant", "An answer.")
    return Conversation(
        1, title_of(questions[0]) if title is None else title, messages=messages, leaf=2 * len(questions)
    )


@pytest.mark.parametrize(
    ("questions", "needed"),
    [
        (["What is the capital of France?"], False),
        (["Why?"], False),
        (["word " * 40], True),
        (["word " * 40, "And?", "So?"], False),
        (["Hi!"], False),
        (["Hi!", "What is the capital of France?"], True),
        ([with_attachments("", [Attachment("notes.txt", "text")])], True),
        ([with_attachments("What is this?", [Attachment("notes.txt", "text")])], False),
    ],
)
def test_a_title_is_needed_where_the_first_question_is_no_title(questions: list[str], needed: bool) -> None:
    assert needs_title(conversation(*questions)) is needed


def test_a_title_of_the_users_is_kept() -> None:
    assert not needs_title(conversation("word " * 40, title="Mine"))


@pytest.mark.parametrize(
    ("answer", "title"),
    [
        ("The Capital of France", "The Capital of France"),
        ('**Title:** "The Capital of France."\n\nIt is', "The Capital of France"),
        ("\n# Paris\x1b[31m \u202e", "Paris[31m"),
        ("", ""),
        ("...", ""),
        ("word " * 30, ""),
        ("x" * 200, ""),
    ],
)
def test_a_models_answer_becomes_a_title_only_if_it_is_short(answer: str, title: str) -> None:
    assert cleaned_title(answer) == title
