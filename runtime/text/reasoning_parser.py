"""Where reasoning and answer meet, found while they are drawn: by token or by text. Knows no sampler, graph or chat.

A model marks its reasoning by two tokens (`ReasoningTokens`), or by two texts of several tokens (`ReasoningTags`),
which may begin and end within a token. `ReasoningDelimiters` are those of a bundle; a `ReasoningParser` follows the
tokens of one answer and tells whether they are reasoning.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from llm_edge.runtime.bundle import ReasoningTags, ReasoningTokens
from llm_edge.runtime.errors import BundleError
from llm_edge.runtime.sampling.transforms import Ids
from llm_edge.runtime.text.tokenizer import TextStream, Tokenizer, overlap

_NONE: Ids = np.array([], np.intp)


class ReasoningDelimiters:
    """The two marks around a bundle's reasonings; for any threads at once.

    Args:
        reasoning: what the bundle says of them.
        tokenizer: of the bundle.

    Attributes:
        start, end: how they are written.
        opening, closing: ids of the tokens that write them; one each, where they are tokens.
        tags: they are looked for in the text.
        special: those of these ids that are special tokens.

    Raises:
        BundleError: the tokenizer has no such tokens, or cannot write such texts.
    """

    def __init__(self, reasoning: ReasoningTokens | ReasoningTags, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.tags = isinstance(reasoning, ReasoningTags)
        if isinstance(reasoning, ReasoningTags):
            self.start, self.end = reasoning.start, reasoning.end
            self.opening, self.closing = (self._written(text) for text in (self.start, self.end))
        else:
            self.start, self.end = self._text(reasoning.start), self._text(reasoning.end)
            self.opening, self.closing = (reasoning.start,), (reasoning.end,)
        self.special = tokenizer.special_ids.intersection(self.opening + self.closing)
        self._ending: dict[int, tuple[Ids, Ids]] = {}

    def ending(self, tail: str) -> tuple[Ids, Ids]:
        """The tokens that would complete the end text behind a text that ends with `tail`.

        Returns:
            All of them, and those that would bring something of the answer with them.
        """
        begun = overlap(tail, self.end)
        if begun not in self._ending:
            texts = {token: self.end[:begun] + text for token, text in self._candidates.items()}
            behind = {token: text.partition(self.end)[2] for token, text in texts.items() if self.end in text}
            some = [token for token, rest in behind.items() if rest.strip() or (rest and not rest.endswith("\n"))]
            self._ending[begun] = np.array([*behind], np.intp), np.array(some, np.intp)
        return self._ending[begun]

    @functools.cached_property
    def _candidates(self) -> Mapping[int, str]:
        """Tokens that have the end text's last character, and their texts."""
        found = self.tokenizer.texts_with(self.end[-1], range(self.tokenizer.vocab_size))
        return found | {token: self.tokenizer.token_text(token) or "" for token in self.special}

    def _text(self, token: int) -> str:
        text = self.tokenizer.token_text(token)
        if text is None:
            raise BundleError("tokenizer.json does not have the tokens of 'reasoning': export the bundle again")
        return text

    def _written(self, text: str) -> tuple[int, ...]:
        ids = tuple(self.tokenizer.encode(text, parse_special=True))
        if text not in self.tokenizer.decode(ids, skip_special=False):
            raise BundleError(f"tokenizer.json cannot write {text!r} of 'reasoning_tags': export the bundle again")
        return ids


class ReasoningParser:
    """The borders of one answer; those of this class are none, for all is answer.

    Attributes:
        inside: the next token belongs to the reasoning, as far as is known.
        ended: the last mark that was seen, in the prompt too, is an end.
        bordered: the prompt ends with a mark.
        count: how many of the answer's tokens were reasoning, those that write its marks included; a second end
            is not.
        spent: the same without marks. Tokens that begin an end text count until it is complete.
    """

    def __init__(self, tokenizer: Tokenizer, shown: Iterable[int] = ()) -> None:
        self._text = TextStream(tokenizer, shown=shown)
        self.inside = self.ended = self.bordered = False
        self.count = self.spent = 0

    def push(self, token: int) -> list[str]:
        """Take a token; return the text that is certain now, cut at the borders in it.

        The first text belongs to the side that was before, each other one to the other side than the one before it.
        Marks have no text.
        """
        return [self._text.push(token)]

    def flush(self) -> str:
        """Return what was held back of the side that is now."""
        return self._text.flush()

    def ending(self) -> tuple[Ids, Ids]:
        """The tokens that would end a reasoning now: all, and those that bring something of the answer with them."""
        return _NONE, _NONE


class TokenBorders(ReasoningParser):
    """Borders where one of two tokens comes, whatever its text."""

    def __init__(self, marks: ReasoningDelimiters, prompt: Sequence[int], turns: Iterable[int] = ()) -> None:
        super().__init__(marks.tokenizer)
        (self._start,), (self._end,) = marks.opening, marks.closing
        pair = ReasoningTokens(self._start, self._end)
        self.inside = opens_reasoning(prompt, pair, marks.tokenizer.special_ids.union(turns))
        seen = [token for token in prompt if token in (self._start, self._end)]
        self.ended = seen[-1:] == [self._end]
        self.bordered = bool(seen) and prompt[-1] == seen[-1]

    def push(self, token: int) -> list[str]:
        """See `ReasoningParser`."""
        if token not in (self._start, self._end):
            self.count += self.inside
            self.spent += self.inside
            return [self._text.push(token)]
        starts = token == self._start
        self.count += self.inside or starts
        self.ended = not starts
        if starts == self.inside:
            return [""]
        self.inside = starts
        return [self._text.flush(), ""]

    def ending(self) -> tuple[Ids, Ids]:
        """See `ReasoningParser`."""
        return np.array([self._end]), _NONE


class TagBorders(ReasoningParser):
    """Borders where one of two texts is complete.

    The start text opens a reasoning only where nothing but white space of the answer came before: further on, an
    answer may quote it, and so it may the end text. A start text that repeats the one before has no text. Text that
    may still become a tag is held back.
    """

    def __init__(self, marks: ReasoningDelimiters, prompt: Sequence[int], turns: Iterable[int] = ()) -> None:
        super().__init__(marks.tokenizer, marks.special)
        self._marks = marks
        self._hidden = [marks.tokenizer.token_text(token) or "" for token in marks.special]
        self._held = self._tail = ""
        self._waiting = 0  # tokens of the answer that hold what may become the start text
        self._prompt(prompt, marks.tokenizer.special_ids.union(turns) - {*marks.opening, *marks.closing})
        self._blank = self.bordered or not self.inside  # the side has nothing but white space so far

    def push(self, token: int) -> list[str]:
        """See `ReasoningParser`."""
        was, waiting, text = self.inside, self._waiting, self._text.push(token)
        seen = self._tail + text
        self._tail = seen[1 - len(self._marks.end) :]
        self.ended |= self._marks.end in seen
        parts = self._cut(self._held + text)
        self._waiting = waiting + (not was) if self._held and not self.inside else 0
        if len(parts) > 1:
            self.count += waiting + 1
            self.ended = not self.inside
        else:
            self.count += was
            self.spent += was
        return [self._without_special(part) for part in parts]

    def flush(self) -> str:
        """See `ReasoningParser`."""
        text, self._held = self._held + self._text.flush(), ""
        return self._without_special(text)

    def ending(self) -> tuple[Ids, Ids]:
        """See `ReasoningParser`."""
        return self._marks.ending(self._tail)

    def _prompt(self, prompt: Sequence[int], closing: frozenset[int]) -> None:
        """What the prompt leaves: a start text that a special token or the end of a turn follows is somebody's."""
        start, end, decode = self._marks.start, self._marks.end, self._marks.tokenizer.decode
        whole = decode(prompt, skip_special=False)
        self.ended = whole.rfind(end) > whole.rfind(start)
        last = next((place for place in reversed(range(len(prompt))) if prompt[place] in closing), -1)
        text = decode(prompt[last + 1 :], skip_special=False)
        self.inside = text.rfind(start) > text.rfind(end)
        self.bordered = text.rstrip().endswith((start, end))

    def _cut(self, text: str) -> list[str]:
        start, end = self._marks.start, self._marks.end
        parts = [""]
        while True:
            lead = text.lstrip() if self._blank else ""
            if lead.startswith(start):
                tag, at = start, len(text) - len(lead)
            elif self.inside and end in text:
                tag, at = end, text.find(end)
            else:
                break
            parts[-1] += text[:at]
            text = text[at + len(tag) :]
            if self.inside == (tag == end):
                self.inside = not self.inside
                parts.append("")
            self._blank = True
        held = len(lead) if start.startswith(lead) else 0
        if self.inside:
            held = max(held, overlap(text, end))
        text, self._held = text[: len(text) - held], text[len(text) - held :]
        parts[-1] += text
        self._blank = self._blank and not text.strip()
        return parts

    def _without_special(self, text: str) -> str:
        for special in self._hidden:
            text = text.replace(special, "")
        return text


def opens_reasoning(prompt: Sequence[int], tokens: ReasoningTokens, closing: Iterable[int] = ()) -> bool:
    """Whether the last start token has no end token behind it, and none of `closing`.

    Those are special tokens and what ends a turn: a start token before them is somebody's text. (`<think>` is no
    special token in many vocabularies, so whoever types it gets it.)
    """
    borders = {*closing, tokens.end} - {tokens.start}
    last = next((token for token in reversed(prompt) if token == tokens.start or token in borders), None)
    return last == tokens.start


def reasoning_parser(
    marks: ReasoningDelimiters | None, tokenizer: Tokenizer, prompt: Sequence[int] = (), turns: Iterable[int] = ()
) -> ReasoningParser:
    """The borders of an answer to a prompt.

    Args:
        marks: None = all is answer.
        tokenizer: of the model.
        prompt: what stands before; it may end within a reasoning.
        turns: ids that end a turn.
    """
    if marks is None:
        return ReasoningParser(tokenizer)
    return TagBorders(marks, prompt, turns) if marks.tags else TokenBorders(marks, prompt, turns)
