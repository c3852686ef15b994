"""One answer on its way: which tokens to compute next, and what their logits make of it.

`Model` or `Engine`, whichever holds the cache, drives a `TokenSequence`: it computes the `pending` tokens after the
`computed` ones and passes their logits to `take`. Knows no session, thread or chat template.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llm_edge.runtime.results import FinishReason, GenerationChunk, Timings
from llm_edge.runtime.sampling.constraint import ConstraintProcessor
from llm_edge.runtime.sampling.logprobs import TokenLogprob, log_probabilities
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.runtime.sampling.sampler import Sampler
from llm_edge.runtime.speculative.prompt_lookup import MOST, DraftProposer
from llm_edge.runtime.text.answer_stream import AnswerStream, TextDelta, joined

if TYPE_CHECKING:
    from llm_edge.runtime.backend.session import Logits  # onnxruntime, which who only shows answers does not need

CHUNK_ALIGNMENT = 8
"""Prompts are cut at multiples of this many tokens, so that no cut shows in the result; see docs/decisions.md."""


@dataclass(frozen=True, slots=True)
class SamplingState:
    """How the next tokens of an answer are drawn.

    Attributes:
        sampler: for this answer alone.
        stops: strings that end it, and
        ends: tokens that do.
        room: tokens to draw at most, those that are drawn already among them.
    """

    sampler: Sampler
    stops: tuple[str, ...]
    ends: frozenset[int]
    room: int


SamplingStateFactory = Callable[[SamplingParams, Sequence[int]], SamplingState]
"""From parameters, and the tokens that were drawn already."""


class TokenSequence:
    """One answer on its way.

    Args:
        prompt: its tokens, at least one.
        params: how to draw, and
        make: what that takes.
        stream: of its text, and
        guesses: of its tokens; None for none.
        began: when the caller asked, by `time.perf_counter`.
        constraint: what the answer's form is held to.

    Attributes:
        tokens: the prompt and all that was drawn.
        computed: how many of them the cache holds.
        done: the last piece has been made.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        make: SamplingStateFactory,
        stream: AnswerStream,
        began: float,
        guesses: DraftProposer | None = None,
        constraint: ConstraintProcessor | None = None,
    ) -> None:
        self.tokens = list(prompt)
        self.computed = 0
        self.done = False
        self._prompt_length = len(prompt)
        self._make = make
        self._making = make(params, ())
        self._wanted: SamplingParams | None = None  # other parameters, from the next step on
        self._stream = stream
        self._guesses = guesses
        self._constraint = constraint
        self._asked: list[int] = []
        self._began = began
        self._started = self._prefilled = self._first = self._last = began
        self._cached = self._guessed = self._accepted = 0

    @property
    def prefilling(self) -> bool:
        """Whether the prompt is still being computed."""
        return self.computed < self._prompt_length

    def adjust(self, params: SamplingParams) -> None:
        """Draw by other parameters from the next step on; from any thread. The constraint stays what it was."""
        self._wanted = params

    def reuse(self, length: int) -> int:
        """Say how many of the prompt's tokens the cache could hold already; returns how many it shall hold.

        The last tokens are computed anyway, because their logits are needed; cuts lie at multiples of
        `CHUNK_ALIGNMENT`.
        """
        self.computed = self._cached = max(min(length, self._prompt_length - 2) // CHUNK_ALIGNMENT * CHUNK_ALIGNMENT, 0)
        return self.computed

    def pending(self, most: int) -> list[int]:
        """Tokens to compute now: of the prompt about `most`, then the last one drawn and guesses behind it.

        Logits are wanted of the last one of a prompt's tokens, and of all others.
        """
        if self._started == self._began:
            self._started = time.perf_counter()
        self._adjust()
        if self.prefilling:
            end = self.computed + max(most // CHUNK_ALIGNMENT, 1) * CHUNK_ALIGNMENT
            if end >= self._prompt_length - 1:  # a single last token would take another way through the kernels
                end = self._prompt_length
            self._asked = self.tokens[self.computed : end]
        else:
            self._asked = [self.tokens[-1], *self._guess(self._making.room - self._drawn - 1)]
        return self._asked

    def take(self, logits: Logits) -> Iterator[GenerationChunk]:
        """Draw tokens from the logits [n, V] of what was `pending`: the next one, and one behind each right guess.

        To be read to its end before the next step. Those of a step that leaves some of the prompt are not looked at.

        Raises:
            LogitsError: they are no numbers.
            ParameterError: the constraint came to nothing.
        """
        asked, self._asked = self._asked, []
        if self.prefilling:
            self.computed += len(asked)
            if self.prefilling:
                return
            self._prefilled = time.perf_counter()
            yield from self._draw(logits[-1])
            return
        draft = asked[1:]
        self._guessed += len(draft)
        before = self._accepted
        for index, row in enumerate(logits):
            self._accepted = before + index
            yield from self._draw(row)
            if self.done or index == len(draft) or self.tokens[-1] != draft[index]:
                break
        self.computed += 1 + index
        if self._guesses is not None:
            self._guesses.tell(len(draft), index, len(self.tokens))

    def end(self, reason: FinishReason) -> GenerationChunk:
        """The last piece, where no token ends the answer."""
        return self._end([self._stream.flush()], None, reason)[-1]

    def _adjust(self) -> None:
        wanted, self._wanted = self._wanted, None
        if wanted is not None:
            self._making = self._make(wanted, self.tokens[self._prompt_length :])
            self._stream.change_stops(self._making.stops)

    @property
    def _drawn(self) -> int:
        return len(self.tokens) - self._prompt_length

    def _guess(self, most: int) -> list[int]:
        if self._guesses is None or most < 1:
            return []
        forced = self._constraint.guesses(min(most, MOST)) if self._constraint is not None else []
        return forced or self._guesses.guess(self.tokens, most)

    def _draw(self, row: NDArray[np.float32]) -> list[GenerationChunk]:
        token = self._making.sampler.sample(row)
        top = self._making.sampler.params.logprobs
        logprob = None if top is None else log_probabilities(row, token, top)
        passages = [self._stream.flush()] if token in self._making.ends else self._stream.push(token)
        if self._constraint is not None:
            self._constraint.accept(token)
        self._last = time.perf_counter()
        if not self._drawn:
            self._first = self._last
        self.tokens.append(token)
        if token in self._making.ends or self._stream.stopped:
            return self._end(passages, token, FinishReason.STOP, logprob)
        whole = self._constraint is not None and self._constraint.finished
        if whole or self._drawn >= self._making.room:
            passages = joined([*passages, self._stream.flush()])
            stopped = whole or self._stream.stopped
            return self._end(passages, token, FinishReason.STOP if stopped else FinishReason.LENGTH, logprob)
        *before, last = passages
        return [*_aside(before), GenerationChunk(last.text, token, reasoning=last.reasoning, logprob=logprob)]

    def _end(
        self, passages: list[TextDelta], token: int | None, reason: FinishReason, logprob: TokenLogprob | None = None
    ) -> list[GenerationChunk]:
        self.done = True
        timings = Timings(
            prompt_tokens=self._prompt_length,
            completion_tokens=self._drawn,
            time_to_first_token=self._first - self._began if self._drawn else 0.0,
            prefill_seconds=self._prefilled - self._started if self._prefilled > self._started else 0.0,
            decode_seconds=self._last - self._first if self._drawn else 0.0,
            reasoning_tokens=self._stream.reasoning_tokens,
            cached_tokens=self._cached,
            guessed_tokens=self._guessed,
            accepted_tokens=self._accepted,
        )
        *before, last = passages
        return [*_aside(before), GenerationChunk(last.text, token, reason, timings, last.reasoning, logprob)]


def _aside(passages: Iterable[TextDelta]) -> list[GenerationChunk]:
    """What a token ends before the passage that it is told with."""
    return [GenerationChunk(text, None, reasoning=reasoning) for text, reasoning in passages]
