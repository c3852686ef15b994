"""`Engine`: failures affect only their own request; constraints and log-probabilities."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from endless import Endless

from llm_edge.exporter.export import export
from llm_edge.exporter.options import ExportOptions, GraphChoice
from llm_edge.runtime import Constraint, FinishReason, GenerationResult, Model, SamplingParams
from llm_edge.runtime.backend.session import Session
from llm_edge.runtime.engine import Engine
from llm_edge.runtime.errors import (
    BundleError,
    ContextLengthError,
    LlmEdgeError,
    LogitsError,
    MachineError,
    ParameterError,
)
from llm_edge.runtime.load_options import LoadOptions
from llm_edge.runtime.loading import load
from llm_edge.runtime.scheduling.batch import Batch
from llm_edge.runtime.scheduling.scheduler import Scheduler

Load = Callable[..., Engine]
GREEDY = SamplingParams(temperature=0, repetition_penalty=10, repetition_window=-1, max_tokens=40)
COPYING = SamplingParams(temperature=0, max_tokens=40)
DRAWN = SamplingParams(temperature=1.0, max_tokens=40, seed=1)
PROMPTS = ("The quick brown fox", "What is the capital of France?", 'print("hello', "你好 🙂")
MARK = 317  # a token that no other prompt contains
SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {
        "the capital of France": {"type": "string", "maxLength": 8},
        "brown": {"enum": ["fox", "dog"]},
        "number": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["the capital of France", "brown", "number"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Model:
    return Model.load(tiny_bundle, "fp32", provider="cpu", threads=1)


def outcome(result: GenerationResult) -> tuple[Any, ...]:
    return result.text, result.tokens, result.finish_reason


# Failures are isolated


def fails_among_others(engine: Engine, model: Model, kind: type[LlmEdgeError], **bad: Any) -> str:
    """Check that requests during and after a failing one get correct answers; return its error message."""
    wanted = [outcome(model.generate(prompt, GREEDY).result()) for prompt in PROMPTS]
    before = [engine.generate(prompt, GREEDY) for prompt in PROMPTS[:2]]
    failing = engine.generate(**bad)
    after = [engine.generate(prompt, GREEDY) for prompt in PROMPTS[2:]]
    with pytest.raises(kind) as failed:
        failing.result()
    assert [outcome(answer.result()) for answer in before + after] == wanted
    assert [outcome(engine.generate(prompt, GREEDY).result()) for prompt in PROMPTS] == wanted
    with pytest.raises(ParameterError, match="already been read to its end"):
        failing.result()
    counters = engine.counters()
    assert (counters.requests, counters.finished, counters.failed, counters.active) == (9, 8, 1, 0)
    assert "\n" not in str(failed.value)
    return str(failed.value)


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_a_constraint_that_fails_during_generation(load_engine: Load, tiny_bundle: Path, precision: str) -> None:
    grammar = 'start: "go " c\nc: ' + " | ".join(f'"x{n}"' for n in range(2500))  # too many alternatives for the lexer
    params = replace(DRAWN, constraint=Constraint.lark(grammar))
    engine, model = load_engine(precision), Model.load(tiny_bundle, precision, provider="cpu", threads=1)
    outcome = fails_among_others(engine, model, ParameterError, prompt="go x", params=params)
    assert outcome.startswith("constraint (lark): the answer cannot continue")


@pytest.mark.parametrize(
    ("bans", "named"),
    [
        ({"banned_tokens": tuple(range(400))}, "banned_tokens"),
        ({"banned_first_tokens": tuple(range(400))}, "banned_first_tokens"),
        ({"banned_tokens": tuple(set(range(400)) - {2}), "min_tokens": 3}, "banned_tokens, min_tokens"),
        ({"banned_tokens": tuple(set(range(400)) - {70}), "constraint": Constraint.choice(["0"])}, "banned_tokens"),
    ],
)
@pytest.mark.parametrize("base", [GREEDY, DRAWN, replace(DRAWN, top_k=5, top_p=0.9)])
def test_bans_of_every_token_fail_only_their_request(
    load_engine: Load, model: Model, base: SamplingParams, bans: dict[str, Any], named: str
) -> None:
    params = replace(base, **bans)
    failed = fails_among_others(load_engine(), model, ParameterError, prompt="Hi", params=params)
    assert failed.startswith(f"{named}: no token is left to draw as token 1 of the answer")
    with pytest.raises(ParameterError, match=f"^{named}: no token is left"):
        model.generate("Hi", params).result()
    assert model.generate("Hi", base).result().tokens


def test_an_invalid_constraint_is_rejected_immediately(load_engine: Load) -> None:
    engine = load_engine()
    with pytest.raises(ParameterError, match=r"^constraint \(regex\): [^\n]+$"):
        engine.generate("Hi", replace(DRAWN, constraint=Constraint.regex("(")))
    assert engine.counters().requests == 0


def test_a_failing_step_fails_only_its_request(
    load_engine: Load, model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Batch.extend

    def extend(self: Batch, row: int, tokens: Sequence[int], num_logits: int = 1) -> Any:
        if MARK in tokens:
            raise MachineError("not enough memory for this one")
        return whole(self, row, tokens, num_logits)

    monkeypatch.setattr(Batch, "extend", extend)
    assert "memory" in fails_among_others(load_engine(), model, MachineError, prompt=[5, 6, MARK], params=GREEDY)


def test_nan_logits_fail_only_their_request(load_engine: Load, model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Batch.decode

    def decode(self: Batch, first: int, tokens: Sequence[int], active: Sequence[bool]) -> Any:
        logits = whole(self, first, tokens, active)
        logits[[length == 104 for length in self.lengths[first : first + len(tokens)]]] = np.nan
        return logits

    monkeypatch.setattr(Batch, "decode", decode)
    failed = fails_among_others(load_engine(), model, LogitsError, prompt=[MARK] * 100, params=GREEDY)
    assert "nan" in failed


@pytest.mark.parametrize("method", ["extend", "decode"])
def test_an_unexpected_exception_is_reported_as_an_error(
    load_engine: Load, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    engine = load_engine()
    wanted = outcome(engine.generate(PROMPTS[0], GREEDY).result())
    with monkeypatch.context() as patch:
        patch.setattr(Batch, method, lambda *_: [][1])
        answer = engine.generate(PROMPTS[1], GREEDY)
        with pytest.raises(
            MachineError, match=r"^generation failed unexpectedly \(list index out of range\)$"
        ) as failed:
            answer.result()
        assert isinstance(failed.value.__cause__, IndexError)
    assert outcome(engine.generate(PROMPTS[0], GREEDY).result()) == wanted


def test_a_failing_batch_step_fails_all_its_requests(load_engine: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = load_engine(active=2)
    wanted = outcome(engine.generate(PROMPTS[0], GREEDY).result())
    whole, broken = Batch.decode, threading.Event()

    def decode(self: Batch, first: int, tokens: Sequence[int], active: Sequence[bool]) -> Any:
        if sum(active) == 2 and not broken.is_set():
            broken.set()
            raise MachineError("the machine failed")
        return whole(self, first, tokens, active)

    monkeypatch.setattr(Batch, "decode", decode)
    long = replace(GREEDY, max_tokens=900)
    answers = [engine.generate(prompt, long) for prompt in PROMPTS[:2]] + [engine.generate(PROMPTS[0], GREEDY)]
    for answer in answers[:2]:
        with pytest.raises(MachineError, match="the machine failed"):
            answer.result()
    assert outcome(answers[2].result()) == wanted
    assert engine.counters().kept_tokens > 0


def test_a_stuck_step_is_terminated(tiny_bundle: Path, model: Model) -> None:
    loaded = load(tiny_bundle, LoadOptions("fp32", "cpu", 1, step_seconds=0.2))
    assert isinstance(loaded.session, Session)
    stuck = loaded.session.graph.inference = Endless(loaded.session.graph.inference, 1)
    with Engine(loaded, active=1) as engine:
        began = time.monotonic()
        first, second = engine.generate(PROMPTS[0], GREEDY), engine.generate(PROMPTS[1], GREEDY)
        with pytest.raises(MachineError, match=r"^a step over 1 x \d+ tokens was terminated after 0.2 seconds: .*$"):
            first.result()
        assert 0.2 < time.monotonic() - began < 2
        assert outcome(second.result()) == outcome(model.generate(PROMPTS[1], GREEDY).result())
        stuck.times, stuck.entered = 1, threading.Event()
        third = engine.generate(PROMPTS[2], GREEDY)
        assert stuck.entered.wait(5)
        with pytest.raises(MachineError):
            third.result()
        assert (engine.counters().failed, engine.counters().finished) == (2, 1)


def endless_engine(bundle: Path, times: int = 1, **options: Any) -> tuple[Engine, Endless]:
    """An engine whose next steps do not end by themselves."""
    loaded = load(bundle, LoadOptions("fp32", "cpu", 1))
    assert isinstance(loaded.session, Session)
    endless = loaded.session.graph.inference = Endless(loaded.session.graph.inference, times)
    return Engine(loaded, **options), endless


def test_cancelling_ends_a_stuck_step_and_the_others_repeat_it(tiny_bundle: Path, model: Model) -> None:
    engine, endless = endless_engine(tiny_bundle, 0, active=2)
    with engine:
        chunks = [iter(engine.generate(prompt, replace(GREEDY, max_tokens=900))) for prompt in PROMPTS[:1]]
        next(chunks[0])
        other = engine.generate(PROMPTS[1], replace(GREEDY, max_tokens=900))
        next(iter(other))
        endless.times = 1
        assert endless.entered.wait(5)
        other.cancel()
        assert other.result().finish_reason is FinishReason.CANCELLED
        text = "".join(chunk.text for chunk, _ in zip(chunks[0], range(39), strict=False))
        wanted = model.generate(PROMPTS[0], GREEDY).result().text
        assert wanted.endswith(text)
        assert engine.counters().failed == 0


def test_closing_ends_a_stuck_step(tiny_bundle: Path) -> None:
    engine, endless = endless_engine(tiny_bundle, -1, active=1)
    answers = [engine.generate(prompt, GREEDY) for prompt in PROMPTS]
    assert endless.entered.wait(5)
    engine.close()
    assert {answer.result().finish_reason for answer in answers} == {FinishReason.CANCELLED}
    counters = engine.counters()
    assert (counters.cancelled, counters.failed, counters.active, counters.waiting) == (4, 0, 0, 0)


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, MemoryError, ValueError])
def test_what_ends_the_thread_fails_all_requests_and_later_ones_are_refused(
    load_engine: Load, monkeypatch: pytest.MonkeyPatch, error: type[BaseException]
) -> None:
    engine = load_engine(active=2)
    begun = threading.Event()

    def step(self: Scheduler) -> None:
        if len(self.active) == 2 and begun.is_set():
            raise error

    monkeypatch.setattr(Scheduler, "step", step)
    answers = [engine.generate(prompt, GREEDY) for prompt in PROMPTS]
    begun.set()
    for answer in answers:
        with pytest.raises(MachineError, match=r"^the engine failed unexpectedly \([^\n]+\)$"):
            answer.result()
    with pytest.raises(MachineError, match=r"^the engine has failed: load it again \([^\n]+\)$"):
        engine.generate(PROMPTS[0], GREEDY)
    counters = engine.counters()
    assert (counters.requests, counters.failed, counters.active, counters.waiting) == (4, 4, 0, 0)
    engine.close()


# Constraints


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_constrained_answers_in_a_batch(load_engine: Load, precision: str) -> None:
    rule = Constraint.json_schema(SCHEMA)
    params = SamplingParams(temperature=1.5, max_tokens=200, constraint=rule)
    engine, texts = load_engine(precision), set()
    wanted = {}
    for seed in range(40):
        wanted[seed] = outcome(engine.generate("The capital", replace(params, seed=seed)).result())
    plain = engine.generate(PROMPTS[0], GREEDY)
    answers = {seed: engine.generate("The capital", replace(params, seed=seed)) for seed in range(40)}
    for seed, answer in answers.items():
        result = answer.result()
        assert outcome(result) == wanted[seed]
        assert result.finish_reason is FinishReason.STOP
        value = json.loads(result.text)
        assert list(value) == SCHEMA["required"]
        assert value["brown"] in ("fox", "dog")
        assert 0 <= value["number"] <= 99
        assert result.timings.accepted_tokens > 0  # forced tokens are proposed as draft tokens
        texts.add(result.text)
    assert len(texts) == 40
    assert plain.result().finish_reason is FinishReason.LENGTH
    if precision == "fp32":
        without = load_engine(speculative=False)
        for seed in range(10):
            assert outcome(without.generate("The capital", replace(params, seed=seed)).result()) == wanted[seed]


def test_an_answer_constrained_to_choices(load_engine: Load) -> None:
    engine = load_engine()
    params = SamplingParams(temperature=1, constraint=Constraint.choice(["fox", "dog"]))
    answers = engine.generate_many("The quick brown", replace(params, seed=0), 30)
    assert Counter(answer.result().text for answer in answers).keys() == {"fox", "dog"}


# Log-probabilities


def test_log_probabilities_of_sampled_tokens(load_engine: Load, model: Model) -> None:
    engine = load_engine()
    concurrent = [engine.generate(prompt, DRAWN) for prompt in PROMPTS]
    for params in (replace(DRAWN, logprobs=3), replace(GREEDY, logprobs=1), replace(COPYING, logprobs=0)):
        prompt = engine.tokenizer.encode(PROMPTS[1] * 3)
        result = engine.generate(prompt, params).result()
        assert result.logprobs == model.generate(prompt, params).result().logprobs
        assert tuple(each.token for each in result.logprobs) == result.tokens
        scored = model.score([*prompt, *result.tokens]).logprobs[len(prompt) - 1 :]
        np.testing.assert_allclose([each.logprob for each in result.logprobs], scored, atol=1e-5)
        for each in result.logprobs:
            values = [value for _, value in each.top]
            assert len(values) == params.logprobs
            assert values == sorted(values, reverse=True)
            assert (
                all(value >= each.logprob for token, value in each.top if token != each.token) or params is not COPYING
            )
    assert all(answer.result().logprobs == () for answer in concurrent)
    chunks = list(engine.generate(PROMPTS[0], replace(DRAWN, logprobs=2)))
    assert all(chunk.logprob is not None and chunk.logprob.token == chunk.token for chunk in chunks)


# Invalid requests


def test_the_context_limit_ends_answers(load_engine: Load) -> None:
    engine = load_engine()
    with pytest.raises(ContextLengthError, match=r"1024 tokens.* holds 1024") as refused:
        engine.generate([5] * 1024)
    assert (refused.value.prompt_tokens, refused.value.limit) == (1024, 1024) == (1024, engine.context_length)
    results = [answer.result() for answer in engine.generate_many([5] * 1000, replace(GREEDY, max_tokens=900), 2)]
    assert [len(result.tokens) for result in results] == [24, 24]
    assert {result.finish_reason for result in results} == {FinishReason.LENGTH}
    concurrent = [engine.generate([5] * 1020, COPYING), engine.generate(PROMPTS[0], GREEDY)]
    assert [len(answer.result().tokens) for answer in concurrent] == [4, 40]


def test_a_portable_bundle_is_rejected(tiny_checkpoint: Path, tmp_path: Path) -> None:
    portable = tmp_path / "portable"
    options = ExportOptions(portable, precision="fp32", graph=GraphChoice.PORTABLE, validate=False)
    export(str(tiny_checkpoint), options)
    with pytest.raises(BundleError, match=r"^[^\n]*is not a fused ONNX graph: export with --graph fused[^\n]*$"):
        Engine.load(portable)


@pytest.mark.parametrize(
    "options",
    [
        {"active": 0},
        {"kept": 0},
        {"waiting": -1},
        {"active": 2.0},
        {"kept": 5000},
        {"cache_bytes": -1},
        {"cache_bytes": 1.5},
        {"step_seconds": 0},
        {"step_seconds": float("nan")},
    ],
)
def test_invalid_engine_sizes_are_rejected(load_engine: Load, options: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match=rf"^{next(iter(options))} is .*; use [^\n]+$"):
        load_engine(**options)
