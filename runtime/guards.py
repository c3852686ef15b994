"""Logits processors against bad habits: endless newlines, a reasoning that ends twice or late. They see ids."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from llm_edge.runtime.sampler import Ids, Row

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
        return _without(row, banned[banned < row.size])


class SingleThinkEnd:
    """Bans the token `end` where it stands in the context already, and no `start` behind it."""

    def __init__(self, start: int, end: int) -> None:
        self._start, self._end = start, end
        self._looked_at = 0
        self._ended = False

    def __call__(self, row: Row, tokens: Sequence[int]) -> Row:
        """See `LogitsProcessor`."""
        for token in tokens[self._looked_at :]:
            if token in (self._start, self._end):
                self._ended = token == self._end
        self._looked_at = len(tokens)
        return _without(row, np.array([self._end])) if self._ended and self._end < row.size else row


class ThinkBudget:
    """Lets nothing but the token `end` be drawn where a reasoning has had its tokens.

    Args:
        start: id of the token that starts a reasoning.
        end: id of the token that ends it.
        budget: how many tokens are drawn for reasoning, all of an answer's together, without those two.
        inside: the prompt ends within a reasoning. What stands there is not counted.
    """

    def __init__(self, start: int, end: int, budget: int, *, inside: bool) -> None:
        self._start, self._end, self._left, self._inside = start, end, budget, inside
        self._looked_at: int | None = None

    def __call__(self, row: Row, tokens: Sequence[int]) -> Row:
        """See `LogitsProcessor`."""
        drawn = tokens[self._looked_at :] if self._looked_at is not None else ()
        self._looked_at = len(tokens)
        for token in drawn:
            if token in (self._start, self._end):
                self._inside = token == self._start
            elif self._inside:
                self._left -= 1
        if not self._inside or self._left > 0 or self._end >= row.size:
            return row
        out = np.full_like(row, -np.inf)
        out[self._end] = row[self._end]
        return out


def _without(row: Row, ids: Ids) -> Row:
    if ids.size == 0:
        return row
    out = row.copy()
    out[ids] = -np.inf
    return out
