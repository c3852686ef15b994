"""The order of an engine's steps: who sits down, whose prompt goes on, who gets tokens. Knows no callers, no threads.

A round takes a piece of one prompt and then a token of every answer, in one step where rows lie side by side. Whatever
goes wrong in a step or with an answer ends the answers it is about, and no others.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

from llm_edge.runtime.backend.session import PREFILL_CHUNK, Logits, one_line
from llm_edge.runtime.errors import LlmEdgeError, MachineError
from llm_edge.runtime.generation import AsyncGeneration
from llm_edge.runtime.results import FinishReason, GenerationChunk
from llm_edge.runtime.scheduling.batch import Batch
from llm_edge.runtime.scheduling.counters import Counters
from llm_edge.runtime.scheduling.prefixes import common_prefix
from llm_edge.runtime.scheduling.sequence import CHUNK_ALIGNMENT, TokenSequence
from llm_edge.runtime.scheduling.slots import SlotManager, spans

_LEAST, _MOST = 1.0, 1.4  # steps of the others that a piece of a prompt is to take meanwhile
_WORTH_WAITING = 8 * CHUNK_ALIGNMENT  # tokens that another prompt is about to compute


@dataclass(slots=True, eq=False)
class Request:
    """An answer, from its prompt to its end; `row` is where it sits, once it does."""

    lane: TokenSequence
    answer: AsyncGeneration = field(init=False)
    row: int = -1

    def __post_init__(self) -> None:
        self.answer = AsyncGeneration(self.lane.adjust)


class Scheduler:
    """Makes the steps of all answers, on one thread.

    Args:
        batch: that computes them.
        rows: of the batch.
        counters: of tokens and steps, and of answers by how they ended.
        watched: around each step.

    Attributes:
        active: answers on their way.
    """

    def __init__(
        self, batch: Batch, rows: SlotManager, counters: Counters, watched: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self.active: list[Request] = []
        self._batch = batch
        self._rows = rows
        self._counters = counters
        self._watched = watched
        self._turn = 0
        self._decode_step = 0.0  # seconds, of late
        # Tokens of a prompt that are computed at once while others wait; a GPU takes no longer for many than for few.
        self._piece = 2 * CHUNK_ALIGNMENT if batch.device == "cpu" else PREFILL_CHUNK

    def seat(self, request: Request) -> bool:
        """Find an answer its row; False where it better waits, for a prompt that begins alike is being computed.

        It is for the caller to make it one of the `active` ones, if it has a row then: one that nothing can be done for
        has been told so.
        """
        tokens = request.lane.tokens
        source, length = self._rows.longest(tokens)
        prompts = [each.lane.tokens for each in self.active if each.lane.prefilling]
        if max((common_prefix(prompt, tokens) for prompt in prompts), default=0) >= length + _WORTH_WAITING:
            return False
        length = request.lane.reuse(length)
        try:
            request.row = self._rows.take(tokens, source, length)
        except Exception as error:  # noqa: BLE001 (the others' answers go on, whatever it is)
            self._refuse(request, error)
            return True
        self._counters.prompt_tokens += len(tokens)
        self._counters.cached_tokens += length
        return True

    def round(self) -> None:
        """A step for everybody."""
        self.end(lambda request: request.answer.cancelled)
        self._prefill()
        self._decode()

    def end(self, which: Callable[[Request], bool]) -> None:
        """End answers with `FinishReason.CANCELLED`."""
        for request in [each for each in self.active if which(each)]:
            self._counters.cancelled += 1
            self._leave(request, request.lane.end(FinishReason.CANCELLED))

    def _prefill(self) -> None:
        """One piece of one prompt, each of them in turn."""
        prompts = [request for request in self.active if request.lane.prefilling]
        if not prompts:
            return
        self._turn += 1
        request = prompts[self._turn % len(prompts)]
        others = len(prompts) < len(self.active)
        began = time.perf_counter()
        asked = self._asked(request, self._piece if others else PREFILL_CHUNK)
        if not asked:
            return
        self._extend(request, asked, 1)
        took = time.perf_counter() - began
        self._counters.prefill_steps += 1
        self._counters.prefill_seconds += took
        if others and took < _LEAST * self._decode_step:
            self._piece = min(self._piece + CHUNK_ALIGNMENT, PREFILL_CHUNK)
        elif others and took > _MOST * self._decode_step:
            self._piece = max(self._piece - CHUNK_ALIGNMENT, CHUNK_ALIGNMENT)

    def _decode(self) -> None:
        """The next token of every answer; several of those that guess."""
        single: dict[int, Request] = {}
        began = time.perf_counter()
        steps = 0
        for request in [each for each in self.active if not each.lane.prefilling]:
            asked = self._asked(request, 1)
            if len(asked) > 1:
                self._extend(request, asked, 0)
                steps += 1
            elif asked:
                single[request.row] = request
        for span in spans(list(single)):
            steps += 1
            self._decode_span(span, single)
        if steps:
            took = time.perf_counter() - began
            self._counters.decode_steps += steps
            self._counters.decode_seconds += took
            self._decode_step = _mean(self._decode_step, took)

    def _decode_span(self, span: range, single: Mapping[int, Request]) -> None:
        """One token more for the answers in rows that lie side by side, others among them."""
        going = [row in single for row in span]
        tokens = [single[row].lane.tokens[-1] if row in single else 0 for row in span]
        requests = [single[row] for row in span if row in single]
        logits = self._step(requests, lambda: self._batch.decode(span.start, tokens, going))
        if logits is not None:
            for request in requests:
                self._take(request, logits[request.row - span.start][None])

    def _asked(self, request: Request, most: int) -> list[int]:
        """Tokens to compute next; none where that came to nothing."""
        try:
            return request.lane.pending(most)
        except Exception as error:  # noqa: BLE001 (the others' answers go on, whatever it is)
            self._fail(request, error)
            return []

    def _extend(self, request: Request, asked: Sequence[int], num_logits: int) -> None:
        """Several tokens more for one answer."""
        logits = self._step([request], lambda: self._batch.extend(request.row, asked, num_logits))
        if logits is not None:
            self._take(request, logits)

    def _step(self, requests: Sequence[Request], step: Callable[[], Logits]) -> Logits | None:
        """A step; where it fails, so do the answers it was for."""
        try:
            with self._watched():
                return step()
        except Exception as error:  # noqa: BLE001 (the others' answers go on, whatever it is)
            for request in requests:
                self._fail(request, error)
            return None

    def _take(self, request: Request, logits: Logits) -> None:
        """Hand on what the logits make; stand up where the answer is done."""
        lane = request.lane
        last: GenerationChunk | None = None
        try:
            for last in lane.take(logits):
                if last.timings is None:
                    request.answer.put(last)
        except Exception as error:  # noqa: BLE001 (as in `_step`)
            self._fail(request, error)
            return
        self._batch.lengths[request.row] = lane.computed  # wrong guesses go
        if last is not None and last.timings is not None:
            self._counters.finished += 1
            self._leave(request, last)

    def _leave(self, request: Request, last: GenerationChunk) -> None:
        """Stand up, and hand on the last piece: whoever asks again then finds room, and counters that know of it."""
        if last.timings is not None:
            self._counters.completion_tokens += last.timings.completion_tokens
            self._counters.guessed_tokens += last.timings.guessed_tokens
            self._counters.accepted_tokens += last.timings.accepted_tokens
        self._rows.leave(request.row)
        self.active.remove(request)
        request.answer.put(last)

    def _fail(self, request: Request, error: Exception) -> None:
        self._rows.leave(request.row, keep=False)
        self.active.remove(request)
        self._refuse(request, error)

    def _refuse(self, request: Request, error: Exception) -> None:
        """Hand on an error, as one of ours."""
        if not isinstance(error, LlmEdgeError):
            why = one_line(error) or type(error).__name__
            cause, error = error, MachineError(f"an answer failed unexpectedly ({why})")
            error.__cause__ = cause
        self._counters.failed += 1
        request.answer.put(error)


def _mean(before: float, now: float) -> float:
    """A mean of late values."""
    return now if not before else 0.8 * before + 0.2 * now
