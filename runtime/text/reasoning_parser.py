"""`ReasoningParser`: finds the boundaries between reasoning and answer in the tokens of a generation.

A model delimits its reasoning with two tokens (`ReasoningTokens`), or by two texts of several tokens (`ReasoningTags`),
which may begin and end within a token. `ReasoningDelimiters` are those of a bundle; a `ReasoningParser` follows the
tokens of one answer.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np

from llm_edge.runtime.bundle import ReasoningTags, ReasoningTokens
from llm_edge.runtime.errors import BundleError
from llm_edge.runtime.sampling.transforms import Ids
from llm_edge.runtime.text.holdback import TagSplitter, overlap
from llm_edge.runtime.text.tokenizer import TextStream, Tokenizer

_NONE: Ids = np.array([], np.intp)


class ReasoningDelimiters:
    """The delimiters around the reasoning of a bundle's model. Thread-safe.

    Attributes:
        start, end: their text.
        opening, closing: ids of the tokens that write them; one each if they are tokens.
        tags: they are searched for in the text, not among the tokens.
        special: those of these ids that are special tokens.

    Raises:
        BundleError: the tokenizer does not have these tokens, or cannot write these texts.
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
        """The tokens that would complete the end delimiter after a text that ends with `tail`.

        Returns:
            all of them, and those that would also begin the answer.
        """
        written = overlap(tail, self.end)
        if written not in self._ending:
            texts = {token: self.end[:written] + text for token, text in self._candidates.items()}
            after = {token: text.partition(self.end)[2] for token, text in texts.items() if self.end in text}
            some = [token for token, rest in after.items() if rest.strip() or (rest and not rest.endswith("\n"))]
            self._ending[written] = np.array([*after], np.intp), np.array(some, np.intp)
        return self._ending[written]

    @functools.cached_property
    def _candidates(self) -> Mapping[int, str]:
        """Tokens that contain the end delimiter's last character, and their texts."""
        found = self.tokenizer.texts_with(self.end[-1], range(self.tokenizer.vocab_size))
        return found | {token: self.tokenizer.token_text(token) or "" for token in self.special}

    def _text(self, token: int) -> str:
        text = self.tokenizer.token_text(token)
        if text is None:
            raise BundleError("tokenizer.json lacks the tokens of 'reasoning': export the bundle again")
        return text

    def _written(self, text: str) -> tuple[int, ...]:
        ids = tuple(self.tokenizer.encode(text, parse_special=True))
        if text not in self.tokenizer.decode(ids, skip_special=False):
            raise BundleError(f"tokenizer.json cannot write {text!r} of 'reasoning_tags': export the bundle again")
        return ids


class ReasoningParser:
    """Follows the tokens of one answer; this class is for models without reasoning and finds no boundaries.

    Attributes:
        inside: the next token belongs to the reasoning, as far as is known.
        ended: the last delimiter seen, including those in the prompt, is an end.
        at_delimiter: the prompt ends with a delimiter.
        count: number of reasoning tokens, including those of its delimiters; a second end is not included.
        spent: the same without delimiters. Tokens that begin an end delimiter count until it is complete.
    """

    def __init__(self, tokenizer: Tokenizer, shown: Iterable[int] = ()) -> None:
        self._text = TextStream(tokenizer, shown=shown)
        self.inside = self.ended = self.at_delimiter = False
        self.count = self.spent = 0

    def push(self, token: int) -> list[str]:
        """Add a token; returns the text that is final now, split at the boundaries in it.

        The first part belongs to the current section, and each further part to the other section than the part before
        it. Delimiters have no text.
        """
        return [self._text.push(token)]

    def flush(self) -> str:
        """Return the held-back text of the current section."""
        return self._text.flush()

    def ending(self) -> tuple[Ids, Ids]:
        """The tokens that would end reasoning now: all of them, and those that would also begin the answer."""
        return _NONE, _NONE


class TokenParser(ReasoningParser):
    """Finds delimiters that are tokens."""

    def __init__(self, delimiters: ReasoningDelimiters, prompt: Sequence[int], turns: Iterable[int] = ()) -> None:
        super().__init__(delimiters.tokenizer)
        (self._start,), (self._end,) = delimiters.opening, delimiters.closing
        pair = ReasoningTokens(self._start, self._end)
        self.inside = opens_reasoning(prompt, pair, delimiters.tokenizer.special_ids.union(turns))
        seen = [token for token in prompt if token in (self._start, self._end)]
        self.ended = seen[-1:] == [self._end]
        self.at_delimiter = bool(seen) and prompt[-1] == seen[-1]

    def push(self, token: int) -> list[str]:
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
        return np.array([self._end]), _NONE


class TagParser(ReasoningParser):
    """Finds delimiters that are text; see `TagSplitter`."""

    def __init__(self, delimiters: ReasoningDelimiters, prompt: Sequence[int], turns: Iterable[int] = ()) -> None:
        super().__init__(delimiters.tokenizer, delimiters.special)
        self._delimiters = delimiters
        self._hidden = [delimiters.tokenizer.token_text(token) or "" for token in delimiters.special]
        self._tail = ""
        self._waiting = 0  # answer tokens that contain what may become the start tag
        self._prompt(prompt, delimiters.tokenizer.special_ids.union(turns) - {*delimiters.opening, *delimiters.closing})
        blank = self.at_delimiter or not self.inside
        self._splitter = TagSplitter(delimiters.start, delimiters.end, inside=self.inside, blank=blank)

    def push(self, token: int) -> list[str]:
        was, waiting, text = self.inside, self._waiting, self._text.push(token)
        seen = self._tail + text
        self._tail = seen[1 - len(self._delimiters.end) :]
        self.ended |= self._delimiters.end in seen
        parts = self._splitter.push(text)
        self.inside = self._splitter.inside
        self._waiting = waiting + (not was) if self._splitter.text and not self.inside else 0
        if len(parts) > 1:
            self.count += waiting + 1
            self.ended = not self.inside
        else:
            self.count += was
            self.spent += was
        return [self._without_special(part) for part in parts]

    def flush(self) -> str:
        return self._without_special(self._splitter.flush() + self._text.flush())

    def ending(self) -> tuple[Ids, Ids]:
        return self._delimiters.ending(self._tail)

    def _prompt(self, prompt: Sequence[int], closing: frozenset[int]) -> None:
        """Set the initial state: a start tag followed by a special token or the end of a turn is quoted text."""
        start, end, decode = self._delimiters.start, self._delimiters.end, self._delimiters.tokenizer.decode
        whole = decode(prompt, skip_special=False)
        self.ended = whole.rfind(end) > whole.rfind(start)
        last = next((place for place in reversed(range(len(prompt))) if prompt[place] in closing), -1)
        text = decode(prompt[last + 1 :], skip_special=False)
        self.inside = text.rfind(start) > text.rfind(end)
        self.at_delimiter = text.rstrip().endswith((start, end))

    def _without_special(self, text: str) -> str:
        for special in self._hidden:
            text = text.replace(special, "")
        return text


def opens_reasoning(prompt: Sequence[int], tokens: ReasoningTokens, closing: Iterable[int] = ()) -> bool:
    """Whether the last start token is followed by neither the end token nor any of `closing`.

    Those are special tokens and the end of a turn: a start token before them is quoted text. (In many vocabularies
    `<think>` is not a special token, so users can type it.)
    """
    boundaries = {*closing, tokens.end} - {tokens.start}
    last = next((token for token in reversed(prompt) if token == tokens.start or token in boundaries), None)
    return last == tokens.start


def reasoning_parser(
    delimiters: ReasoningDelimiters | None, tokenizer: Tokenizer, prompt: Sequence[int] = (), turns: Iterable[int] = ()
) -> ReasoningParser:
    """The parser for an answer to a prompt, which may end within reasoning; `turns` are the ids that end a turn."""
    if delimiters is None:
        return ReasoningParser(tokenizer)
    return (TagParser if delimiters.tags else TokenParser)(delimiters, prompt, turns)
