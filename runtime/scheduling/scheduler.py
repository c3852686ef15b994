"""`Scheduler`: decides the order of an engine's steps. Requests that wait for a slot are queued in `Engine`.

Each step computes a chunk of one prompt, then a token for every active sequence, in one decode where their slots are
adjacent. An error in a step or a sequence fails the affected requests and no others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from llm_edge.runtime.backend.graph import one_line
from llm_edge.runtime.backend.session import PREFILL_CHUNK, Logits
from llm_edge.runtime.errors import LlmEdgeError, MachineError
from llm_edge.runtime.generation import AsyncGeneration
from llm_edge.runtime.results import FinishReason, GenerationChunk
from llm_edge.runtime.scheduling.batch import Batch
from llm_edge.runtime.scheduling.counters import Counters
from llm_edge.runtime.scheduling.sequence import CHUNK_ALIGNMENT, TokenSequence, common_prefix
from llm_edge.runtime.scheduling.slots import SlotManager, spans

# A chunk of a prompt, while others decode, should take this many times as long as a decode step.
_MIN_CHUNK_RATIO, _MAX_CHUNK_RATIO = 1.0, 1.4
_WORTH_WAITING = 8 * CHUNK_ALIGNMENT  # shared prefix that another prompt is about to compute, in tokens


@dataclass(slots=True, eq=False)
class Request:
    """A sequence and the caller's handle on it; `slot` is -1 while the request waits."""

    sequence: TokenSequence
    generation: AsyncGeneration = field(init=False)
    slot: int = -1

    def __post_init__(self) -> None:
        self.generation = AsyncGeneration(self.sequence.adjust)


class Scheduler:
    """Runs the steps of all active requests, on one thread, each within the context manager `watched`.

    Attributes:
        active: requests that have a slot.
    """

    def __init__(
        self, batch: Batch, slots: SlotManager, counters: Counters, watched: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.active: list[Request] = []
        self._batch = batch
        self._slots = slots
        self._counters = counters
        self._watched = watched
        self._turn = 0
        self._decode_step = 0.0  # average duration of recent steps in seconds
        # Prompt tokens per step while others decode; a GPU takes hardly longer for many than for few.
        self._chunk = 2 * CHUNK_ALIGNMENT if batch.device == "cpu" else PREFILL_CHUNK

    def admit(self, request: Request) -> bool:
        """Assign a slot to a request, or fail it if that is impossible; the caller adds it to `active`.

        Returns:
            False if the request should wait, because another prompt with the same prefix is being computed.
        """
        tokens = request.sequence.tokens
        source, length = self._slots.longest_prefix(tokens)
        prompts = [each.sequence.tokens for each in self.active if each.sequence.prefilling]
        if max((common_prefix(prompt, tokens) for prompt in prompts), default=0) >= length + _WORTH_WAITING:
            return False
        length = request.sequence.reuse(length)
        try:
            request.slot = self._slots.assign(tokens, source, length)
        except Exception as error:  # noqa: BLE001 (other requests continue, whatever it is)
            self._report(request, error)
            return True
        self._counters.prompt_tokens += len(tokens)
        self._counters.cached_tokens += length
        return True

    def step(self) -> None:
        """Advance every active request."""
        self.cancel(lambda request: request.generation.cancelled)
        self._prefill()
        self._decode()

    def cancel(self, which: Callable[[Request], bool]) -> None:
        """End active requests with `FinishReason.CANCELLED`."""
        for request in [each for each in self.active if which(each)]:
            self._counters.cancelled += 1
            self._finish(request, request.sequence.finish(FinishReason.CANCELLED))

    def _prefill(self) -> None:
        """Compute a chunk of one prompt; prompts take turns."""
        prompts = [request for request in self.active if request.sequence.prefilling]
        if not prompts:
            return
        self._turn += 1
        request = prompts[self._turn % len(prompts)]
        others = len(prompts) < len(self.active)
        began = time.perf_counter()
        tokens = self._pending(request, self._chunk if others else PREFILL_CHUNK)
        if not tokens:
            return
        self._extend(request, tokens, 1)
        seconds = time.perf_counter() - began
        self._counters.prefill_steps += 1
        self._counters.prefill_seconds += seconds
        if others and seconds < _MIN_CHUNK_RATIO * self._decode_step:
            self._chunk = min(self._chunk + CHUNK_ALIGNMENT, PREFILL_CHUNK)
        elif others and seconds > _MAX_CHUNK_RATIO * self._decode_step:
            self._chunk = max(self._chunk - CHUNK_ALIGNMENT, CHUNK_ALIGNMENT)

    def _decode(self) -> None:
        """Generate the next token of every sequence, or several where draft tokens are accepted."""
        single: dict[int, Request] = {}
        began = time.perf_counter()
        steps = 0
        for request in [each for each in self.active if not each.sequence.prefilling]:
            tokens = self._pending(request, 1)
            if len(tokens) > 1:
                self._extend(request, tokens, 0)
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

    def _pending(self, request: Request, max_prompt_tokens: int) -> list[int]:
        """The tokens to compute next; none if the request failed."""
        try:
            return request.sequence.pending(max_prompt_tokens)
        except Exception as error:  # noqa: BLE001 (other requests continue, whatever it is)
            self._fail(request, error)
            return []

    def _extend(self, request: Request, tokens: Sequence[int], num_logits: int) -> None:
        """A step over several tokens of one sequence."""
        logits = self._run([request], lambda: self._batch.extend(request.slot, tokens, num_logits))
        if logits is not None:
            self._advance(request, logits)

    def _run(self, requests: Sequence[Request], step: Callable[[], Logits]) -> Logits | None:
        """Run a step; if it fails, so do its requests."""
        try:
            with self._watched():
                return step()
        except Exception as error:  # noqa: BLE001 (other requests continue, whatever it is)
            for request in requests:
                self._fail(request, error)
            return None

    def _advance(self, request: Request, logits: Logits) -> None:
        """Sample, pass the chunks on, and release the slot if the generation is complete."""
        sequence = request.sequence
        last: GenerationChunk | None = None
        try:
            for last in sequence.advance(logits):
                if last.timings is None:
                    request.generation.put(last)
        except Exception as error:  # noqa: BLE001 (as in `_run`)
            self._fail(request, error)
            return
        self._batch.lengths[request.slot] = sequence.computed  # drops rejected draft tokens
        if last is not None and last.timings is not None:
            self._counters.finished += 1
            self._finish(request, last)

    def _finish(self, request: Request, last: GenerationChunk) -> None:
        """Release the slot, then pass on the last chunk, so that a caller's next request sees current counters."""
        if last.timings is not None:
            self._counters.completion_tokens += last.timings.completion_tokens
            self._counters.draft_tokens += last.timings.draft_tokens
            self._counters.accepted_tokens += last.timings.accepted_tokens
        self._slots.release(request.slot)
        self.active.remove(request)
        request.generation.put(last)

    def _fail(self, request: Request, error: Exception) -> None:
        self._slots.release(request.slot, keep=False)
        self.active.remove(request)
        self._report(request, error)

    def _report(self, request: Request, error: Exception) -> None:
        """Pass an error to the caller as an LlmEdgeError."""
        if not isinstance(error, LlmEdgeError):
            reason = one_line(error) or type(error).__name__
            cause, error = error, MachineError(f"generation failed unexpectedly ({reason})")
            error.__cause__ = cause
        self._counters.failed += 1
        request.generation.put(error)
