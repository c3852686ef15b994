"""`Questions`: the list of sample questions, which the user can edit."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

from llm_edge.chat.settings import Section, Settings, texts
from llm_edge.chat.text import printable
from llm_edge.runtime.errors import InputError, ParameterError

SHIPPED: Final = (
    "What is the fastest animal?",
    "How many Rs are there in strawberry?",
    "If the Han dynasty Chinese fought the Romans, who would win?",
    "What is the capital of France?",
    "Explain quantum computing in simple terms",
    "Tell me a joke",
)
QUICK: Final = (
    *SHIPPED[:5],
    "What are the benefits of renewable energy?",
    "How does photosynthesis work?",
    "What is the difference between AI and machine learning?",
    "Tell me a joke",
    "What is the meaning of life?",
)
"""Those of the web page."""
MAX_QUESTIONS: Final = 500
MAX_LENGTH: Final = 20_000  # characters
SECTION: Final = Section[list[str]]("questions", lambda: list(SHIPPED), texts)
QUICK_SECTION: Final = Section[list[str]]("quick_questions", lambda: list(QUICK), texts)


class Questions:
    """The list of sample questions; methods that change it raise MachineError if the settings cannot be written."""

    def __init__(
        self, settings: Settings, section: Section[list[str]] = SECTION, shipped: Sequence[str] = SHIPPED
    ) -> None:
        self._settings = settings
        self._section = section
        self._shipped = shipped

    @property
    def trouble(self) -> str:
        """Why stored settings cannot be used, as one line; "" if they can."""
        return self._settings.trouble

    def all(self) -> list[str]:
        """All questions in the order in which they are listed."""
        return self._settings.get(self._section)

    def add(self, text: str) -> int:
        """Append a question; returns its index.

        Raises:
            ParameterError: it is empty, too long or a duplicate, or there are too many.
        """
        text = _clean(text)

        def change(before: list[str]) -> list[str]:
            _refuse_second(text, before)
            if len(before) >= MAX_QUESTIONS:
                raise ParameterError(f"there are {MAX_QUESTIONS} questions already: delete one first")
            return [*before, text]

        return len(self._settings.change(self._section, change)) - 1

    def edit(self, place: int, text: str) -> None:
        """Replace a question.

        Raises:
            InputError: there is none at this index, or the text is refused as in `add`.
        """
        text = _clean(text)

        def change(before: list[str]) -> list[str]:
            _refuse_missing(place, before)
            others = [*before[:place], *before[place + 1 :]]
            _refuse_second(text, others)
            return [*before[:place], text, *before[place + 1 :]]

        self._settings.change(self._section, change)

    def delete(self, place: int) -> str:
        """Delete a question; returns it.

        Raises:
            InputError: there is none at this index.
        """
        gone: list[str] = []

        def change(before: list[str]) -> list[str]:
            _refuse_missing(place, before)
            gone.append(before[place])
            return [*before[:place], *before[place + 1 :]]

        self._settings.change(self._section, change)
        return gone[0]

    def put_back(self, place: int, text: str) -> None:
        """Insert a deleted question where it was."""
        self._settings.change(
            self._section, lambda before: before if text in before else [*before[:place], text, *before[place:]]
        )

    def move(self, place: int, by: int) -> int:
        """Move a question by so many places, within the list; returns its new index.

        Raises:
            InputError: there is none at this index.
        """
        new = place

        def change(before: list[str]) -> list[str]:
            nonlocal new
            _refuse_missing(place, before)
            new = min(max(place + by, 0), len(before) - 1)
            others = [*before[:place], *before[place + 1 :]]
            return [*others[:new], before[place], *others[new:]]

        self._settings.change(self._section, change)
        return new

    def restore(self) -> int:
        """Restore the questions that come with the program, before the user's; returns how many were missing."""
        missing = [each for each in self._shipped if each not in self.all()]
        self._settings.change(
            self._section,
            lambda before: (
                [*self._shipped, *(each for each in before if each not in self._shipped)] if missing else before
            ),
        )
        return len(missing)


def _clean(text: str) -> str:
    text = printable(text.replace("\r\n", "\n").replace("\r", "\n")).strip()
    if not text:
        raise ParameterError("the question is empty: type it, or press Esc")
    if len(text) > MAX_LENGTH:
        raise ParameterError(f"the question is too long: use at most {MAX_LENGTH:,} characters")
    return text


def _refuse_second(text: str, others: list[str]) -> None:
    if text in others:
        raise ParameterError("this question already exists")


def _refuse_missing(place: int, questions: list[str]) -> None:
    if not 0 <= place < len(questions):
        raise InputError("this question no longer exists: another window changed the list")
