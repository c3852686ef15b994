"""Ready-made questions: those that come with the program, as a person has changed them. Knows no widgets."""

from __future__ import annotations

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
MOST: Final = 500
LONGEST: Final = 20_000  # characters
SECTION: Final = Section[list[str]]("questions", lambda: list(SHIPPED), texts, list)


class Questions:
    """See the module. Changes raise MachineError where the settings cannot be written.

    Args:
        settings: where they are kept once they are not those of the program.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings

    @property
    def trouble(self) -> str:
        """A line on what cannot be used of what is kept; "" where all can."""
        return self._settings.trouble

    def all(self) -> list[str]:
        """In the order in which they are offered."""
        return self._settings.get(SECTION)

    def add(self, text: str) -> int:
        """One more, behind the others; returns its place.

        Raises:
            ParameterError: it says nothing, is there already, or is too much.
        """
        text = _clean(text)

        def change(before: list[str]) -> list[str]:
            _refuse_second(text, before)
            if len(before) >= MOST:
                raise ParameterError(f"there are {MOST} questions already: delete one first")
            return [*before, text]

        return len(self._settings.change(SECTION, change)) - 1

    def edit(self, place: int, text: str) -> None:
        """Other words for one.

        Raises:
            InputError: there is none at this place, or see `add`.
        """
        text = _clean(text)

        def change(before: list[str]) -> list[str]:
            _refuse_missing(place, before)
            others = [*before[:place], *before[place + 1 :]]
            _refuse_second(text, others)
            return [*before[:place], text, *before[place + 1 :]]

        self._settings.change(SECTION, change)

    def delete(self, place: int) -> str:
        """Take one out; returns it.

        Raises:
            InputError: there is none at this place.
        """
        gone: list[str] = []

        def change(before: list[str]) -> list[str]:
            _refuse_missing(place, before)
            gone.append(before[place])
            return [*before[:place], *before[place + 1 :]]

        self._settings.change(SECTION, change)
        return gone[0]

    def put_back(self, place: int, text: str) -> None:
        """What was deleted, to where it was."""
        self._settings.change(
            SECTION, lambda before: before if text in before else [*before[:place], text, *before[place:]]
        )

    def move(self, place: int, by: int) -> int:
        """Change the order; returns the new place, which is the old one at an end of the list.

        Raises:
            InputError: there is none at this place.
        """
        new = place

        def change(before: list[str]) -> list[str]:
            nonlocal new
            _refuse_missing(place, before)
            new = min(max(place + by, 0), len(before) - 1)
            others = [*before[:place], *before[place + 1 :]]
            return [*others[:new], before[place], *others[new:]]

        self._settings.change(SECTION, change)
        return new

    def restore(self) -> int:
        """Bring those of the program back, in front; a person's own stay. Returns how many were missing."""
        missing = [each for each in SHIPPED if each not in self.all()]
        self._settings.change(
            SECTION, lambda before: [*SHIPPED, *(each for each in before if each not in SHIPPED)] if missing else before
        )
        return len(missing)


def _clean(text: str) -> str:
    text = printable(text.replace("\r\n", "\n").replace("\r", "\n")).strip()
    if not text:
        raise ParameterError("a question says something: write it, or press Esc")
    if len(text) > LONGEST:
        raise ParameterError(f"a question has {LONGEST:,} characters at most")
    return text


def _refuse_second(text: str, others: list[str]) -> None:
    if text in others:
        raise ParameterError("this question is there already")


def _refuse_missing(place: int, questions: list[str]) -> None:
    if not 0 <= place < len(questions):
        raise InputError("this question is gone: another window has changed the list")
