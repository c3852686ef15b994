"""Answers that keep to a grammar: a mask over the logits of each token. Knows no model, session, sampler or text.

What a grammar allows next is computed by llguidance, over the bytes of the vocabulary's tokens. Where a model
reasons first, the mask waits for the end of the reasoning.
"""

from __future__ import annotations

import functools
import json
import queue
import re
import reprlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from llm_edge.runtime.errors import MachineError, ParameterError

if TYPE_CHECKING:  # it loads in 30 ms, which those who constrain nothing need not wait for
    from llguidance import LLMatcher, LLTokenizer

KINDS = ("json", "json_schema", "regex", "choice", "lark")
MOST_BYTES = 1_000_000
MOST_PATTERN_BYTES = 32_768  # of a grammar or expression that people write; llguidance takes minutes over larger ones
CACHED = 8
LEXER_STATES = 50_000  # of about 1.5 kB
SECONDS = 10.0  # to compile; see `_compiled_apart`
STACK = 255 << 20  # Windows takes no more

_starting = threading.Lock()  # the stack size of new threads is the process's
_AT = re.compile(r"^at \d+\(\d+\): ")
_BIG_MULTIPLE = re.compile(r'"multipleOf"\s*:\s*\d{6}')


@dataclass(frozen=True, slots=True)
class Constraint:
    """What an answer has to be as a whole; made by one of the functions below.

    JSON comes without white space between its parts. Strings, arrays and repetitions without a bound may go on
    until `max_tokens`, and the answer is cut off there: give `maxLength`, `maxItems` and `{1,20}` where it matters.

    Attributes:
        kind: `json`, `json_schema`, `regex`, `choice` or `lark`; messages name it.
        text: the JSON schema of the first two, a regular expression of the next two, the grammar of the last;
            at most 1 MB, of `regex` and `lark` 32 KiB.

    Raises:
        ParameterError: the kind or the text is none of these.
    """

    kind: str
    text: str

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ParameterError(f"constraint: {reprlib.repr(self.kind)} is no kind, give one of {', '.join(KINDS)}")
        if not isinstance(self.text, str) or not self.text:
            raise _refused(self.kind, f"{reprlib.repr(self.text)} is not a text that says something")
        try:
            size = len(self.text.encode())
        except UnicodeEncodeError as e:
            raise _refused(self.kind, "the text holds half a surrogate pair, which is no character") from e
        most = MOST_PATTERN_BYTES if self.kind in ("regex", "lark") else MOST_BYTES
        if size > most:
            raise _refused(self.kind, f"{size:,} bytes are more than the {most:,} allowed: shorten it")

    @staticmethod
    def json() -> Constraint:
        """Any JSON object."""
        return Constraint("json", '{"type":"object"}')

    @staticmethod
    def json_schema(schema: Mapping[str, object] | bool | str) -> Constraint:
        """JSON that a schema, or the JSON text of one, describes; keys come in the order of `properties`."""
        try:
            value = json.loads(schema) if isinstance(schema, str) else schema
            value = {} if value is True else dict(value) if isinstance(value, Mapping) else value
            text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
        except RecursionError as e:
            raise _refused("json_schema", "nested too deep") from e
        except (TypeError, ValueError) as e:
            raise _refused("json_schema", f"not JSON: {e}") from e
        if not isinstance(value, dict):
            raise _refused("json_schema", f"{reprlib.repr(value)} is no schema that anything follows, give an object")
        return Constraint("json_schema", text)

    @staticmethod
    def regex(pattern: str) -> Constraint:
        """Text that a regular expression matches from end to end; the syntax is that of Rust's regex crate.

        There, `\\d` and `\\w` are all digits and letters of Unicode; `^`, `$` and look-around are not needed or known.
        """
        return Constraint("regex", pattern)

    @staticmethod
    def lark(grammar: str) -> Constraint:
        """Text of a context-free grammar, which llguidance's docs/syntax.md tells how to write."""
        return Constraint("lark", grammar)

    @staticmethod
    def choice(options: Sequence[str]) -> Constraint:
        """One of some strings, none of them empty and all of them distinct."""
        good = isinstance(options, list | tuple) and all(isinstance(option, str) and option for option in options)
        if not good or not options or len(set(options)) < len(options):
            raise _refused("choice", f"{reprlib.repr(options)} is not a list of distinct strings, none of them empty")
        # One regular expression is one lexeme, of any size; the options as so many lexemes would be too many soon.
        return Constraint("choice", f"(?:{'|'.join(map(_literal, options))})")

    def check(self) -> None:
        """Find out, without a model, whether answers can be held to this; takes 1 ms to some seconds.

        Raises:
            ParameterError: they cannot, and why.
        """
        from llguidance import LLTokenizer

        _compiled_apart(LLTokenizer("byte"), self)


class Reasoning(Protocol):
    """Whether the next token belongs to a reasoning, after all tokens that were accepted so far and the next one."""

    @property
    def inside(self) -> bool:
        """Whether it does."""


class ConstraintProcessor:
    """The `LogitsProcessor` of one answer; `Constraints.start` makes it. Its place is before all others.

    (The sampler passes over a processor that leaves nothing to be drawn, and of two it is the second.)

    A token that was drawn is taken by `accept`, or else by the next call. What stands in `tokens` at the first
    call is the prompt, as far as it was not accepted.
    """

    def __init__(
        self,
        kind: str,
        matcher: LLMatcher,
        afresh: Callable[[], LLMatcher],
        ends: frozenset[int],
        never: NDArray[np.intp],
        reasoning: Reasoning | None,
        opener: Sequence[int],
    ) -> None:
        self._kind, self._matcher, self._ends, self._never = kind, matcher, ends, never
        self._reasoning, self._opener = reasoning, list(opener)  # what is left of it, as long as it can be drawn
        self._inside = reasoning is not None and reasoning.inside
        self._opens = False  # what was taken is the opener's beginning, and nothing else
        self._afresh: Callable[[], LLMatcher] | None = afresh
        self._seen: int | None = None
        self._taken: list[int] = []
        self._ended = False

    def __call__(self, row: NDArray[np.float32], tokens: Sequence[int]) -> NDArray[np.float32]:
        """See `LogitsProcessor`.

        Raises:
            ParameterError: the grammar is too complex here, or allows no token of the vocabulary, or does not allow
                what was drawn.
        """
        if self._seen is None:
            self._seen = len(tokens)
        for token in tokens[self._seen :]:
            self.accept(token)
        if self._inside:
            return row
        mask = self._matcher.compute_bitmask()
        while self._matcher.is_error():  # the mask is that of a normal end then
            self._recover()
            mask = self._matcher.compute_bitmask()
        bits = np.frombuffer(mask, np.uint8)
        allowed = np.unpackbits(bits, count=row.size, bitorder="little").view(np.bool_)  # [V], padded with False
        allowed[self._never[self._never < row.size]] = False
        if self._opens:
            allowed[:] = False
        if self._opener:
            allowed[self._opener[0]] = True
        out = np.full_like(row, -np.inf)
        np.copyto(out, row, where=allowed)
        if np.isneginf(out.max()):
            raise _refused(self._kind, "no token of the model's vocabulary can go on here")
        return out

    def accept(self, token: int) -> None:
        """Take a token that was drawn; the raised errors are those of a call."""
        if self._seen is not None:
            self._seen += 1
        was, self._inside = self._inside, self._reasoning is not None and self._reasoning.inside
        if self._inside or was:
            if self._taken:  # it was the beginning of the opener
                self._matcher.reset()
            self._opener, self._opens = [], False
            self._taken.clear()
            return
        self._opener = self._opener[1:] if self._opener[:1] == [token] else []
        if self._opener and (self._opens or not self._matcher.validate_tokens([token])):
            self._opens = True
        elif token in self._ends:
            self._ended = True
        else:
            self._taken.append(token)
            if not self._matcher.consume_token(token):
                self._recover()

    @property
    def finished(self) -> bool:
        """Whether nothing can follow what was taken but an end token, or that has come."""
        opening = self._inside or (self._opener and self._taken)
        return self._ended or (not opening and self._matcher.is_stopped())

    def guesses(self, limit: int) -> list[int]:
        """At most `limit` tokens that spell what has to come next, if anything has to; they change nothing.

        The model may spell it in other tokens, so these are guesses to be verified.
        """
        if self.finished or self._inside or self._opener:
            return []
        tokens: list[int] = self._matcher.compute_ff_tokens()[:limit]
        cut = next((i for i, token in enumerate(tokens) if token in self._ends or token in self._never), len(tokens))
        return tokens[:cut]

    def _recover(self) -> None:
        """Go on with a matcher of one's own, once, if that helps.

        Copies of a matcher share the lexer states that they have met, and so their limit: an answer must not fail
        of the many before it.
        """
        error = self._matcher.get_error()
        if "too many states" in error and self._afresh is not None:
            self._matcher, self._afresh = self._afresh(), None
            self._matcher.consume_tokens(self._taken)
            error = self._matcher.get_error()
        if error:
            raise _refused(self._kind, f"the answer cannot go on: {_reason(error, self._kind)}")


class Constraints:
    """Compiles constraints for one vocabulary; for any threads at once.

    Args:
        tokenizer_json: text of the tokenizer's file.
        vocab_size: V, width of the logits; no less than the tokenizer has ids.
        end_tokens: ids that end an answer; they can be drawn where the grammar is satisfied.
        never: ids that no constrained text holds, whatever their text: those that start and end a reasoning.
    """

    def __init__(
        self, tokenizer_json: str, vocab_size: int, end_tokens: Iterable[int], never: Iterable[int] = ()
    ) -> None:
        self._json, self._vocab_size = tokenizer_json, vocab_size
        self._ends = frozenset(token for token in end_tokens if 0 <= token < vocab_size)
        self._never = np.array(sorted(set(never) - self._ends), np.intp)
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[Constraint, LLMatcher] = OrderedDict()
        self._building, self._looking = threading.Lock(), threading.Lock()

    def start(
        self, constraint: Constraint, reasoning: Reasoning | None = None, opener: Sequence[int] = ()
    ) -> ConstraintProcessor:
        """Make what holds one answer to a constraint.

        A constraint that is new takes 1 ms to some seconds, so not on the thread that others' steps wait for. One
        of the latest `CACHED` takes microseconds (of fewer, where they are longer than `MOST_BYTES` together). The
        first of all takes 0.2 s more at 50,000 tokens.

        Args:
            constraint: what the answer has to be.
            reasoning: says whether the answer is within one, of which everything is allowed; None = it never is.
            opener: the tokens that start a reasoning, where the prompt did not. They can be drawn as the first; else
                the answer begins at once.

        Raises:
            ParameterError: the constraint, or the tokenizer for any constraint, cannot be used.
        """
        with self._looking:
            matcher = self._compiled.get(constraint)
        if matcher is None:
            matcher = self._compile(constraint)
        with self._looking:
            self._compiled[constraint] = matcher
            self._compiled.move_to_end(constraint)
            while len(self._compiled) > CACHED or sum(len(kept.text) for kept in self._compiled) > MOST_BYTES:
                self._compiled.popitem(last=False)
            own = matcher.deep_copy()
        afresh = functools.partial(self._afresh, constraint)
        return ConstraintProcessor(constraint.kind, own, afresh, self._ends, self._never, reasoning, opener)

    def _afresh(self, constraint: Constraint) -> LLMatcher:
        with self._looking:
            self._compiled.pop(constraint, None)  # its states are used up, for all that begin from here on
        return self._compile(constraint)

    def _compile(self, constraint: Constraint) -> LLMatcher:
        with self._building:
            if self._tokenizer is None:
                self._tokenizer, self._json = self._new_tokenizer(), ""
        return _compiled_apart(self._tokenizer, constraint)

    def _new_tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        if not self._ends:
            raise ParameterError("constraint: the model has no end token, so no constrained answer would end")
        try:
            if not self._json.lstrip().startswith("{"):  # it would be taken for a path
                raise ValueError("not the text of a tokenizer.json")
            return LLTokenizer(self._json, n_vocab=self._vocab_size, eos_token=sorted(self._ends))
        except ValueError as e:
            why = _reason(str(e))
            raise ParameterError(f"constraint: this model's tokenizer cannot be held to a grammar: {why}") from e


def _compiled_apart(tokenizer: LLTokenizer, constraint: Constraint) -> LLMatcher:
    """Compile in a thread of its own, of great depth and with an end to waiting.

    llguidance follows references by recursion (a chain of 1,000 `$ref`s overflows 8 MB), and an overflow would end
    the process. A thread that is not done by then is left to itself.
    """
    done: queue.SimpleQueue[LLMatcher | Exception] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put(_matcher(tokenizer, constraint))
        except Exception as e:  # noqa: BLE001 (raised below)
            done.put(e)

    with _starting:
        before = threading.stack_size(STACK)  # of the next threads; only what they touch is memory
        try:
            threading.Thread(target=run, name="constraint", daemon=True).start()
        except RuntimeError as e:
            raise MachineError(f"constraint ({constraint.kind}): no thread could be started to compile it: {e}") from e
        finally:
            threading.stack_size(before)
    try:
        matcher = done.get(timeout=SECONDS)
    except queue.Empty:
        raise _refused(constraint.kind, f"not compiled within {SECONDS:g} s: simplify it") from None
    if isinstance(matcher, ValueError):
        raise _refused(constraint.kind, _reason(str(matcher), constraint.kind)) from matcher
    if isinstance(matcher, Exception):
        raise matcher
    if matcher.is_error():
        raise _refused(constraint.kind, _reason(matcher.get_error(), constraint.kind))
    return matcher


def _matcher(tokenizer: LLTokenizer, constraint: Constraint) -> LLMatcher:
    from llguidance import LLMatcher, LLParserLimits

    if _BIG_MULTIPLE.search(constraint.text):  # as many states as that: 250 MB at a million
        raise ValueError("multipleOf is above 99,999")
    if constraint.kind.startswith("json"):
        # Free white space is unbounded white space: a hot model can draw it until its tokens are used up.
        grammar = LLMatcher.grammar_from_json_schema(constraint.text, overrides={"whitespace_flexible": False})
    elif constraint.kind == "lark":
        grammar = LLMatcher.grammar_from_lark(constraint.text)
    else:
        grammar = LLMatcher.grammar_from_regex(constraint.text)
    # Steps of work, not seconds: llguidance's own defaults, but fewer states. With these, nothing that we know of
    # takes more than 4 s to compile.
    limits = LLParserLimits(
        max_items_in_row=2_000,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=LEXER_STATES,
        max_grammar_size=500_000,
        precompute_large_lexemes=True,
        verbose_errors=False,
    )
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()  # some limits are met here first; and copies share what it has worked out
    return matcher


def _literal(text: str) -> str:
    """A regular expression that matches this text: whatever could mean something is written as its number."""
    return "".join(char if char.isalnum() else f"\\x{{{ord(char):x}}}" for char in text)


def _reason(message: str, kind: str = "") -> str:
    """One line of llguidance's message: the first, and what it announces."""
    lines = [line for line in map(str.strip, message.splitlines()) if line] or ["no reason given"]
    first = lines[0] if kind == "lark" else _AT.sub("", lines[0])  # where it stands in a grammar of llguidance's making
    if first.startswith("NoExtension"):
        return "nothing can match it"
    if first.startswith("panic"):
        return "it is too large"
    told = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), "")
    return f"{first if len(first) <= 200 else first[:199] + '…'} {told[:100]}".rstrip()


def _refused(kind: str, why: str) -> ParameterError:
    return ParameterError(f"constraint ({kind}): {why}")
