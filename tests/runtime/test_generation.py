"""Generations have one reader and one process."""

from __future__ import annotations

import asyncio
import copy
import os
import pickle  # noqa: TID251 (nothing is unpickled)
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from endless import Endless

from llm_edge.runtime import AsyncGeneration, FinishReason, GenerationChunk, Model, SamplingParams, Timings
from llm_edge.runtime.engine import Engine
from llm_edge.runtime.errors import MachineError, ParameterError, ProcessError

GREEDY = SamplingParams(temperature=0, max_tokens=6)
LONG = replace(GREEDY, max_tokens=900)
PROMPT = "The quick brown fox"
ONE_READER = r"^this generation is being read by another thread or task: read it in one place only$"
LAST = GenerationChunk("", None, FinishReason.STOP, Timings(1, 1, 0.0, 0.0, 0.0))


@pytest.fixture(scope="module")
def model(tiny_bundle: Path) -> Model:
    return Model.load(tiny_bundle, "fp32", provider="cpu", threads=1)


def in_thread(task: Callable[[], object]) -> tuple[threading.Thread, list[Any]]:
    """Run a task in a thread; its result or error is appended to the list."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(task())
        except Exception as error:  # noqa: BLE001 (the test inspects it)
            found.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, found


def waiting_reader(generation: AsyncGeneration) -> tuple[threading.Thread, list[Any]]:
    """A thread that waits for the first chunk."""
    thread, found = in_thread(generation.result)
    while generation._wake is None:
        assert thread.is_alive()
    return thread, found


# One reader


def test_a_second_thread_that_reads_is_rejected() -> None:
    generation = AsyncGeneration()
    thread, found = waiting_reader(generation)
    for read in (generation.result, lambda: next(iter(generation)), lambda: asyncio.run(generation.aresult())):
        with pytest.raises(ParameterError, match=ONE_READER):
            read()
    generation.put(LAST)
    thread.join(10)
    assert found[0].finish_reason is FinishReason.STOP


def test_threads_that_share_an_iterator_are_rejected() -> None:
    generation = AsyncGeneration()
    chunks = iter(generation)
    thread, found = in_thread(lambda: next(chunks))
    while generation._wake is None:
        assert thread.is_alive()
    with pytest.raises(ParameterError, match=ONE_READER):
        next(chunks)
    generation.put(LAST)
    thread.join(10)
    assert found == [LAST]
    assert list(chunks) == []


def test_a_second_task_that_reads_is_rejected() -> None:
    async def main() -> list[Any]:
        generation = AsyncGeneration()
        tasks = [asyncio.create_task(generation.aresult()) for _ in range(3)]
        await asyncio.sleep(0.01)
        generation.put(LAST)
        return await asyncio.gather(*tasks, return_exceptions=True)

    first, *others = asyncio.run(main())
    assert first.finish_reason is FinishReason.STOP
    assert [str(each) for each in others if isinstance(each, ParameterError)] == [ONE_READER.strip("^$")] * 2


def test_reading_may_continue_elsewhere_once_a_reader_has_left() -> None:
    generation = AsyncGeneration()
    for _ in range(3):
        generation.put(GenerationChunk("a", 5))
    generation.put(LAST)
    thread, found = in_thread(lambda: next(iter(generation)).text)
    thread.join(10)
    assert next(iter(generation)).text == "a"

    async def one() -> str:
        async for chunk in generation:
            return chunk.text
        return ""

    assert (found, asyncio.run(one())) == (["a"], "a")
    assert generation.result().finish_reason is FinishReason.STOP
    with pytest.raises(ParameterError, match="already been read to its end"):
        generation.result()


def test_a_second_thread_that_reads_a_model_s_generation_is_rejected(tiny_bundle: Path) -> None:
    own = Model.load(tiny_bundle, "fp32", provider="cpu", threads=1)
    session: Any = own._session
    endless = session.graph.inference = Endless(session.graph.inference, 1)
    generation = own.generate(PROMPT, GREEDY)
    thread, found = in_thread(generation.result)
    assert endless.entered.wait(10)
    for read in (generation.result, lambda: next(iter(generation))):
        with pytest.raises(ParameterError, match=ONE_READER):
            read()
    generation.cancel()  # ends the step
    thread.join(10)
    assert found[0].finish_reason is FinishReason.CANCELLED
    assert len(own.generate(PROMPT, GREEDY).result().tokens) == 6


# One process


def in_fork(task: Callable[[], object]) -> str:
    """The error of a task in a forked process, as text."""
    receiver, sender = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            text = repr(task())
        except BaseException as error:  # noqa: BLE001 (returned as text)
            text = f"{type(error).__name__}: {error}"
        os.write(sender, text.encode())
        os._exit(0)
    os.close(sender)
    with open(receiver, encoding="utf-8") as file:  # noqa: PTH123 (a descriptor, not a path)
        text = file.read()
    os.waitpid(pid, 0)
    return text


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_process_gets_an_error(tiny_bundle: Path, model: Model) -> None:
    with Engine.load(tiny_bundle, "fp32", threads=1) as engine:
        answer, generation = engine.generate(PROMPT, LONG), model.generate(PROMPT, LONG)
        messages = [{"role": "user", "content": "Hi"}]
        tasks: list[Callable[[], object]] = [
            lambda: engine.generate(PROMPT),
            lambda: engine.chat(messages),
            lambda: engine.generate_many(PROMPT, None, 2),
            engine.counters,
            lambda: engine.save_cache("x", PROMPT),
            lambda: engine.load_cache("x"),
            answer.result,
            lambda: asyncio.run(answer.aresult()),
            lambda: next(iter(answer)),
            lambda: model.generate(PROMPT),
            lambda: model.chat(messages),
            lambda: model.score(PROMPT),
            model.clear_cache,
            generation.result,
            lambda: model._session.step([1]),
        ]
        for task in tasks:
            found = in_fork(task)
            assert found.startswith("ProcessError: this "), found
            assert found.endswith("does not survive a fork: load the bundle in the process that uses it")
        assert in_fork(engine.close) == "None"
        assert len(engine.generate(PROMPT, GREEDY).result().tokens) == 6
        answer.cancel()


@pytest.mark.parametrize("copied", [pickle.dumps, copy.copy, copy.deepcopy])
def test_copies_are_rejected(tiny_bundle: Path, model: Model, copied: Callable[[Any], object]) -> None:
    with Engine.load(tiny_bundle, "fp32", threads=1) as engine:
        for each in (engine, model, engine.generate(PROMPT, GREEDY), model.generate(PROMPT, GREEDY), model._session):
            with pytest.raises(
                ProcessError, match=r"^an? \w+ cannot be pickled or copied: pass the bundle's path[^\n]+$"
            ):
                copied(each)


# Failures of a model


@pytest.mark.parametrize("method", ["step", "rewind"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError, MemoryError])
def test_a_model_gives_the_same_answer_after_a_failure(
    tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch, method: str, error: type[BaseException]
) -> None:
    own = Model.load(tiny_bundle, "fp32", provider="cpu", threads=1)
    wanted = own.generate(PROMPT * 5, LONG).result().tokens
    own.clear_cache()
    whole, calls = getattr(own._session, method), [0]

    def failing(*arguments: Any) -> Any:
        result = whole(*arguments)
        calls[0] += 1
        if calls[0] % 4 == 0:
            raise error
        return result

    monkeypatch.setattr(own._session, method, failing)
    failed = []
    for _ in range(12):
        try:
            own.generate(PROMPT * 5, replace(LONG, max_tokens=3)).result()
        except (KeyboardInterrupt, MachineError) as caught:
            failed.append(type(caught))
    assert set(failed) == {KeyboardInterrupt if error is KeyboardInterrupt else MachineError}
    monkeypatch.setattr(own._session, method, whole)
    assert own.generate(PROMPT * 5, LONG).result().tokens == wanted
