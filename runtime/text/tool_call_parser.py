"""`ToolCallParser`: finds the calls of tools in an answer while it is generated."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from llm_edge.runtime.text.tool_format import ToolFormat


@dataclass(frozen=True, slots=True)
class CallStarted:
    """A call of this function begins."""

    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """More of the JSON text of the arguments of the latest call."""

    text: str


AnswerPart = str | CallStarted | CallArguments
"""Text of the answer, or a part of a call."""
State = Callable[[], Iterator[AnswerPart] | None]
"""Consumes from the buffer and returns what it found, or None if it needs more text."""


class ToolCallParser:
    """Splits an answer into text and calls.

    Answers are held to the format by `tool_constraint`; text that deviates from it nevertheless is returned as text.

    Args:
        form: how calls are written; special tokens as their spelling.
        text_type: whether an argument of a function is text, where the format does not quote it.
    """

    def __init__(self, form: ToolFormat, text_type: Callable[[str, str], bool] = lambda _function, _name: True) -> None:
        self._form = form
        self._text_type = text_type
        self._buffer = ""
        self._state: State = self._search
        self._started = False
        self._function = ""
        self._json = _JsonEnd()
        self._values: dict[str, Any] = {}

    @property
    def called(self) -> bool:
        """Whether a call has begun."""
        return self._started

    @property
    def unfinished(self) -> str | None:
        """What there is of the part of a call that is not complete; None = no call is open."""
        return None if self._state in (self._search, self._after, self._rest) else self._buffer

    def feed(self, text: str) -> list[AnswerPart]:
        """The parts that the next piece of an answer completes."""
        self._buffer += text
        parts: list[AnswerPart] = []
        while (found := self._state()) is not None:
            parts += found
        return parts

    def finish(self) -> list[AnswerPart]:
        """What is left at the end of the answer."""
        rest, self._buffer = self._buffer, ""
        return [rest] if rest and self._state == self._search else []

    def _search(self) -> Iterator[AnswerPart] | None:
        trigger = self._form.trigger
        at = self._buffer.find(trigger)
        if at >= 0:
            before, self._buffer = self._buffer[:at].rstrip(), self._buffer[at + len(trigger) :]
            self._state = self._literal(self._form.prefix.lstrip()[len(trigger) :], self._name, before=trigger)
            return iter([before] if before else [])
        held = next((n for n in range(min(len(trigger), len(self._buffer)), 0, -1) if self._ends_with(trigger[:n])), 0)
        spaces = len(self._buffer) - held - len(self._buffer[: len(self._buffer) - held].rstrip())
        ready = self._buffer[: len(self._buffer) - held - spaces]  # white space before a call is not part of the text
        if not ready:
            return None
        self._buffer = self._buffer[len(ready) :]
        return iter([ready])

    def _ends_with(self, text: str) -> bool:
        return self._buffer.endswith(text)

    def _literal(self, text: str, then: State, before: str = "") -> State:
        """A state that skips this text; `before` is what was skipped already, which is text if this one is missing."""

        def state() -> Iterator[AnswerPart] | None:
            if len(self._buffer) < len(text) and text.startswith(self._buffer):
                return None
            if not self._buffer.startswith(text):
                self._state = self._rest
                return iter([before] if before else [])
            self._buffer = self._buffer[len(text) :]
            self._state = then
            return iter([])

        return state

    def _name(self) -> Iterator[AnswerPart] | None:
        name, found, rest = self._buffer.partition(self._form.between)
        if not found:
            return None
        self._buffer, self._function, self._started = rest, name, True
        self._json, self._values = _JsonEnd(), {}
        self._state = self._arguments if self._form.parameters is None else self._parameters
        return iter([CallStarted(name)])

    def _arguments(self) -> Iterator[AnswerPart] | None:
        if not self._buffer:
            return None
        end = self._json.find(self._buffer)
        text = self._buffer if end is None else self._buffer[:end]
        self._buffer = self._buffer[len(text) :]
        if end is not None:
            self._state = self._literal(self._form.end, self._after)
        return iter([CallArguments(text)])

    def _parameters(self) -> Iterator[AnswerPart] | None:
        form = self._form.parameters
        assert form is not None
        head = (form.separator if self._values else "") + form.begin
        if self._buffer.startswith(self._form.end) and not (form.begin and self._buffer.startswith(head)):
            self._state = self._literal(self._form.end, self._after)
            return iter([CallArguments(json.dumps(self._values, ensure_ascii=False))])
        if not self._buffer.startswith(head):
            return None
        name, found, rest = self._buffer[len(head) :].partition(form.between)
        if not found:
            return None
        value, length = self._value(name, rest)
        if length is None:
            return None
        self._values[name] = value
        self._buffer = rest[length:]
        return iter([])

    def _value(self, name: str, text: str) -> tuple[Any, int | None]:
        """A value, and the length of it and the text after it; None = it is not complete."""
        form = self._form.parameters
        assert form is not None
        if not form.quoted and self._text_type(self._function, name):
            value, found, _ = text.partition(form.end)
            return value, len(value) + len(form.end) if found else None
        try:
            parsed, end = json.JSONDecoder().raw_decode(text)
        except ValueError:
            return None, None
        if not text.startswith(form.end, end) or end + len(form.end) >= len(text):  # a number may go on
            return None, None
        return parsed, end + len(form.end)

    def _after(self) -> Iterator[AnswerPart] | None:
        form = self._form
        following = None if form.separator is None else form.separator + form.begin
        for text, state in ((following, self._name), (form.closing or None, self._rest)):
            if text is not None and self._buffer.startswith(text):
                self._buffer, self._state = self._buffer[len(text) :], state
                return iter([])
        expected = [text for text in (following, form.closing) if text]
        if any(text.startswith(self._buffer) for text in expected) or not self._buffer:
            return None
        self._state = self._rest
        return iter([])

    def _rest(self) -> Iterator[AnswerPart] | None:
        if not self._buffer.strip():  # white space at the end is not part of the text
            return None
        rest, self._buffer = self._buffer, ""
        return iter([rest])


class _JsonEnd:
    """Finds the end of a JSON object in pieces of text."""

    def __init__(self) -> None:
        self._depth = 0
        self._string = self._escape = False

    def find(self, text: str) -> int | None:
        """The index after the object's last character; None = it goes on."""
        for at, char in enumerate(text):
            if self._escape:
                self._escape = False
            elif self._string:
                self._escape, self._string = char == "\\", char != '"'
            elif char == '"':
                self._string = True
            elif char in "{[":
                self._depth += 1
            elif char in "}]":
                self._depth -= 1
                if not self._depth:
                    return at + 1
        return None


def text_types(schemas: Mapping[str, Mapping[str, Any]]) -> Callable[[str, str], bool]:
    """`text_type` for functions with these schemas."""
    from llm_edge.runtime.sampling.tool_grammar import takes_text

    def text_type(function: str, name: str) -> bool:
        properties = schemas.get(function, {}).get("properties")
        return takes_text(properties.get(name)) if isinstance(properties, Mapping) else True

    return text_type
