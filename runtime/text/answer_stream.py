"""`AnswerStream`: turns tokens into text, with reasoning and answer separated.

A reasoning model generates its reasoning between two delimiters (`<think>` and `</think>` in many vocabularies, each of
one or several tokens) and then its answer. The start delimiter is generated too, or the prompt ends with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from llm_edge.runtime.text.chat_template import REASONING_FIELDS
from llm_edge.runtime.text.holdback import StopStrings
from llm_edge.runtime.text.reasoning_parser import ReasoningParser


class TextDelta(NamedTuple):
    """New text, and whether it is reasoning."""

    text: str
    reasoning: bool


class AnswerStream:
    """Turns the tokens of an answer into text, with reasoning and answer separated.

    The deltas of each section add up to `Tokenizer.decode` of its tokens, with three exceptions:

    - Delimiters have no text, even if tokenizer.json does not mark their tokens as special. A second start within
      reasoning and a second end within an answer are ignored; `TagParser` documents when text counts as a delimiter.
    - Blank lines directly after a delimiter are dropped, and a section of white space only is empty. Models generate
      them to separate the sections; they would begin every answer, and a stop string of two newlines would end it at
      once. White space at the start of a line with text is kept: it may be the indentation of code.
    - Stop strings end only the answer, as in hosted OpenAI-compatible services and vLLM since its pull request 14550:
      reasoning often quotes what the answer is to end with.

    Text held back as the possible start of a character, delimiter or stop string is returned at the next boundary, so
    it never appears in the other section.

    Args:
        parser: of the answer; `push` passes its tokens on.
        stops: strings that end the answer.
    """

    def __init__(self, parser: ReasoningParser, stops: Iterable[str]) -> None:
        self._parser = parser
        self._stops = StopStrings(stops)
        self._inside = parser.inside
        self._blank: str | None = "" if parser.at_delimiter else None  # None: after the blank lines

    @property
    def stopped(self) -> bool:
        """Whether a stop string has occurred."""
        return self._stops.found is not None

    @property
    def stop_string(self) -> str | None:
        """The stop string that occurred."""
        return self._stops.found

    @property
    def reasoning_tokens(self) -> int:
        """Number of reasoning tokens; see `ReasoningParser.count`."""
        return self._parser.count

    def change_stops(self, stops: Iterable[str]) -> None:
        """Use other stop strings from here on."""
        self._stops.change(stops)

    def push(self, token: int) -> list[TextDelta]:
        """Add a token; returns the text that is final now, usually one delta, which may be empty."""
        first, *others = self._parser.push(token)
        deltas = [self._delta(first)]
        for text in others:
            deltas.append(TextDelta(self._stops.flush(), self._inside))
            if self.stopped:
                break
            self._inside, self._blank = not self._inside, ""
            deltas.append(self._delta(text))
        return merge(deltas)

    def flush(self) -> TextDelta:
        """Return the text that was held back, because no more text of this section follows."""
        text, reasoning = self._delta(self._parser.flush())
        return TextDelta(text + self._stops.flush(), reasoning)

    def _delta(self, text: str) -> TextDelta:
        if self._blank is not None:
            whole = self._blank + text
            text = without_blank_lines(whole)
            self._blank = None if text else whole[whole.rfind("\n") + 1 :]
        return TextDelta(text if self._inside else self._stops.push(text)[0], self._inside)


def merge(deltas: Iterable[TextDelta]) -> list[TextDelta]:
    """Drop empty deltas and merge neighbours of the same section; returns at least one delta, which may be empty."""
    found: list[TextDelta] = []
    for delta in deltas:
        if not found:
            found.append(delta)
        elif delta.text and (delta.reasoning == found[-1].reasoning or not found[-1].text):
            found[-1] = TextDelta(found[-1].text + delta.text, delta.reasoning)
        elif delta.text:
            found.append(delta)
    return found


def without_blank_lines(text: str) -> str:
    """The text from its first non-blank line on."""
    white = len(text) - len(text.lstrip())
    return text[text.rfind("\n", 0, white) + 1 :] if white < len(text) else ""


def separate_reasoning(messages: Any, start: str, end: str) -> Any:
    """Move the reasoning in assistant messages to a separate field, as chat templates expect it.

    Content `…⟨end⟩answer` becomes `reasoning_content`, without a leading start delimiter, and `content`, both without
    blank lines at the boundary. Messages that have such a field already, and values that are not messages, stay as they
    are. If the end delimiter occurs several times, the last one counts.
    """
    if not isinstance(messages, list | tuple):
        return messages
    return [_separate(message, start, end) for message in messages]


def _separate(message: Any, start: str, end: str) -> Any:
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
