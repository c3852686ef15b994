"""`Scheduler`: decides the order of an engine's steps. Requests that wait for a slot are queued in `Engine`.

Each step computes a chunk of one prompt, then a token for every active sequence, in one decode where their slots are
adjacent. Whatever is raised in a step or a sequence, KeyboardInterrupt and the panics of Rust libraries included, fails
the affected requests and no others: signals never arrive on this thread.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from llm_edge.runtime.backend.limits import CHUNK_ALIGNMENT, PREFILL_CHUNK
from llm_edge.runtime.backend.session import Logits
from llm_edge.runtime.errors import LlmEdgeError, StepTerminatedError, as_llm_edge_error
from llm_edge.runtime.generation import AsyncGeneration
from llm_edge.runtime.results import FinishReason, GenerationChunk
from llm_edge.runtime.scheduling.batch import Batch
from llm_edge.runtime.scheduling.counters import Counters
from llm_edge.runtime.scheduling.prefixes import WORTH_KEEPING, common_prefix
from llm_edge.runtime.scheduling.sequence import TokenSequence
from llm_edge.runtime.scheduling.slots import SlotManager, spans

# A chunk of a prompt, while others decode, should take this many times as long as a decode step, and in proportion
# longer where more prompts wait than `_FEW_DECODING` sequences decode: short chunks cost throughput and delay first
# tokens, which then matters to more callers than the gap.
_MIN_CHUNK_RATIO, _MAX_CHUNK_RATIO = 1.0, 1.4
_FEW_DECODING = 2


@dataclass(slots=True, eq=False)
class Request:
    """A sequence and the caller's handle on it; `slot` is -1 while the request waits."""

    sequence: TokenSequence
    generation: AsyncGeneration = field(init=False)
    slot: int = -1

    def __post_init__(self) -> None:
        self.generation = AsyncGeneration(self.sequence.adjust)


class Scheduler:
    """Runs the steps of all active requests, on one thread.

    Attributes:
        active: requests that have a slot.
        closing: all requests are about to be cancelled.
    """

    def __init__(self, batch: Batch, slots: SlotManager, counters: Counters) -> None:
        self.active: list[Request] = []
        self.closing = False
        self._batch = batch
        self._slots = slots
        self._counters = counters
        self._turn = 0
        self._outgoing: list[tuple[AsyncGeneration, GenerationChunk | LlmEdgeError]] = []  # of the current step
        self._decode_step = 0.0  # average duration of recent steps in seconds
        # Prompt tokens per step while others decode; a GPU takes hardly longer for many than for few.
        self._chunk = 2 * CHUNK_ALIGNMENT if batch.device == "cpu" else PREFILL_CHUNK

    def admit(self, request: Request) -> bool:
        """Assign a slot to a request, or fail it if that is impossible; the caller adds it to `active`.

        Returns:
            False if the request should wait, because another prompt with the same prefix is being computed.
        """
        try:
            tokens = request.sequence.tokens
            limit = request.sequence.reusable(len(tokens)) if self._batch.has_states else None
            source, length = self._slots.longest_prefix(tokens, limit)
            if self._awaits_prefix(request.sequence, length + WORTH_KEEPING):
                return False
            length = request.sequence.reuse(length)
            if self._batch.forgets and (shared := self._slots.shared_prefix(tokens)) >= length + WORTH_KEEPING:
                request.sequence.keep_states_at(shared)
            request.slot = self._slots.assign(tokens, source, length)
        except BaseException as error:  # noqa: BLE001 (see above)
            self._recover_slots()
            self._report(request, error)
            self._pass_on()
            return True
        self._counters.prompt_tokens += len(tokens)
        self._counters.cached_tokens += length
        return True

    def _awaits_prefix(self, sequence: TokenSequence, wanted: int) -> bool:
        """Whether another prompt is about to compute `wanted` tokens or more that a prompt can then reuse."""
        for other in [each.sequence for each in self.active if each.sequence.prefilling]:
            shared = common_prefix(other.tokens, sequence.tokens)
            if shared >= wanted and self._batch.forgets:
                shared = other.keep_states_at(sequence.reusable(shared))
            if shared >= wanted:
                return True
        return False

    def step(self) -> None:
        """Advance every active request."""
        try:
            self.cancel(lambda request: request.generation.cancelled)
            self._prefill()
            self._decode()
        finally:
            self._pass_on()

    def cancel(self, which: Callable[[Request], bool]) -> None:
        """End active requests with `FinishReason.CANCELLED`."""
        for request in [each for each in self.active if which(each)]:
            self._cancel(request)
        self._pass_on()

    def _prefill(self) -> None:
        """Compute a chunk of one prompt: in turn, of the oldest and of the one that is complete soonest."""
        prompts = [request for request in self.active if request.sequence.prefilling]
        if not prompts:
            return
        self._turn += 1
        request = prompts[0] if self._turn % 2 else min(prompts, key=lambda each: each.sequence.prompt_left)
        decoding = len(self.active) - len(prompts)
        began = time.perf_counter()
        tokens = self._pending(request, self._chunk if decoding else PREFILL_CHUNK)
        if not tokens:
            return
        self._extend(request, tokens, 1)
        seconds = time.perf_counter() - began
        self._counters.prefill_steps += 1
        self._counters.prefill_seconds += seconds
        if decoding:
            steps = max(1.0, len(prompts) / min(decoding, _FEW_DECODING))
            self._adapt_chunk(len(tokens), seconds, self._decode_step * steps)

    def _adapt_chunk(self, tokens: int, seconds: float, wanted: float) -> None:
        """Adapt the number of tokens in a chunk to what a chunk took, given what it should take."""
        if tokens == self._chunk and seconds < _MIN_CHUNK_RATIO * wanted:
            faster = max(CHUNK_ALIGNMENT, self._chunk // 2) if seconds < 0.5 * wanted else CHUNK_ALIGNMENT
            self._chunk = min(self._chunk + faster, PREFILL_CHUNK)
        elif seconds > _MAX_CHUNK_RATIO * wanted:
            slower = max(CHUNK_ALIGNMENT, self._chunk // 4) if seconds > 2.0 * wanted else CHUNK_ALIGNMENT
            self._chunk = max(self._chunk - slower, CHUNK_ALIGNMENT)
        self._chunk -= self._chunk % CHUNK_ALIGNMENT

    def _decode(self) -> None:
        """Generate the next token of every sequence, or several where draft tokens are accepted."""
        single: dict[int, Request] = {}
        began = time.perf_counter()
        steps = 0
        for request in [each for each in self.active if not each.sequence.prefilling]:
            # As in `Model`: with states, accepted tokens before a rejected one are computed again.
            sequence = request.sequence
            repeated = sequence.tokens[self._batch.lengths[request.slot] : sequence.computed]
            tokens = self._pending(request, 1, draft=not repeated)
            if tokens and len(repeated) + len(tokens) > 1:
                self._extend(request, [*repeated, *tokens], len(tokens) if repeated else 0)
                steps += 1
            elif tokens:
                single[request.slot] = request
        for span in spans(list(single)):
            steps += 1
            self._decode_span(span, single)
        if steps:
            seconds = time.perf_counter() - began
            self._counters.decode_steps += steps
            self._counters.decode_seconds += seconds
            # an exponential moving average; the first value counts fully
            self._decode_step = 0.8 * self._decode_step + 0.2 * seconds if self._decode_step else seconds

    def _decode_span(self, span: range, single: Mapping[int, Request]) -> None:
        """One decode step over adjacent slots, some of which may be idle."""
        active = [slot in single for slot in span]
        tokens = [single[slot].sequence.tokens[-1] if slot in single else 0 for slot in span]
        requests = [single[slot] for slot in span if slot in single]
        logits = self._run(requests, lambda: self._batch.decode(span.start, tokens, active))
        if logits is not None:
            for request in requests:
                self._advance(request, logits[request.slot - span.start][None])

    def _pending(self, request: Request, max_prompt_tokens: int, *, draft: bool = True) -> list[int]:
        """The tokens to compute next; none if the request failed."""
        try:
            return request.sequence.pending(max_prompt_tokens, draft=draft)
        except BaseException as error:  # noqa: BLE001 (see above)
            self._step_failed([request], error)
            return []

    def _extend(self, request: Request, tokens: Sequence[int], num_logits: int) -> None:
        """A step over several tokens of one sequence."""
        logits = self._run([request], lambda: self._batch.extend(request.slot, tokens, num_logits))
        if logits is not None:
            self._advance(request, logits)

    def _run(self, requests: Sequence[Request], step: Callable[[], Logits]) -> Logits | None:
        """Run a step; if it fails, so do its requests."""
        self._batch.cancel_steps_if(lambda: self.closing or any(each.generation.cancelled for each in requests))
        try:
            return step()
        except BaseException as error:  # noqa: BLE001 (see above)
            self._step_failed(requests, error)
            return None

    def _step_failed(self, requests: Sequence[Request], error: BaseException) -> None:
        """Fail the requests of a step; if it was terminated for a cancelled one, the others repeat it."""
        cancelled = [request for request in requests if self.closing or request.generation.cancelled]
        if isinstance(error, StepTerminatedError) and cancelled:
            for request in cancelled:
                self._cancel(request)
            return
        for request in requests:
            self._fail(request, error)

    def _advance(self, request: Request, logits: Logits) -> None:
        """Sample, pass the chunks on, and release the slot if the generation is complete."""
        sequence = request.sequence
        last: GenerationChunk | None = None
        try:
            for last in sequence.advance(logits):
                if last.timings is None:
                    self._outgoing.append((request.generation, last))
        except BaseException as error:  # noqa: BLE001 (see above)
            self._fail(request, error)
            return
        self._batch.rewind(request.slot, sequence.computed)  # drops rejected draft tokens
        if sequence.keeps_states:
            self._batch.keep_states(request.slot)
        if last is not None and last.timings is not None:
            self._counters.finished += 1
            self._finish(request, last)

    def _finish(self, request: Request, last: GenerationChunk) -> None:
        """Release the slot, then pass on the last chunk, so that a caller's next request sees current counters."""
        if last.timings is not None:
            self._counters.completion_tokens += last.timings.completion_tokens
            self._counters.draft_tokens += last.timings.draft_tokens
            self._counters.accepted_tokens += last.timings.accepted_tokens
        self._release(request, keep=True)
        self._outgoing.append((request.generation, last))

    def _cancel(self, request: Request) -> None:
        try:
            last = request.sequence.finish(FinishReason.CANCELLED)
        except BaseException as error:  # noqa: BLE001 (see above)
            self._fail(request, error)
            return
        self._counters.cancelled += 1
        self._finish(request, last)

    def _fail(self, request: Request, error: BaseException) -> None:
        self._release(request, keep=False)
        self._report(request, error)

    def _release(self, request: Request, *, keep: bool) -> None:
        self.active.remove(request)
        try:
            self._slots.release(request.slot, keep=keep)
        except BaseException:  # noqa: BLE001 (memory that could not be returned is no reason to fail a request)
            self._recover_slots()

    def _recover_slots(self) -> None:
        self._slots.recover(each.slot for each in self.active)

    def _report(self, request: Request, error: BaseException) -> None:
        """Pass an error to the caller as an LlmEdgeError."""
        self._counters.failed += 1
        self._outgoing.append((request.generation, as_llm_edge_error(error)))

    def _pass_on(self) -> None:
        """Pass chunks and errors on to the callers, after the last row of a step.

        A caller that wakes up takes the interpreter's lock whenever numpy releases it, so that the rows after its own
        would wait for it; onnxruntime releases it for the whole next step.
        """
        chunks, self._outgoing = self._outgoing, []
        for generation, item in chunks:
            generation.put(item)
