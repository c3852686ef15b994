"""Compiles constraints with llguidance and masks the logits of tokens that a constraint does not allow.

llguidance computes what a grammar allows next, over the bytes of the vocabulary's tokens. For models that reason
first, the mask is applied only after the reasoning has ended.
"""

from __future__ import annotations

import functools
import json
import queue
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np
from numpy.typing import NDArray

from llm_edge.runtime.errors import InputError, MachineError, ParameterError
from llm_edge.runtime.sampling.constraint import MAX_BYTES, Constraint, refused_constraint

if TYPE_CHECKING:  # imported on first use: it takes 30 ms that unconstrained answers need not wait for
    from llguidance import LLMatcher, LLTokenizer

MAX_CACHED = 8
MAX_LEXER_STATES = 50_000  # of about 1.5 kB each
COMPILE_SECONDS = 10.0  # see `_compile_in_thread`
STACK_BYTES = 255 << 20  # the largest that Windows allows

_starting = threading.Lock()  # threading.stack_size is process-wide
_AT = re.compile(r"^at \d+\(\d+\): ")


class ReasoningState(Protocol):
    """Whether an answer is still reasoning, after all tokens accepted so far."""

    @property
    def inside(self) -> bool:
        """Whether the next token belongs to the reasoning."""


class ConstraintProcessor:
    """The `LogitsProcessor` that holds one answer to a constraint, created by `ConstraintCompiler.start`.

    It must be the first processor: the sampler ignores a processor that leaves no token, and of two conflicting ones
    that is the later. A token that was drawn is passed to `accept`, or else picked up by the next call. The `tokens` of
    the first call are the prompt, except those that were accepted before.
    """

    def __init__(
        self,
        kind: str,
        matcher: LLMatcher,
        recompile: Callable[[], LLMatcher],
        ends: frozenset[int],
        never: NDArray[np.intp],
        reasoning: ReasoningState | None,
        opener: Sequence[int],
    ) -> None:
        self._kind, self._matcher, self._ends, self._never = kind, matcher, ends, never
        self._reasoning, self._opener = reasoning, list(opener)  # what is left of it, as long as it can be drawn
        self._inside = reasoning is not None and reasoning.inside
        self._opens = False  # what was taken is the opener's beginning, and nothing else
        self._recompile: Callable[[], LLMatcher] | None = recompile
        self._seen: int | None = None
        self._taken: list[int] = []
        self._ended = False

    def __call__(self, row: NDArray[np.float32], tokens: Sequence[int]) -> NDArray[np.float32]:
        """Mask the logits of the tokens that the grammar does not allow next.

        Raises:
            ParameterError: the grammar is too complex here, or allows no token of the vocabulary, or does not allow
                the token that was drawn.
        """
        if self._seen is None:
            self._seen = len(tokens)
        for token in tokens[self._seen :]:
            self.accept(token)
        if self._inside:
            return row
        mask = self._matcher.compute_bitmask()
        while self._matcher.is_error():  # the mask would then be that of a regular end
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
            raise refused_constraint(self._kind, "no token of the model's vocabulary fits here")
        return out

    def accept(self, token: int) -> None:
        """Advance by a token that was drawn; raises what a call raises."""
        if self._seen is not None:
            self._seen += 1
        was, self._inside = self._inside, self._reasoning is not None and self._reasoning.inside
        if self._inside or was:
            if self._taken:  # they were the beginning of the opening tokens
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
        """Whether the answer is complete: only an end token can follow, or one has been drawn."""
        opening = self._inside or (self._opener and self._taken)
        return self._ended or (not opening and self._matcher.is_stopped())

    def forced_tokens(self, limit: int) -> list[int]:
        """At most `limit` tokens of the text that the grammar forces next; the state stays as it is.

        The model may spell that text with other tokens, so these are draft tokens that need verification.
        """
        if self.finished or self._inside or self._opener:
            return []
        tokens: list[int] = self._matcher.compute_ff_tokens()[:limit]
        cut = next((i for i, token in enumerate(tokens) if token in self._ends or token in self._never), len(tokens))
        return tokens[:cut]

    def _recover(self) -> None:
        """Continue with a freshly compiled matcher, once, if the lexer ran out of states.

        Copies of a matcher share their lexer states and the limit on them, so an answer could otherwise fail because
        of the many before it.
        """
        error = self._matcher.get_error()
        if "too many states" in error and self._recompile is not None:
            self._matcher, self._recompile = self._recompile(), None
            self._matcher.consume_tokens(self._taken)
            error = self._matcher.get_error()
        if error:
            raise refused_constraint(self._kind, f"the answer cannot continue: {_reason(error, self._kind)}")


class ConstraintCompiler:
    """Compiles and caches constraints for one vocabulary. Thread-safe.

    Args:
        tokenizer_json: content of tokenizer.json.
        vocab_size: V, width of the logits; at least the number of ids in the tokenizer.
        end_tokens: ids that end an answer; they are allowed where the grammar is satisfied.
        never: ids that are never part of constrained text, such as those that start and end reasoning.
    """

    def __init__(
        self, tokenizer_json: str, vocab_size: int, end_tokens: Iterable[int], never: Iterable[int] = ()
    ) -> None:
        self._json, self._vocab_size = tokenizer_json, vocab_size
        self._ends = frozenset(token for token in end_tokens if 0 <= token < vocab_size)
        self._never = np.array(sorted(set(never) - self._ends), np.intp)
        self._tokenizer: LLTokenizer | None = None
        self._compiled: OrderedDict[Constraint, LLMatcher] = OrderedDict()
        self._tokenizer_lock, self._cache_lock = threading.Lock(), threading.Lock()

    def start(
        self, constraint: Constraint, reasoning: ReasoningState | None = None, opener: Sequence[int] = ()
    ) -> ConstraintProcessor:
        """The processor that holds one answer to a constraint.

        Compiling takes 1 ms to several seconds, so do not call this on the thread that steps for others. One of the
        latest `MAX_CACHED` constraints (fewer, if they exceed `MAX_BYTES` together) takes microseconds. The very first
        takes 0.2 s longer at 50,000 tokens.

        Args:
            constraint: the form of the answer.
            reasoning: reports whether the answer is still reasoning, which is not constrained; None = it never is.
            opener: the tokens that start reasoning, if the prompt did not. They are allowed first; otherwise the
                answer begins at once.

        Raises:
            ParameterError: the constraint, or the tokenizer for any constraint, cannot be used.
        """
        with self._cache_lock:
            matcher = self._compiled.get(constraint)
        if matcher is None:
            matcher = self._compile(constraint)
        with self._cache_lock:
            self._compiled[constraint] = matcher
            self._compiled.move_to_end(constraint)
            while len(self._compiled) > MAX_CACHED or sum(len(kept.text) for kept in self._compiled) > MAX_BYTES:
                self._compiled.popitem(last=False)
            own = matcher.deep_copy()
        recompile = functools.partial(self._recompile, constraint)
        return ConstraintProcessor(constraint.kind, own, recompile, self._ends, self._never, reasoning, opener)

    def _recompile(self, constraint: Constraint) -> LLMatcher:
        with self._cache_lock:
            self._compiled.pop(constraint, None)  # its states are used up for all later answers too
        return self._compile(constraint)

    def _compile(self, constraint: Constraint) -> LLMatcher:
        with self._tokenizer_lock:
            if self._tokenizer is None:
                self._tokenizer, self._json = self._new_tokenizer(), ""
        return _compile_in_thread(self._tokenizer, constraint)

    def _new_tokenizer(self) -> LLTokenizer:
        from llguidance import LLTokenizer

        if not self._ends:
            raise ParameterError("constraint: the model has no end token, so a constrained answer would never end")
        try:
            if not self._json.lstrip().startswith("{"):  # llguidance would take it for a path
                raise ValueError("not the text of a tokenizer.json")
            return LLTokenizer(self._json, n_vocab=self._vocab_size, eos_token=sorted(self._ends))
        except ValueError as e:
            why = _reason(str(e))
            raise ParameterError(f"constraint: constraints do not work with this model's tokenizer: {why}") from e


def _compile_in_thread(tokenizer: LLTokenizer, constraint: Constraint) -> LLMatcher:
    """Compile in a separate thread with a large stack and a timeout.

    llguidance follows references recursively (a chain of 1,000 `$ref`s overflows 8 MB), and a stack overflow would kill
    the process. A thread that exceeds the timeout is abandoned.
    """
    done: queue.SimpleQueue[LLMatcher | BaseException] = queue.SimpleQueue()

    def run() -> None:
        try:
            done.put(_matcher(tokenizer, constraint))
        except BaseException as e:  # noqa: BLE001 (raised below; panics of Rust are not of class Exception)
            done.put(e)

    with _starting:
        before = threading.stack_size(STACK_BYTES)  # of threads started next; only touched pages take memory
        try:
            threading.Thread(target=run, name="constraint", daemon=True).start()
        except RuntimeError as e:
            raise MachineError(f"constraint ({constraint.kind}): no thread could be started to compile it: {e}") from e
        finally:
            threading.stack_size(before)
    try:
        matcher = done.get(timeout=COMPILE_SECONDS)
    except queue.Empty:
        raise refused_constraint(constraint.kind, f"not compiled within {COMPILE_SECONDS:g} s: simplify it") from None
    if isinstance(matcher, InputError):
        raise matcher
    if isinstance(matcher, BaseException):
        raise refused_constraint(constraint.kind, _reason(str(matcher), constraint.kind)) from matcher
    if matcher.is_error():
        raise refused_constraint(constraint.kind, _reason(matcher.get_error(), constraint.kind))
    return matcher


def _matcher(tokenizer: LLTokenizer, constraint: Constraint) -> LLMatcher:
    from llguidance import LLMatcher, LLParserLimits

    from llm_edge.runtime.sampling.json_schema.normalize import JSON_STYLE, enforceable

    if constraint.kind.startswith("json"):
        grammar = LLMatcher.grammar_from_json_schema(enforceable(json.loads(constraint.text)), overrides=JSON_STYLE)
    elif constraint.kind in ("lark", "tools"):
        grammar = LLMatcher.grammar_from_lark(constraint.text)
    else:
        grammar = LLMatcher.grammar_from_regex(constraint.text)
    # Units of work, not seconds: llguidance's defaults with fewer states. No known constraint takes more than 4 s.
    limits = LLParserLimits(
        max_items_in_row=2_000,
        initial_lexer_fuel=1_000_000,
        step_lexer_fuel=200_000,
        step_max_items=50_000,
        max_lexer_states=MAX_LEXER_STATES,
        max_grammar_size=500_000,
        precompute_large_lexemes=True,
        verbose_errors=False,
    )
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        matcher.compute_bitmask()  # some limits only show here; and copies share this work
    return matcher


def _reason(message: str, kind: str = "") -> str:
    """llguidance's message in one line: its first line and the error it announces."""
    lines = [line for line in map(str.strip, message.splitlines()) if line] or ["no reason given"]
    first = lines[0] if kind == "lark" else _AT.sub("", lines[0])  # a position in a grammar that llguidance generated
    if first.startswith(("NoExtension", "Unsatisfiable schema")):
        return "nothing can match it"
    if first.startswith("panic"):
        return "it is too large"
    detail = next((line.removeprefix("error: ") for line in lines if line.startswith("error: ")), "")
    return f"{first if len(first) <= 200 else first[:199] + '…'} {detail[:100]}".rstrip()


def check_constraint(constraint: Constraint) -> None:
    """Compile a constraint for a vocabulary of bytes; see `Constraint.check`."""
    from llguidance import LLTokenizer

    _compile_in_thread(LLTokenizer("byte"), constraint)
