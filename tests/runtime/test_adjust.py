"""Changing parameters during generation, and answers that continue a given prefix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from test_answer_stream import bundle_of

from llm_edge.runtime import FinishReason, Model, SamplingParams
from llm_edge.runtime.engine import Engine

GREEDY = SamplingParams(temperature=0, repetition_penalty=10, repetition_window=-1, max_tokens=40)
QUESTION = [{"role": "user", "content": "The quick brown fox"}]


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Model:
    found = Model.load(tiny_bundle, "fp32", provider="cpu", threads=1)
    found.speculative = False
    return found


def tokens(model: Model, params: SamplingParams, prompt: list[int]) -> list[int]:
    return list(model.generate(prompt, params).result().tokens)


def test_later_tokens_are_sampled_with_the_new_parameters(model: Model) -> None:
    prompt = model.encode_chat(QUESTION)
    whole = tokens(model, GREEDY, prompt)
    plain = replace(GREEDY, repetition_penalty=1.0)
    generation = model.generate(prompt, GREEDY)
    found = []
    for chunk in generation:
        found += [chunk.token] if chunk.token is not None else []
        if len(found) == 10:
            generation.adjust(plain)
    assert found[:10] == whole[:10]
    assert found[10:] == tokens(model, replace(plain, max_tokens=30), [*prompt, *whole[:10]])
    assert found != whole


def test_penalties_keep_counting_across_a_change(model: Model) -> None:
    """Tokens sampled before still count as generated: a ban on repetitions applies across the change."""
    prompt = model.encode_chat(QUESTION)
    params = SamplingParams(temperature=0, max_tokens=30)
    generation = model.generate(prompt, params)
    found = []
    for chunk in generation:
        found += [chunk.token] if chunk.token is not None else []
        if len(found) == 10:
            generation.adjust(replace(params, logit_bias=dict.fromkeys(set(found), -100.0), presence_penalty=2.0))
    assert not set(found[:10]) & set(found[10:])


def test_limits_stop_strings_and_logprobs_can_be_changed(model: Model) -> None:
    prompt = model.encode_chat(QUESTION)
    whole = model.generate(prompt, GREEDY).result()
    shorter = model.generate(prompt, GREEDY)
    chunks = []
    for chunk in shorter:
        chunks.append(chunk)
        if len(chunks) == 5:
            shorter.adjust(replace(GREEDY, max_tokens=12, logprobs=2))
    assert chunks[-1].finish_reason == FinishReason.LENGTH
    assert sum(chunk.token is not None for chunk in chunks) == 12
    assert [chunk.logprob is not None for chunk in chunks] == [False] * 5 + [True] * 7
    stop = whole.text[-8:-5]
    stopped = model.generate(prompt, GREEDY)
    text = ""
    for index, chunk in enumerate(stopped):
        text += chunk.text
        if index == 2:
            stopped.adjust(replace(GREEDY, stop=(stop,)))
    assert text == whole.text[: whole.text.index(stop)]


def test_a_change_affects_only_one_answer_of_an_engine(model: Model, load_engine: Callable[..., Engine]) -> None:
    engine = load_engine("fp32", active=2)
    prompt = model.encode_chat(QUESTION)
    long = replace(GREEDY, max_tokens=200)
    alone = tokens(model, long, prompt)
    other, changed = engine.generate(prompt, long), engine.generate(prompt, long)
    for index, _ in enumerate(changed):
        if index == 3:
            changed.adjust(replace(long, max_tokens=10))
    assert list(other.result().tokens) == alone


def test_an_answer_continues_its_prefix(model: Model) -> None:
    prompt = [*model.encode_chat(QUESTION), *model.tokenizer.encode("It jumps")]
    rest = model.chat(QUESTION, GREEDY, assistant_prefix="It jumps").result()
    assert rest.tokens == model.generate(prompt, GREEDY).result().tokens
    assert rest.tokens != model.chat(QUESTION, GREEDY).result().tokens


def test_reasoning_continues_its_prefix(tiny_bundle: Path, tmp_path: Path) -> None:
    reasoner = Model.load(bundle_of(tiny_bundle, tmp_path / "r", special=True), "fp32", provider="cpu", threads=1)
    params = SamplingParams(temperature=0, max_tokens=8)
    thinking = reasoner.chat(QUESTION, params, reasoning_prefix="I think").result()
    assert thinking.reasoning
    assert not thinking.text
    answering = reasoner.chat(QUESTION, params, reasoning_prefix="I think", assistant_prefix="So").result()
    assert answering.text
    assert not answering.reasoning
