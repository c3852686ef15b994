"""Reasoning and answer as a reader sees them: while they are drawn, and in conversations. Knows no model or sampler.

A reasoning model draws its reasoning between two marks (`<think>` and `</think>` in many vocabularies, a token or
several each) and then its answer. The first of them is drawn too, or the prompt ends with it. Where they are is told
by `ReasoningParser`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from llm_edge.runtime.text.chat_template import REASONING_FIELDS
from llm_edge.runtime.text.reasoning_parser import ReasoningParser
from llm_edge.runtime.text.tokenizer import StopStrings


class TextDelta(NamedTuple):
    """Text of one side, and whether that is the reasoning."""

    text: str
    reasoning: bool


class AnswerStream:
    """Turns the tokens of an answer into text, reasoning and answer apart.

    The texts of a side add up to `Tokenizer.decode` of its tokens from one border to the next, but for three things:

    - The marks have no text, also where tokenizer.json does not call their tokens special. A second start within a
      reasoning, and a second end within an answer, do nothing at all; `TagBorders` tells when marks that are texts
      are just that.
    - Blank lines directly behind either mark are left out, and a side of white space alone is empty. Models put
      them there to set the sides apart, which is no longer needed: they would stand at the top of every answer,
      and a stop string of two newlines would end it before it began. White space at the start of a line with
      text stays: it may be the indentation of code.
    - Stop strings end the answer alone, as hosted OpenAI-compatible services have it and vLLM since its pull
      request 14550. A reasoning often quotes what the answer is to end with.

    Text that waited for the rest of a character, of a mark or of a stop string is returned at a border, so none of it
    can turn up on the other side.

    Args:
        borders: of the answer; `push` hands its tokens on to them.
        stops: strings that end the answer.
    """

    def __init__(self, borders: ReasoningParser, stops: Iterable[str]) -> None:
        self._borders = borders
        self._stops = StopStrings(stops)
        self._inside = borders.inside
        self._blank: str | None = "" if borders.bordered else None  # None: behind the blank lines

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._stops.stopped

    @property
    def reasoning_tokens(self) -> int:
        """How many tokens were reasoning; see `ReasoningParser.count`."""
        return self._borders.count

    def change_stops(self, stops: Iterable[str]) -> None:
        """Other strings end the answer from here on."""
        self._stops.change(stops)

    def push(self, token: int) -> list[TextDelta]:
        """Take a token; return the text that is certain now: mostly one passage, which may be empty."""
        first, *others = self._borders.push(token)
        passages = [self._passage(first)]
        for text in others:
            passages.append(TextDelta(self._stops.flush(), self._inside))
            if self.stopped:
                break
            self._inside, self._blank = not self._inside, ""
            passages.append(self._passage(text))
        return joined(passages)

    def flush(self) -> TextDelta:
        """Return what was held back, for no more text of this side will come."""
        text, reasoning = self._passage(self._borders.flush())
        return TextDelta(text + self._stops.flush(), reasoning)

    def _passage(self, text: str) -> TextDelta:
        if self._blank is not None:
            whole = self._blank + text
            text = without_blank_lines(whole)
            self._blank = None if text else whole[whole.rfind("\n") + 1 :]
        return TextDelta(text if self._inside else self._stops.push(text)[0], self._inside)


def joined(passages: Iterable[TextDelta]) -> list[TextDelta]:
    """Passages without empty ones, and neighbours of one side as one; at least one, so it may be empty."""
    found: list[TextDelta] = []
    for passage in passages:
        if not found:
            found.append(passage)
        elif passage.text and (passage.reasoning == found[-1].reasoning or not found[-1].text):
            found[-1] = TextDelta(found[-1].text + passage.text, passage.reasoning)
        elif passage.text:
            found.append(passage)
    return found


def without_blank_lines(text: str) -> str:
    """The text from the first line on that has more than white space in it."""
    white = len(text) - len(text.lstrip())
    return text[text.rfind("\n", 0, white) + 1 :] if white < len(text) else ""


def apart(messages: Any, start: str, end: str) -> Any:
    """Messages in which the assistant's reasoning is a field of its own, as templates know it.

    Content `…⟨end⟩answer` becomes `reasoning_content`, without a start text that it begins with, and `content`,
    both without blank lines around the border. Messages that have such a field already, and whatever is no
    message, stay as they are. Where a content holds the end text several times, the last one counts.
    """
    if not isinstance(messages, list | tuple):
        return messages
    return [_apart(message, start, end) for message in messages]


def _apart(message: Any, start: str, end: str) -> Any:
    if not isinstance(message, Mapping) or message.get("role") != "assistant":
        return message
    content = message.get("content")
    if not isinstance(content, str) or end not in content:
        return message
    if any(message.get(name) is not None for name in REASONING_FIELDS):
        return message
    reasoning, _, answer = content.rpartition(end)
    reasoning = without_blank_lines(reasoning.lstrip().removeprefix(start)).rstrip()
    return {**message, "reasoning_content": reasoning, "content": without_blank_lines(answer)}
