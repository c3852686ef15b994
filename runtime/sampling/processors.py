"""Logits processors that limit newlines and control where reasoning ends."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from llm_edge.runtime.sampling.transforms import Row, mask_tokens
from llm_edge.runtime.text.reasoning_parser import ReasoningParser

_NEWLINES = re.compile("\n+")


class NewlineCounter:
    """Counts newline characters in the tokens of a vocabulary, given the texts of those that contain any, by id."""

    def __init__(self, texts: Mapping[int, str]) -> None:
        self.whole = {token: len(text) for token, text in texts.items() if not text.strip("\n")}
        self.trailing = {token: len(text) - len(text.rstrip("\n")) for token, text in texts.items()}
        self.ids = np.fromiter(texts, np.intp, len(texts))  # [N]
        self.leading = np.array([len(text) - len(text.lstrip("\n")) for text in texts.values()], np.intp)  # [N]
        self.longest = np.array([max(map(len, _NEWLINES.findall(text))) for text in texts.values()], np.intp)  # [N]

    def trailing_newlines(self, tokens: Sequence[int], limit: int) -> int:
        """The number of newline characters at the end of these tokens; counting stops at `limit` or a little above."""
        count = 0
        for token in reversed(tokens):
            if token not in self.whole:
                return count + self.trailing.get(token, 0)
            count += self.whole[token]
            if count >= limit:
                break
        return count


class NewlineLimit:
    """Bans tokens that would give more than `limit` consecutive newline characters, except those in `allowed`.

    Newlines at the end of the prompt count. A token without text, such as a special token, ends a run. A run in the
    prompt that is too long already just cannot grow.
    """

    def __init__(self, newlines: NewlineCounter, limit: int, allowed: Iterable[int] = ()) -> None:
        allowed = frozenset(allowed)
        free = np.array([token not in allowed for token in newlines.ids.tolist()], np.bool_)
        self._newlines, self._limit = newlines, limit
        self._ids, self._leading = newlines.ids[free], newlines.leading[free]
        self._always = newlines.longest[free] > limit

    def __call__(self, row: Row, tokens: Sequence[int]) -> Row:
        left = self._limit - self._newlines.trailing_newlines(tokens, self._limit)
        banned = self._ids[self._always | ((self._leading > left) & (self._leading > 0))]
        return mask_tokens(row, banned)


class SingleThinkEnd:
    """Bans tokens that would complete the end of reasoning again, if no new reasoning has started.

    The parser of the answer must have received all tokens drawn so far before each call.
    """

    def __init__(self, parser: ReasoningParser) -> None:
        self._parser = parser
        parser.ending()  # searches the vocabulary now rather than during a step

    def __call__(self, row: Row, tokens: Sequence[int]) -> Row:  # noqa: ARG002 (a name of the protocol)
        return mask_tokens(row, self._parser.ending()[0]) if self._parser.ended else row


class SplitThinkEnd(SingleThinkEnd):
    """Bans tokens that would both end the reasoning and begin the answer, which a constraint could not check."""

    def __call__(self, row: Row, tokens: Sequence[int]) -> Row:  # noqa: ARG002 (a name of the protocol)
        return mask_tokens(row, self._parser.ending()[1]) if self._parser.inside else row


class ReasoningBudget:
    """Once reasoning has used its budget, allows only the `closing` tokens that end it, one after another.

    Delimiters and reasoning in the prompt do not count. See `SingleThinkEnd` for the parser.
    """

    overrides_bans = True  # the reasoning ends even if its end is banned

    def __init__(self, parser: ReasoningParser, closing: Sequence[int], budget: int) -> None:
        self._parser, self._closing, self._budget = parser, list(closing), budget

    def __call__(self, row: Row, tokens: Sequence[int]) -> Row:
        spent = self._parser.spent
        if not self._parser.inside or spent < self._budget:
            return row
        token = self._closing[self._written(tokens, spent)]
        if token >= row.size:
            return row
        out = np.full_like(row, -np.inf)
        out[token] = 0 if np.isneginf(row[token]) else row[token]  # another processor may have banned it
        return out

    def _written(self, tokens: Sequence[int], spent: int) -> int:
        """How many of the closing tokens were drawn last."""
        limit = min(len(self._closing) - 1, spent)
        return next((n for n in range(limit, 0, -1) if list(tokens[-n:]) == self._closing[:n]), 0)
