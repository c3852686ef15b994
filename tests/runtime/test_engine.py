"""`Engine`: answers depend only on their own prompt, parameters and seed, not on concurrent requests."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from llm_edge.runtime import FinishReason, GenerationResult, Model, SamplingParams
from llm_edge.runtime.engine import Engine
from llm_edge.runtime.errors import BusyError, MachineError, ParameterError
from llm_edge.runtime.generation import AsyncGeneration
from llm_edge.runtime.sampling.sampler import Sampler
from llm_edge.runtime.scheduling.batch import Batch
from llm_edge.runtime.scheduling.prefixes import CHUNK_ALIGNMENT

Load = Callable[..., Engine]
# The penalty adds variety: a small random model would only repeat the last token of its prompt.
GREEDY = SamplingParams(temperature=0, repetition_penalty=10, repetition_window=-1, max_tokens=40)
COPYING = SamplingParams(temperature=0, max_tokens=40)
DRAWN = SamplingParams(temperature=1.0, max_tokens=40, seed=1)
PEAKED = SamplingParams(temperature=0.02, max_tokens=40, seed=1)  # samples, and repeats itself
LONG = replace(GREEDY, max_tokens=900)
SYSTEM = "The quick brown fox jumps over the lazy dog. " * 5
PROMPTS = (
    "The quick brown fox",
    "What is the capital of France?",
    'def main():\n    print("hello',
    "Äpfel, señor, 你好",
    SYSTEM + "0123456789",
    SYSTEM + "a user asked an assistant",
    "lazy dog. " * 12,
    "🙂 and — dashes",
)
# Log-probabilities reveal differences that the texts of a small random model may hide.
WAYS = tuple(replace(params, logprobs=0) for params in (GREEDY, COPYING, DRAWN, PEAKED))
SECRETS = ("fox", "dog", "Paris", "hello", "quick", "lazy", "señor", "brown")


@pytest.fixture(scope="module", params=["fp32", "int8"])
def precision(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def model(tiny_bundle: Path, precision: str) -> Model:
    return Model.load(tiny_bundle, precision, provider="cpu", threads=1)


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Slow down steps, so that answers are still being generated while a test inspects them."""
    whole = Batch._run

    def run(self: Batch, *arguments: Any) -> Any:
        time.sleep(0.005)
        return whole(self, *arguments)

    monkeypatch.setattr(Batch, "_run", run)


def outcome(result: GenerationResult) -> tuple[Any, ...]:
    return result.text, result.tokens, result.finish_reason, result.logprobs


def outcomes_alone(model: Model, prompts: Sequence[Any], params: SamplingParams) -> list[tuple[Any, ...]]:
    return [outcome(model.generate(prompt, params).result()) for prompt in prompts]


def streamed(answer: AsyncGeneration) -> tuple[Any, ...]:
    chunks = list(answer)
    tokens = tuple(chunk.token for chunk in chunks if chunk.token is not None)
    logprobs = tuple(chunk.logprob for chunk in chunks if chunk.logprob is not None)
    return "".join(chunk.text for chunk in chunks), tokens, chunks[-1].finish_reason, logprobs


def in_threads(jobs: Sequence[Callable[[], Any]]) -> list[Any]:
    found: list[Any] = [None] * len(jobs)

    def run(number: int) -> None:
        found[number] = jobs[number]()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return found


async def all_of(answers: Sequence[AsyncGeneration]) -> list[tuple[Any, ...]]:
    return [outcome(result) for result in await asyncio.gather(*(answer.aresult() for answer in answers))]


# One caller, many callers


@pytest.mark.parametrize("params", WAYS, ids=["greedy", "copying", "drawn", "peaked"])
def test_answers_equal_those_of_a_model(
    load_engine: Load, model: Model, precision: str, params: SamplingParams
) -> None:
    wanted = outcomes_alone(model, PROMPTS, params)
    assert len({text for text, *_ in wanted}) > 4
    engine = load_engine(precision)
    assert [outcome(engine.generate(prompt, params).result()) for prompt in PROMPTS] == wanted
    together = [engine.generate(prompt, params) for prompt in PROMPTS]
    assert [outcome(answer.result()) for answer in together] == wanted
    together = [engine.generate(prompt, params) for prompt in PROMPTS]
    assert in_threads([lambda a=a: streamed(a) for a in together]) == wanted  # type: ignore[misc]
    asking = [lambda p=p: outcome(engine.generate(p, params).result()) for p in PROMPTS]
    assert in_threads(asking) == wanted
    assert asyncio.run(all_of([engine.generate(prompt, params) for prompt in PROMPTS])) == wanted
    counters = engine.counters()
    assert (counters.requests, counters.finished, counters.failed, counters.cancelled) == (40, 40, 0, 0)
    assert (counters.waiting, counters.active) == (0, 0)
    assert counters.completion_tokens == 5 * sum(len(tokens) for _, tokens, *_ in wanted)
    assert counters.decode_steps < counters.completion_tokens


def test_more_requests_than_slots_are_answered(load_engine: Load, model: Model, precision: str) -> None:
    order = random.Random(0)
    asked = [
        (order.choice(PROMPTS), replace(order.choice(WAYS), max_tokens=order.randrange(1, 40), seed=order.randrange(9)))
        for _ in range(60)
    ]
    wanted = [outcome(model.generate(*each).result()) for each in asked]
    engine = load_engine(precision, active=4, kept=2)
    answers = []
    for each in asked:
        answers.append(engine.generate(*each))
        time.sleep(order.choice((0, 0.002)))
    assert [outcome(answer.result()) for answer in answers] == wanted


def test_chunks_arrive_during_generation(load_engine: Load, slow: None) -> None:
    answer = load_engine().generate(PROMPTS[0], replace(GREEDY, max_tokens=200))
    began = time.perf_counter()
    chunks = iter(answer)
    assert next(chunks).token is not None
    first = time.perf_counter() - began
    assert len(list(chunks)) == 199
    assert first < 0.2 * (time.perf_counter() - began)
    with pytest.raises(ParameterError, match="already been read to its end"):
        answer.result()


def conversations(
    ask: Callable[[int, list[dict[str, str]]], GenerationResult], caller: int, turns: int
) -> list[tuple[Any, ...]]:
    """One caller's turns; the first message contains its word, and all later ones its replies."""
    messages = [{"role": "system", "content": SYSTEM + f"Your word is {SECRETS[caller]}."}]
    replies = []
    for turn in range(turns):
        messages.append({"role": "user", "content": f"Turn {turn}: {SECRETS[caller]}" * 2})
        result = ask(caller, messages)
        replies.append(outcome(result))
        messages.append({"role": "assistant", "content": result.text})
    return replies


def test_concurrent_conversations_get_the_same_replies_as_alone(load_engine: Load, precision: str) -> None:
    wanted = []
    for caller in range(8):
        single = load_engine(precision)  # nothing else is running or cached
        wanted.append(conversations(lambda _, m, e=single: e.chat(m, WAYS[0]).result(), caller, 3))  # type: ignore[misc]
    assert len({str(replies) for replies in wanted}) == 8
    engine = load_engine(precision)

    def ask(caller: int, messages: list[dict[str, str]]) -> GenerationResult:
        return engine.chat(messages, WAYS[0]).result()

    for _ in range(2):
        found = in_threads([lambda c=c: conversations(ask, c, 3) for c in range(8)])  # type: ignore[misc]
        assert found == wanted


@pytest.mark.parametrize("params", [DRAWN, PEAKED], ids=["drawn", "peaked"])
def test_a_seed_gives_the_same_text_in_all_conditions(
    load_engine: Load, model: Model, precision: str, params: SamplingParams
) -> None:
    prompt = PROMPTS[5]
    wanted = outcome(model.generate(prompt, params).result())
    engine = load_engine(precision)
    found = [outcome(engine.generate(prompt, params).result())]  # nothing is cached
    found += [outcome(engine.generate(prompt, params).result()) for _ in range(5)]  # everything is cached
    found += [streamed(engine.generate(prompt, params)) for _ in range(4)]
    others = [engine.generate(other, replace(params, seed=9)) for other in PROMPTS[:7]]
    found += [outcome(answer.result()) for answer in [engine.generate(prompt, params) for _ in range(5)]]
    found += asyncio.run(all_of([engine.generate(prompt, params) for _ in range(3)]))
    for other in others:
        other.result()
    fresh = load_engine(precision)
    fresh.generate(SYSTEM + "What?", DRAWN).result()
    reusing = fresh.generate(prompt, params).result()
    assert reusing.timings.cached_tokens > 0
    found += [
        outcome(reusing),
        outcome(load_engine(precision, speculative=precision == "int8").generate(prompt, params).result()),
    ]
    assert len(found) == 20
    assert set(found) == {wanted}


def test_generate_many_computes_the_prompt_once(load_engine: Load, model: Model, precision: str) -> None:
    engine = load_engine(precision)
    prompt = PROMPTS[4]
    results = [answer.result() for answer in engine.generate_many(prompt, replace(DRAWN, seed=2**64 - 2), 3)]
    seeds = (2**64 - 2, 2**64 - 1, 0)
    assert [outcome(each) for each in results] == [
        outcome(model.generate(prompt, replace(DRAWN, seed=seed)).result()) for seed in seeds
    ]
    length = results[0].timings.prompt_tokens
    assert [each.timings.cached_tokens for each in results] == [
        0,
        *[(length - 2) // CHUNK_ALIGNMENT * CHUNK_ALIGNMENT] * 2,
    ]
    unseeded = engine.generate_many(prompt, replace(DRAWN, seed=None), 3)
    assert len({answer.result().text for answer in unseeded}) == 3


@pytest.mark.parametrize("count", [0, 129, True, 1.5])
def test_invalid_counts_are_rejected(load_engine: Load, count: Any) -> None:
    with pytest.raises(ParameterError, match=r"^count is .*; use 1 to 128$"):
        load_engine().generate_many("Hi", DRAWN, count)


# Prefix cache


def test_the_next_turn_computes_only_new_tokens(load_engine: Load) -> None:
    engine = load_engine()
    messages = [{"role": "user", "content": SYSTEM * 3}]
    first = engine.chat(messages, replace(DRAWN, max_tokens=20)).result()
    messages += [{"role": "assistant", "content": first.text}, {"role": "user", "content": "And then?"}]
    again = engine.chat(messages, GREEDY).result()
    before = first.timings.prompt_tokens
    assert before // CHUNK_ALIGNMENT * CHUNK_ALIGNMENT <= again.timings.cached_tokens < again.timings.prompt_tokens
    fresh = load_engine().chat(messages, GREEDY).result()
    assert fresh.timings.cached_tokens == 0
    assert outcome(again) == outcome(fresh)


@pytest.mark.parametrize("precision", ["fp32", "int8"], scope="function")
def test_an_edit_computes_only_the_tokens_after_it(load_engine: Load, precision: str) -> None:
    messages = [
        {"role": "user", "content": SYSTEM},
        {"role": "assistant", "content": "Paris, of course!"},
        {"role": "user", "content": "hello, world " * 10},
    ]
    edited = [messages[0], {"role": "assistant", "content": "No idea."}, messages[2]]
    engine = load_engine(precision)
    engine.chat(messages, GREEDY).result()
    found = engine.chat(edited, GREEDY).result()
    one, other = engine.encode_chat(messages), engine.encode_chat(edited)
    common = next(n for n, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    assert found.timings.cached_tokens == common // CHUNK_ALIGNMENT * CHUNK_ALIGNMENT > 0
    assert outcome(found) == outcome(load_engine(precision).chat(edited, GREEDY).result())
    restored = engine.chat(messages, GREEDY).result()
    assert outcome(restored) == outcome(load_engine(precision).chat(messages, GREEDY).result())


def test_the_cache_size_is_limited(load_engine: Load, model: Model, precision: str) -> None:
    wanted = outcomes_alone(model, PROMPTS, GREEDY)
    budget = 200 << 10
    engine = load_engine(precision, cache_bytes=budget)
    for _ in range(2):
        answers = [engine.generate(prompt, GREEDY) for prompt in PROMPTS]
        assert [outcome(answer.result()) for answer in answers] == wanted
        counters = engine.counters()
        assert 0 < counters.kept_bytes <= budget
        assert counters.evictions > 0
    nothing = load_engine(precision, cache_bytes=0)
    for prompt, each in zip(PROMPTS * 2, wanted * 2, strict=True):
        result = nothing.generate(prompt, GREEDY).result()
        assert (outcome(result), result.timings.cached_tokens) == (each, 0)
    assert nothing.counters().kept_tokens == 0


def test_more_conversations_than_slots(load_engine: Load, model: Model, precision: str) -> None:
    engine = load_engine(precision, active=1, kept=2)
    distinct = [f"{number} {text}" for number, text in enumerate(PROMPTS)]
    wanted = outcomes_alone(model, distinct, GREEDY)
    for _ in range(2):
        assert [outcome(engine.generate(prompt, GREEDY).result()) for prompt in distinct] == wanted
    assert engine.counters().evictions >= 2 * len(distinct) - 3
    last = engine.generate(distinct[-1], GREEDY).result()  # the latest ones are cached
    assert last.timings.cached_tokens == (last.timings.prompt_tokens - 2) // CHUNK_ALIGNMENT * CHUNK_ALIGNMENT


# Cancelling and closing


def test_cancelling_takes_effect_within_a_step_and_frees_the_slot(load_engine: Load, slow: None) -> None:
    engine = load_engine(active=1)
    wanted = outcome(engine.generate(PROMPTS[1], GREEDY).result())
    running, waiting = engine.generate(PROMPTS[0], LONG), engine.generate(PROMPTS[1], GREEDY)
    chunks = iter(running)
    head = [next(chunks) for _ in range(3)]
    running.cancel()
    steps = engine.counters().decode_steps
    rest = list(chunks)
    assert rest[-1].finish_reason is FinishReason.CANCELLED
    assert rest[-1].timings is not None
    assert rest[-1].timings.completion_tokens == len(head) + len(rest) - 1 < 100
    assert engine.counters().decode_steps <= steps + 3  # one more step, and those of the next answer meanwhile
    assert outcome(waiting.result()) == wanted
    with engine.generate(PROMPTS[0], LONG) as left:
        next(iter(left))
    assert left.result().finish_reason is FinishReason.CANCELLED
    given_up = [engine.generate(PROMPTS[0], LONG) for _ in range(3)]
    for answer in reversed(given_up):  # including waiting ones
        answer.cancel()
    assert {answer.result().finish_reason for answer in given_up} == {FinishReason.CANCELLED}
    assert engine.counters().cancelled == 5


def test_a_cancelled_task_ends_its_answer(load_engine: Load, slow: None) -> None:
    engine = load_engine(active=1)
    wanted = outcome(engine.generate(PROMPTS[1], GREEDY).result())

    async def main() -> tuple[Any, ...]:
        seen = asyncio.Event()

        async def read() -> None:
            async for _ in engine.generate(PROMPTS[0], LONG):
                seen.set()

        task = asyncio.create_task(read())
        await seen.wait()
        other = engine.generate(PROMPTS[1], GREEDY)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return outcome(await asyncio.wait_for(other.aresult(), 5))

    assert asyncio.run(main()) == wanted
    counters = engine.counters()
    assert (counters.cancelled, counters.active) == (1, 0), counters
    assert counters.completion_tokens < 500


def test_a_full_queue_rejects_requests(load_engine: Load, slow: None) -> None:
    engine = load_engine(active=1, waiting=2)
    running = engine.generate(PROMPTS[0], LONG)
    next(iter(running))
    waiting = [engine.generate(PROMPTS[1], GREEDY) for _ in range(2)]
    with pytest.raises(BusyError, match=r"^2 requests are waiting already: try again later$") as refused:
        engine.generate(PROMPTS[2], GREEDY)
    assert refused.value.waiting == 2
    waiting[0].cancel()
    waiting[0].result()
    with pytest.raises(BusyError):
        engine.generate_many(PROMPTS[2], GREEDY, 2)  # there is space for one only, so all are rejected
    assert engine.counters().waiting == 1
    last = engine.generate(PROMPTS[2], GREEDY)
    running.cancel()
    assert waiting[1].result().finish_reason is last.result().finish_reason is FinishReason.LENGTH
    counters = engine.counters()
    assert (counters.refused, counters.requests) == (3, 4)


def test_closing_cancels_all_answers(load_engine: Load, slow: None) -> None:
    engine = load_engine(active=2)
    answers = [engine.generate(prompt, LONG) for prompt in PROMPTS]
    next(iter(answers[0]))
    engine.close()
    assert {answer.result().finish_reason for answer in answers} == {FinishReason.CANCELLED}
    engine.close()
    with pytest.raises(MachineError, match="closed"):
        engine.generate(PROMPTS[0], GREEDY)
    assert not [thread for thread in threading.enumerate() if thread is engine._thread]


# A real model


def test_replies_contain_only_the_callers_own_secret(smollm2_bundle: Path) -> None:
    """Replies of two turns equal those given alone, and contain the caller's own word and no other."""
    words = ("zebra", "violin", "cactus", "harbor", "lemon", "castle", "river", "copper")
    params = SamplingParams(temperature=0, max_tokens=6)

    def turns(engine: Engine, word: str) -> list[GenerationResult]:
        text = f"The secret word is {word}. Nobody else knows it. " * 2 + "The secret word is"
        first = engine.generate(text, params).result()
        return [first, engine.generate(f"{text}{first.text} The secret word is", params).result()]

    with Engine.load(smollm2_bundle, "fp32", threads=2, cache_bytes=0) as engine:
        wanted = [[outcome(result) for result in turns(engine, word)] for word in words]
    with Engine.load(smollm2_bundle, "fp32", threads=2) as engine:
        replies = in_threads([lambda w=w: turns(engine, w) for w in words])  # type: ignore[misc]
    assert [[outcome(result) for result in each] for each in replies] == wanted
    assert all(second.timings.cached_tokens >= 16 for _, second in replies)
    heard = [{other for other in words for result in each if other in result.text} for each in replies]
    assert heard == [{word} for word in words]


def test_callers_get_a_steps_chunks_after_all_its_rows(load_engine: Load, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    sample, put = Sampler.sample, AsyncGeneration.put

    def recorded_sample(self: Sampler, logits: Any) -> int:
        events.append("sample")
        return sample(self, logits)

    def recorded_put(self: AsyncGeneration, item: Any) -> None:
        events.append("put")
        put(self, item)

    monkeypatch.setattr(Sampler, "sample", recorded_sample)
    monkeypatch.setattr(AsyncGeneration, "put", recorded_put)
    answers = load_engine("fp32", active=4).generate_many("The quick brown fox", replace(GREEDY, seed=1), 4)
    assert len({answer.result().tokens for answer in answers}) == 1
    assert "sample sample sample sample put put put put" in " ".join(events)
