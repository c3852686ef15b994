"""`Engine` under many callers while everything that a step calls fails at random; `make stress` runs more of it."""

from __future__ import annotations

from pathlib import Path

import pytest
from failing import CALLS, ERRORS, Failures
from stress import stress

from llm_edge.runtime import SamplingParams
from llm_edge.runtime.engine import Engine
from llm_edge.runtime.errors import LlmEdgeError


@pytest.mark.parametrize(("seed", "rate"), [(1, 0.001), (2, 0.01)])
def test_no_caller_waits_and_the_engine_serves_whatever_fails(tiny_bundle: Path, seed: int, rate: float) -> None:
    report = stress(tiny_bundle, seed, callers=8, requests=8, rate=rate, patience=120)
    assert report.wrong == []
    assert report.failures > 0
    assert report.failed > 0
    assert report.serves
    assert report.finished + report.cancelled + report.failed + report.refused == 64


@pytest.mark.parametrize(("owner", "name"), CALLS, ids=lambda each: each if isinstance(each, str) else each.__name__)
def test_a_call_that_always_fails_leaves_no_caller_waiting(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, owner: type, name: str
) -> None:
    failures = Failures(seed=0)
    failures.inject(monkeypatch, owner, name)
    params = SamplingParams(temperature=0, max_tokens=4)
    prompt = "The quick brown fox jumps over"
    with Engine.load(tiny_bundle, "fp32", threads=1, active=2, speculative=True) as engine:
        wanted = engine.generate(prompt, params).result()
        failures.rate = 1.0
        messages = []
        for _ in range(len(ERRORS)):
            for answer in engine.generate_many(prompt, params, 3):
                try:
                    answer.result()
                except LlmEdgeError as error:
                    messages.append(str(error))
        assert not any("\n" in message for message in messages)
        failures.rate = 0.0
        assert engine.generate(prompt, params).result().tokens == wanted.tokens
        counters = engine.counters()
        assert (counters.active, counters.waiting) == (0, 0)
        assert counters.requests == counters.finished + counters.cancelled + counters.failed
