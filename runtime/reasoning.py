"""Reasoning and answer, told apart while they are drawn, and in conversations. Knows no model, session or sampler.

A reasoning model draws its reasoning between two tokens (`ReasoningTokens`; `<think>` and `</think>` in many
vocabularies) and then its answer. The first of them is drawn too, or the prompt ends with it.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from llm_edge.runtime.bundle import ReasoningTokens
from llm_edge.runtime.chat import REASONING_FIELDS
from llm_edge.runtime.tokenizer import StopStrings, TextStream, Tokenizer


class AnswerStream:
    """Turns the tokens of an answer into text, reasoning and answer apart.

    What `push` and `flush` return belongs to one side, and `reasoning` says to which. The texts of a side add up
    to `Tokenizer.decode` of its tokens from one border to the next, but for three things:

    - The two tokens themselves have no text, also where tokenizer.json does not call them special. A second start
      within a reasoning, and a second end within an answer, do nothing at all.
    - Blank lines directly behind either token are left out, and a side of white space alone is empty. Models put
      them there to set the sides apart, which is no longer needed: they would stand at the top of every answer,
      and a stop string of two newlines would end it before it began. White space at the start of a line with
      text stays: it may be the indentation of code.
    - Stop strings end the answer alone, as hosted OpenAI-compatible services have it and vLLM since its pull
      request 14550. A reasoning often quotes what the answer is to end with.

    Text that waited for the rest of a character or of a stop string is returned at a border, so none of it can
    turn up on the other side.

    Args:
        tokenizer: of the model.
        stops: strings that end the answer.
        tokens: the two tokens; None = all is answer.
        prompt: what stands before; the first token is reasoning if `opens_reasoning(…)`.
        turns: ids that end a turn.

    Attributes:
        inside: the next token belongs to the reasoning, unless it is one of the two.
        reasoning: the text that was returned last belongs to the reasoning.
        reasoning_tokens: how many tokens were reasoning, the two included; a second end is not.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stops: Iterable[str],
        tokens: ReasoningTokens | None,
        prompt: Sequence[int],
        turns: Iterable[int] = (),
    ) -> None:
        self._text = TextStream(tokenizer)
        self._stops = StopStrings(stops)
        self._tokens = tokens
        borders = (tokens.start, tokens.end) if tokens is not None else ()
        self.inside = tokens is not None and opens_reasoning(prompt, tokens, tokenizer.special_ids.union(turns))
        self._blank: str | None = "" if prompt and prompt[-1] in borders else None  # None: behind the blank lines
        self.reasoning = self.inside
        self.reasoning_tokens = 0

    @property
    def stopped(self) -> bool:
        """Whether a stop string has come."""
        return self._stops.stopped

    def push(self, token: int) -> str:
        """Take a token; return the text that is certain now, which may be none."""
        self.reasoning = self.inside
        if self._tokens is not None and token in (self._tokens.start, self._tokens.end):
            starts = token == self._tokens.start
            self.reasoning_tokens += self.inside or starts
            return self._cross() if starts != self.inside else ""
        self.reasoning_tokens += self.inside
        return self._shown(self._text.push(token))

    def flush(self) -> str:
        """Return what was held back, for no more text of this side will come."""
        text = self._shown(self._text.flush()) + self._stops.flush()
        if text:
            self.reasoning = self.inside
        return text

    def _cross(self) -> str:
        text = self.flush()
        self.inside, self._blank = not self.inside, ""
        return text

    def _shown(self, text: str) -> str:
        if self._blank is not None:
            whole = self._blank + text
            text = without_blank_lines(whole)
            self._blank = None if text else whole[whole.rfind("\n") + 1 :]
        return text if self.inside else self._stops.push(text)[0]


def opens_reasoning(prompt: Sequence[int], tokens: ReasoningTokens, closing: Iterable[int] = ()) -> bool:
    """Whether the last start token has no end token behind it, and none of `closing`.

    Those are special tokens and what ends a turn: a start token before them is somebody's text. (`<think>` is no
    special token in many vocabularies, so whoever types it gets it.)
    """
    borders = {*closing, tokens.end} - {tokens.start}
    last = next((token for token in reversed(prompt) if token == tokens.start or token in borders), None)
    return last == tokens.start


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
