"""`bench/engine.py`: tokens per second of answers that run at the same time."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import cast

import pytest

from llm_edge.bench.engine import together
from llm_edge.runtime.engine import Engine
from llm_edge.runtime.errors import LlmEdgeError
from llm_edge.runtime.sampling.params import SamplingParams


class TwoAnswers:
    """An engine of two answers: the second begins when the first has `overlap_at` tokens, or all of its own."""

    def __init__(self, overlap_at: int) -> None:
        self.overlap_at = overlap_at
        self.lengths: list[int] = []
        self._begin = self._begun = threading.Event()

    def generate(self, prompt: list[int], params: SamplingParams) -> Iterator[int]:
        assert params.max_tokens is not None
        if prompt == [0]:
            self.lengths.append(params.max_tokens)
            self._begin, self._begun = threading.Event(), threading.Event()
            return self._first(params.max_tokens, self._begin, self._begun)
        return self._second(params.max_tokens, self._begin, self._begun)

    def _first(self, count: int, begin: threading.Event, begun: threading.Event) -> Iterator[int]:
        for number in range(count):
            if number == self.overlap_at:
                begin.set()
                begun.wait()
            yield number
        begin.set()

    @staticmethod
    def _second(count: int, begin: threading.Event, begun: threading.Event) -> Iterator[int]:
        begin.wait()
        yield 0
        begun.set()
        yield from range(1, count)


def test_answers_that_never_ran_together_are_repeated_with_more_tokens() -> None:
    engine = TwoAnswers(overlap_at=20)
    assert together(cast("Engine", engine), [[0], [1]], 10) > 0
    assert engine.lengths == [10, 20, 40]


def test_answers_that_cannot_be_measured_together_are_an_error() -> None:
    with pytest.raises(LlmEdgeError, match="2 answers of 80 tokens never ran at the same time"):
        together(cast("Engine", TwoAnswers(overlap_at=1000)), [[0], [1]], 10)
