"""Failures that are injected into every call of a step."""

from __future__ import annotations

import functools
import random
import threading
from collections.abc import Callable
from typing import Any

import pytest

from llm_edge.runtime.backend.step_runner import StepRunner
from llm_edge.runtime.errors import MachineError, ParameterError
from llm_edge.runtime.sampling.grammar import ConstraintProcessor
from llm_edge.runtime.sampling.sampler import Sampler
from llm_edge.runtime.scheduling.batch import Batch
from llm_edge.runtime.scheduling.sequence import TokenSequence
from llm_edge.runtime.scheduling.slot_memory import HostSlots
from llm_edge.runtime.scheduling.slots import SlotManager
from llm_edge.runtime.speculative.prompt_lookup import PromptLookup
from llm_edge.runtime.text.answer_stream import AnswerStream
from llm_edge.runtime.text.reasoning_parser import ReasoningParser
from llm_edge.runtime.text.tokenizer import TextStream, Tokenizer


class PanicException(BaseException):
    """What Rust's panics are in Python: no Exception."""


ERRORS: tuple[Callable[[], BaseException], ...] = (
    lambda: ValueError("injected"),
    lambda: MachineError("injected"),
    lambda: ParameterError("injected"),
    lambda: OSError(28, "injected"),
    lambda: RuntimeError("two\nlines"),
    MemoryError,
    RecursionError,
    lambda: PanicException("injected"),
    KeyboardInterrupt,
    lambda: SystemExit(3),
    GeneratorExit,
    StopIteration,
)

# Everything that the engine's thread calls in a step, from the outermost call inwards.
CALLS: tuple[tuple[type, str], ...] = (
    (SlotManager, "longest_prefix"),
    (SlotManager, "assign"),
    (SlotManager, "release"),
    (SlotManager, "enforce_budget"),
    (Batch, "decode"),
    (Batch, "extend"),
    (Batch, "copy"),
    (Batch, "release"),
    (Batch, "_grow"),
    (HostSlots, "copy"),
    (HostSlots, "release"),
    (StepRunner, "run"),
    (TokenSequence, "reuse"),
    (TokenSequence, "pending"),
    (TokenSequence, "advance"),
    (TokenSequence, "finish"),
    (Sampler, "sample"),
    (Sampler, "candidates"),
    (ConstraintProcessor, "__call__"),
    (ConstraintProcessor, "accept"),
    (PromptLookup, "propose"),
    (PromptLookup, "record_acceptance"),
    (AnswerStream, "push"),
    (AnswerStream, "flush"),
    (ReasoningParser, "push"),
    (TextStream, "push"),
    (TextStream, "flush"),
    (Tokenizer, "decode"),
)


class Failures:
    """Makes calls fail on the engine's thread: at random, or every time.

    Attributes:
        rate: probability of a failure of each call.
        count: number of failures so far.
    """

    def __init__(self, seed: int, rate: float = 0.0) -> None:
        self.rate = rate
        self.count = 0
        self._random = random.Random(seed)

    def inject(self, patch: pytest.MonkeyPatch, owner: type, name: str) -> None:
        """Let a method fail before or after its work."""
        if not hasattr(owner, name):
            raise AttributeError(f"{owner.__name__}.{name}")
        method = getattr(owner, name)

        @functools.wraps(method)
        def failing(*arguments: Any, **keywords: Any) -> Any:
            if threading.current_thread().name != "llm-edge-engine" or self._random.random() >= self.rate:
                return method(*arguments, **keywords)
            self.count += 1
            error = self._random.choice(ERRORS)()
            if self._random.random() < 0.5:
                method(*arguments, **keywords)
            raise error

        patch.setattr(owner, name, failing)
