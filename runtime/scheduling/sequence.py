"""`TokenSequence`: the decoding state of one generation, from its prompt to its last token.

`Model` or `Scheduler`, whichever holds the KV cache, drives it: it computes the `pending` tokens after the `computed`
ones and passes their logits to `advance`, which samples and yields chunks.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from llm_edge.runtime.backend.limits import CHUNK_ALIGNMENT
from llm_edge.runtime.results import FinishReason, GenerationChunk, Timings
from llm_edge.runtime.sampling.grammar import ConstraintProcessor
from llm_edge.runtime.sampling.logprobs import TokenLogprob, log_probabilities
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.runtime.sampling.sampler import Sampler
from llm_edge.runtime.scheduling.prefixes import MIN_COMPUTED, aligned_prefix
from llm_edge.runtime.speculative.prompt_lookup import MAX_DRAFT_TOKENS, DraftProposer
from llm_edge.runtime.text.answer_stream import AnswerStream, TextDelta, merge

if TYPE_CHECKING:
    from llm_edge.runtime.backend.session import Logits


@dataclass(frozen=True, slots=True)
class SamplingState:
    """How the next tokens of a sequence are sampled; `max_new_tokens` includes those generated already."""

    sampler: Sampler
    stop_strings: tuple[str, ...]
    end_tokens: frozenset[int]
    max_new_tokens: int


SamplingStateFactory = Callable[[SamplingParams, Sequence[int]], SamplingState]
"""Builds the state from parameters and the tokens generated so far."""


class TokenSequence:
    """The decoding state of one generation; `began` is `time.perf_counter()` at the caller's request.

    If the model has states (`has_states`), prompts are computed in steps that end where states are to be kept: shortly
    before the prompt's end, so that it can be continued in another way, and where `keep_states_at` says. If it has
    windows, what is needed to continue at the prompt's end is kept there.

    Attributes:
        tokens: the prompt and the generated tokens.
        computed: how many of them are in the KV cache.
        done: the last chunk has been produced.
    """

    def __init__(
        self,
        prompt: Sequence[int],
        params: SamplingParams,
        sampling_state: SamplingStateFactory,
        stream: AnswerStream,
        began: float,
        proposer: DraftProposer | None = None,
        constraint: ConstraintProcessor | None = None,
        *,
        has_states: bool = False,
        has_windows: bool = False,
    ) -> None:
        self.tokens = list(prompt)
        self.computed = 0
        self.done = False
        self._prompt_length = len(prompt)
        self._sampling_state = sampling_state
        self._state = sampling_state(params, ())
        self._next_params: SamplingParams | None = None  # to apply before the next step
        self._stream = stream
        self._proposer = proposer
        self._constraint = constraint
        self._step_tokens: list[int] = []
        self._has_states = has_states
        self._snapshots = {aligned_prefix(len(prompt), len(prompt))} if has_states else set()
        if has_windows:
            self._snapshots.add(len(prompt))
        self._began = began
        self._started = self._prefilled = self._first = self._last = began
        self._cached = self._drafted = self._accepted = 0

    @property
    def prefilling(self) -> bool:
        """Whether part of the prompt is still to be computed."""
        return self.computed < self._prompt_length

    @property
    def prompt_left(self) -> int:
        """Number of prompt tokens still to be computed."""
        return self._prompt_length - self.computed

    def adjust(self, params: SamplingParams) -> None:
        """Use other parameters from the next step on, except the constraint. Thread-safe."""
        self._next_params = params

    def reusable(self, length: int) -> int:
        """How many of `length` cached tokens the prompt can reuse.

        The last tokens are computed anyway because their logits are needed. Keys and values are reused up to a multiple
        of `CHUNK_ALIGNMENT`, because prompts are split there only; states exist for certain lengths only.
        """
        if self._has_states:
            return max(min(length, self._prompt_length - MIN_COMPUTED), 0)
        return aligned_prefix(length, self._prompt_length)

    def reuse(self, length: int) -> int:
        """Skip prompt tokens of which the cache provides the first `length`; returns how many."""
        self.computed = self._cached = self.reusable(length)
        return self.computed

    def keep_states_at(self, length: int) -> int:
        """End a step at about the first `length` prompt tokens, so that another prompt can reuse the states there.

        Returns:
            at how many tokens, `length` or fewer, the prompt's next states will be kept; 0 if it has passed them.
        """
        wanted = aligned_prefix(length, self._prompt_length)
        if wanted > self.computed:
            self._snapshots.add(wanted)
        return max((each for each in self._snapshots if self.computed < each <= length), default=0)

    @property
    def keeps_states(self) -> bool:
        """Whether the states after the `computed` tokens are to be kept."""
        return self.computed in self._snapshots

    def pending(self, max_prompt_tokens: int, *, draft: bool = True) -> list[int]:
        """The tokens of the next step: about `max_prompt_tokens` of the prompt, or the latest token and draft tokens.

        `advance` needs the logits of the last of a prompt's tokens, or of all others. Without `draft` there are no
        draft tokens.
        """
        if self._started == self._began:
            self._started = time.perf_counter()
        self._apply_next_params()
        if self.prefilling:
            end = self.computed + max(max_prompt_tokens // CHUNK_ALIGNMENT, 1) * CHUNK_ALIGNMENT
            if end >= self._prompt_length - 1:  # a step over a single last token would use other kernels
                end = self._prompt_length
            end = min((each for each in self._snapshots if self.computed < each < end), default=end)
            self._step_tokens = self.tokens[self.computed : end]
        else:
            limit = self._state.max_new_tokens - self._generated - 1 if draft else 0
            self._step_tokens = [self.tokens[-1], *self._propose(limit)]
        return self._step_tokens

    def advance(self, logits: Logits) -> Iterator[GenerationChunk]:
        """Sample from the logits [n, V] of the `pending` tokens: one token, and one more per accepted draft token.

        Must be read to its end before the next step. Yields nothing while the prompt is incomplete.

        Raises:
            LogitsError: the logits are not finite.
            ParameterError: the constraint cannot be satisfied.
        """
        step_tokens, self._step_tokens = self._step_tokens, []
        if self.prefilling:
            self.computed += len(step_tokens)
            if self.prefilling:
                return
            self._prefilled = time.perf_counter()
            yield from self._sample(logits[-1])
            return
        draft = step_tokens[1:]
        self._drafted += len(draft)
        before = self._accepted
        for index, row in enumerate(logits):
            self._accepted = before + index
            yield from self._sample(row)
            if self.done or index == len(draft) or self.tokens[-1] != draft[index]:
                break
        self.computed += 1 + index
        if self._proposer is not None:
            self._proposer.record_acceptance(len(draft), index, len(self.tokens))

    def finish(self, reason: FinishReason) -> GenerationChunk:
        """The last chunk of a generation that no token ends."""
        return self._finish([self._stream.flush()], None, reason)[-1]

    def _apply_next_params(self) -> None:
        params, self._next_params = self._next_params, None
        if params is not None:
            self._state = self._sampling_state(params, self.tokens[self._prompt_length :])
            self._stream.change_stops(self._state.stop_strings)

    @property
    def _generated(self) -> int:
        return len(self.tokens) - self._prompt_length

    def _propose(self, limit: int) -> list[int]:
        if self._proposer is None or limit < 1:
            return []
        forced = self._constraint.forced_tokens(min(limit, MAX_DRAFT_TOKENS)) if self._constraint is not None else []
        return forced or self._proposer.propose(self.tokens, limit)

    def _sample(self, row: NDArray[np.float32]) -> list[GenerationChunk]:
        """Draw a token from logits [V]; returns its chunks."""
        state = self._state
        token = state.sampler.sample(row)
        alternatives = state.sampler.params.logprobs
        logprob = None if alternatives is None else log_probabilities(row, token, alternatives)
        ends = token in state.end_tokens
        deltas = [self._stream.flush()] if ends else self._stream.push(token)
        if self._constraint is not None:
            self._constraint.accept(token)
        self._last = time.perf_counter()
        if not self._generated:
            self._first = self._last
        self.tokens.append(token)
        if ends or self._stream.stopped:
            return self._finish(deltas, token, FinishReason.STOP, logprob)
        complete = self._constraint is not None and self._constraint.finished
        if complete or self._generated >= state.max_new_tokens:
            deltas = merge([*deltas, self._stream.flush()])
            stopped = complete or self._stream.stopped
            return self._finish(deltas, token, FinishReason.STOP if stopped else FinishReason.LENGTH, logprob)
        *before, last = deltas
        return [*_without_token(before), GenerationChunk(last.text, token, reasoning=last.reasoning, logprob=logprob)]

    def _finish(
        self, deltas: list[TextDelta], token: int | None, reason: FinishReason, logprob: TokenLogprob | None = None
    ) -> list[GenerationChunk]:
        self.done = True
        timings = Timings(
            prompt_tokens=self._prompt_length,
            completion_tokens=self._generated,
            time_to_first_token=self._first - self._began if self._generated else 0.0,
            prefill_seconds=self._prefilled - self._started if self._prefilled > self._started else 0.0,
            decode_seconds=self._last - self._first if self._generated else 0.0,
            reasoning_tokens=self._stream.reasoning_tokens,
            cached_tokens=self._cached,
            draft_tokens=self._drafted,
            accepted_tokens=self._accepted,
        )
        *before, last = deltas
        stop = self._stream.stop_string
        end = GenerationChunk(last.text, token, reason, timings, last.reasoning, logprob, stop)
        return [*_without_token(before), end]


def _without_token(deltas: Iterable[TextDelta]) -> list[GenerationChunk]:
    """Chunks of text that a token completes, ahead of the chunk that carries the token itself."""
    return [GenerationChunk(text, None, reasoning=reasoning) for text, reasoning in deltas]
