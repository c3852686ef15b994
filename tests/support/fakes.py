"""Fake implementations of the runtime's interfaces, to test code built on it without a model."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np

from llm_edge.runtime.errors import LlmEdgeError
from llm_edge.runtime.generation import Generation
from llm_edge.runtime.model_shape import ModelShape
from llm_edge.runtime.results import FinishReason, GenerationChunk, Timings
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.runtime.text.prompts import Message


@dataclass
class Answer:
    """The answer of a `FakeModel` to one question.

    Attributes:
        chunks: texts, one per token.
        reason: the finish reason.
        refusal: raised instead of starting.
        failure: raised after the last chunk instead of finishing.
        before: called with a chunk's number before it is yielded; may wait, cancel or send a signal.
        reasoning: texts before the chunks, one per token; they are counted too.
    """

    chunks: Sequence[str] = ()
    reason: FinishReason = FinishReason.STOP
    refusal: LlmEdgeError | None = None
    failure: LlmEdgeError | None = None
    before: Callable[[int], object] = field(default=lambda _number: None)
    reasoning: Sequence[str] = ()


class FakeModel:
    """The part of `Model` that `LocalResponder` uses; returns the enqueued answers in order.

    Attributes:
        questions: the messages and parameters of every call so far.
        template_variables: those of every call so far.
    """

    def __init__(self, *answers: Answer | str, params: SamplingParams | None = None) -> None:
        self.bundle = SimpleNamespace(name="fake", path=Path("fake"))
        self.precision = SimpleNamespace(name="fp32")
        self.provider = "cpu"
        self.context_length = 1024
        self.default_params = params or SamplingParams()
        self.tokenizer = None
        self._answers = deque(answers)
        self.questions: list[tuple[list[dict[str, Any]], SamplingParams | None]] = []
        self.template_variables: list[dict[str, Any]] = []

    def enqueue(self, *answers: Answer | str) -> None:
        """Enqueue answers; a string is an answer with one chunk per character."""
        self._answers.extend(answers)

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        assistant_prefix: str = "",
        reasoning_prefix: str = "",
        template_variables: Mapping[str, Any] | None = None,
    ) -> Generation:
        assert (assistant_prefix, reasoning_prefix) == ("", "")
        self.template_variables.append(dict(template_variables or {}))
        self.questions.append(([dict(message) for message in messages], params))
        enqueued = self._answers.popleft()
        answer = Answer(enqueued) if isinstance(enqueued, str) else enqueued
        if answer.refusal is not None:
            raise answer.refusal
        cancelled = threading.Event()
        return Generation(self._pieces(answer, cancelled), cancelled)

    def clear_cache(self) -> None:
        """Nothing is cached."""

    @staticmethod
    def _pieces(answer: Answer, cancelled: threading.Event) -> Iterator[GenerationChunk]:
        count = 0

        def end(reason: FinishReason) -> GenerationChunk:
            to_first = 0.25 if count else 0.0
            timings = Timings(7, count, to_first, 0.25, max(count - 1, 0) * 0.1, min(count, len(answer.reasoning)))
            return GenerationChunk("", None, reason, timings)

        texts = [*answer.reasoning, *answer.chunks]
        for number, text in enumerate(texts):
            answer.before(number)
            if cancelled.is_set():
                yield end(FinishReason.CANCELLED)
                return
            count += 1
            yield GenerationChunk(text, number, reasoning=number < len(answer.reasoning))
        answer.before(len(texts))
        if answer.failure is not None:
            raise answer.failure
        yield end(FinishReason.CANCELLED if cancelled.is_set() else answer.reason)


class FakeSession:
    """A `Session` that makes a greedy sampler repeat the given tokens, starting over at each `reset`.

    Attributes:
        steps: the number of tokens of each step since the session was created.
        before_step: called with the step's number before it runs.
    """

    provider = "cpu"
    run_seconds = 0.0
    rewinds_in_place = False

    def __init__(self, tokens: Sequence[int], shape: ModelShape) -> None:
        self.shape = shape
        self.length = 0
        self.steps: list[int] = []
        self.before_step: Callable[[int], object] = lambda _number: None
        self._tokens = tokens
        self._drawn = 0

    @property
    def limit(self) -> int:
        return self.shape.max_position_embeddings

    def step(self, tokens: Sequence[int], num_logits: int = 1) -> np.ndarray[Any, np.dtype[np.float32]]:
        assert num_logits == 1
        self.before_step(len(self.steps))
        self.steps.append(len(tokens))
        self._drawn = 0 if len(tokens) > 1 or self.length == 0 else self._drawn + 1
        self.length += len(tokens)
        assert self.length <= self.limit
        logits = np.zeros((1, self.shape.vocab_size), dtype=np.float32)
        logits[0, self._tokens[self._drawn % len(self._tokens)]] = 1.0
        return logits

    def cancel_steps_if(self, unwanted: Callable[[], bool]) -> None:
        """Its steps take no time."""

    def rewind(self, length: int) -> int:
        self.length = length
        return length

    def reset(self) -> None:
        self.length = self._drawn = 0
