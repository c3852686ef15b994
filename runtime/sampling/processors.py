"""Logits processors against bad habits: endless newlines, a reasoning that ends twice or late. They see ids."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from llm_edge.runtime.sampling.transforms import Ids, Row
from llm_edge.runtime.text.reasoning_parser import ReasoningParser

_NEWLINES = re.compile("\n+")


class Newlines:
    """The newline characters in a vocabulary, of which the sampler's logits have one each.

    Args:
        texts: the texts of all tokens with a newline character in them, by id.
    """

    def __init__(self, texts: Mapping[int, str]) -> None:
        self.whole = {token: len(text) for token, text in texts.items() if not text.strip("\n")}
        self.trailing = {token: len(text) - len(text.rstrip("\n")) for token, text in texts.items()}
        self.ids = np.fromiter(texts, np.intp, len(texts))  # [N]
        self.leading = np.array([len(text) - len(text.lstrip("\n")) for text in texts.values()], np.intp)  # [N]
        self.longest = np.array([max(map(len, _NEWLINES.findall(text))) for text in texts.values()], np.intp)  # [N]

    def before(self, tokens: Sequence[int], most: int) -> int:
        """How many newline characters these tokens end with; counted no further than `most` or a little more."""
        count = 0
        for token in reversed(tokens):
            if token not in self.whole:
                return count + self.trailing.get(token, 0)
            count += self.whole[token]
            if count >= most:
                break
        return count


class NewlineLimit:
    """Bans tokens that would put more than `most` newline characters in a row; those in `allowed` never.

    A character is in a row with those of the tokens before it, the prompt's too. A token without text, as
    special ones are, ends a row. A row in the prompt that is too long already just cannot grow.
    """

    def __init__(self, newlines: Newlines, most: int, allowed: Iterable[int] = ()) -> None:
        allowed = frozenset(allowed)
        free = np.array([token not in allowed for token in newlines.ids.tolist()], np.bool_)
        self._newlines, self._most = newlines, most
        self._ids, self._leading = newlines.ids[free], newlines.leading[free]
        self._always = newlines.longest[free] > most

    def __call__(self, row: Row, tokens: Sequence[int]) -> Row:
        """See `LogitsProcessor`."""
        room = self._most - self._newlines.before(tokens, self._most)
        banned = self._ids[self._always | ((self._leading > room) & (self._leading > 0))]
        return _without(row, banned)


class SingleThinkEnd:
    """Bans what would write the end of a reasoning where it stands in the context already, and no start behind it.

    Args:
        borders: of the answer; they have taken all tokens that were drawn, before each call.
    """

    def __init__(self, borders: ReasoningParser) -> None:
        self._borders = borders
        borders.ending()  # looks through the vocabulary here, and not while others wait for a step

    def __call__(self, row: Row, tokens: Sequence[int]) -> Row:  # noqa: ARG002 (a name of the protocol)
        """See `LogitsProcessor`."""
        return _without(row, self._borders.ending()[0]) if self._borders.ended else row


class TidyThinkEnd:
    """Bans tokens that would end a reasoning and begin the answer at once, of whose form nothing can be said then.

    Args:
        borders: as of `SingleThinkEnd`.
    """

    def __init__(self, borders: ReasoningParser) -> None:
        self._borders = borders
        borders.ending()  # looks through the vocabulary here, and not while others wait for a step

    def __call__(self, row: Row, tokens: Sequence[int]) -> Row:  # noqa: ARG002 (a name of the protocol)
        """See `LogitsProcessor`."""
        return _without(row, self._borders.ending()[1]) if self._borders.inside else row


class ThinkBudget:
    """Lets nothing be drawn but the tokens that end a reasoning, one after another, where it has had its tokens.

    Args:
        borders: as of `SingleThinkEnd`. What stands in the prompt is not counted.
        closing: ids of the tokens that write the end.
        budget: how many tokens are drawn for reasoning, all of an answer's together, without those of its marks.
    """

    def __init__(self, borders: ReasoningParser, closing: Sequence[int], budget: int) -> None:
        self._borders, self._closing, self._budget = borders, list(closing), budget

    def __call__(self, row: Row, tokens: Sequence[int]) -> Row:
        """See `LogitsProcessor`."""
        spent = self._borders.spent
        if not self._borders.inside or spent < self._budget:
            return row
        token = self._closing[self._begun(tokens, spent)]
        if token >= row.size:
            return row
        out = np.full_like(row, -np.inf)
        out[token] = 0 if np.isneginf(row[token]) else row[token]  # other guards may have banned it
        return out

    def _begun(self, tokens: Sequence[int], spent: int) -> int:
        """How many of the closing tokens were drawn last, by this or by chance."""
        most = min(len(self._closing) - 1, spent)
        return next((n for n in range(most, 0, -1) if list(tokens[-n:]) == self._closing[:n]), 0)


def _without(row: Row, ids: Ids) -> Row:
    if ids.size == 0:
        return row
    out = row.copy()
    out[ids[ids < row.size]] = -np.inf
    return out
