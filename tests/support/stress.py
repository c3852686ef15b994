"""Many callers of one engine, who cancel, stop and constrain at random, while every call of a step may fail."""

from __future__ import annotations

import asyncio
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pytest
from failing import CALLS, Failures

from llm_edge.runtime import Constraint, Engine, FinishReason, GenerationResult, Model, SamplingParams
from llm_edge.runtime.errors import LlmEdgeError
from llm_edge.runtime.generation import AsyncGeneration

SYSTEM = "The quick brown fox jumps over the lazy dog. " * 4
PROMPTS = (
    "The quick",
    SYSTEM + "0123",
    SYSTEM + "What is",
    "lazy dog. " * 20,
    "🙂 and — dashes",
    "def main():\n    print",
)
PLAIN = tuple(
    SamplingParams(max_tokens=24, **values)
    for values in (
        {"temperature": 0},
        {"temperature": 0, "repetition_penalty": 10, "repetition_window": -1, "logprobs": 2},
        {"temperature": 1.0, "seed": 3, "top_p": 0.9, "stop": ("fox", "\n\n")},
        {"temperature": 0.7, "seed": 4, "dry_multiplier": 1.0, "xtc_probability": 0.3},
    )
)
CONSTRAINTS = (
    Constraint.choice(["fox", "dog"]),
    Constraint.regex("[a-c]{3,9}"),
    Constraint.json_schema({"type": "object", "properties": {"a": {"type": "integer", "maximum": 99}}}),
)


@dataclass
class Report:
    """What happened.

    Attributes:
        finished, cancelled, failed, refused: how the requests ended, as their callers saw it.
        wrong: everything that must not happen, in words.
        failures: number of failures that were injected.
        serves: the engine answered once the failures had stopped; otherwise it refused with a reason.
    """

    finished: int = 0
    cancelled: int = 0
    failed: int = 0
    refused: int = 0
    wrong: list[str] = field(default_factory=list)
    failures: int = 0
    serves: bool = False


def stress(bundle: Path, seed: int, *, callers: int, requests: int, rate: float, patience: float) -> Report:
    """Run the callers on one engine.

    Args:
        bundle: a fused fp32 bundle.
        seed: of everything random but the threads' timing.
        callers: number of threads.
        requests: of each thread.
        rate: probability that a call in a step fails.
        patience: seconds after which a caller counts as left waiting.
    """
    model = Model.load(bundle, "fp32", provider="cpu", threads=1)
    wanted = {(prompt, params): model.generate(prompt, params).result() for prompt in PROMPTS for params in PLAIN}
    report, failures = Report(), Failures(seed)
    with pytest.MonkeyPatch.context() as patch:
        for owner, name in CALLS:
            failures.inject(patch, owner, name)
        engine = Engine.load(bundle, "fp32", threads=1, active=4, kept=3, waiting=callers, speculative=seed % 2 == 0)
        failures.rate = rate
        tasks = [_Caller(engine, wanted, report, seed * 1000 + number, requests) for number in range(callers)]
        threads = [threading.Thread(target=task.run, daemon=True) for task in tasks]
        for thread in threads:
            thread.start()
        until = time.monotonic() + patience
        for number, thread in enumerate(threads):
            thread.join(max(until - time.monotonic(), 0))
            if thread.is_alive():
                report.wrong.append(f"caller {number} waits")
        failures.rate = 0.0
        report.failures = failures.count
        _check_counters(engine, report)
        _check_service(engine, wanted, report)
        closing = threading.Thread(target=engine.close, daemon=True)
        closing.start()
        closing.join(patience)
        if closing.is_alive():
            report.wrong.append("close() waits")
    return report


Wanted = dict[tuple[str, SamplingParams], GenerationResult]


class _Caller:
    def __init__(self, engine: Engine, wanted: Wanted, report: Report, seed: int, requests: int) -> None:
        self._engine, self._wanted, self._report, self._requests = engine, wanted, report, requests
        self._random = random.Random(seed)

    def run(self) -> None:
        for _ in range(self._requests):
            try:
                self._ask()
            except BaseException as error:  # noqa: BLE001 (whatever it is, it must not happen)
                self._report.wrong.append(f"{type(error).__name__}: {error}")

    def _ask(self) -> None:
        choose = self._random.choice
        prompt, params = choose(PROMPTS), choose(PLAIN)
        if self._random.random() < 0.3:
            params = replace(params, constraint=choose(CONSTRAINTS))
        read: Callable[[AsyncGeneration], Any] = choose(
            (self._whole, self._whole, self._leave, self._cancel, self._cancel_elsewhere, self._as_task)
        )
        try:
            answer = self._engine.generate(prompt, params)
        except LlmEdgeError as error:
            self._count("refused", error)
            return
        try:
            result = read(answer)
        except LlmEdgeError as error:
            self._count("failed", error)
            return
        if result is None or result.finish_reason is FinishReason.CANCELLED:
            self._report.cancelled += 1
            return
        self._report.finished += 1
        expected = self._wanted.get((prompt, params))
        if expected is not None and (expected.text, expected.tokens) != (result.text, result.tokens):
            self._report.wrong.append(f"another answer to {prompt[-10:]!r}: {result.text!r}, not {expected.text!r}")

    def _count(self, what: str, error: LlmEdgeError) -> None:
        setattr(self._report, what, getattr(self._report, what) + 1)
        if not str(error) or "\n" in str(error):
            self._report.wrong.append(f"a message that is not one line: {error!r}")

    def _whole(self, answer: AsyncGeneration) -> GenerationResult:
        return answer.result()

    def _leave(self, answer: AsyncGeneration) -> None:
        with answer:
            for number, _ in enumerate(answer):
                if number == self._random.randrange(8):
                    break

    def _cancel(self, answer: AsyncGeneration) -> GenerationResult:
        if self._random.random() < 0.5:
            next(iter(answer))
        answer.cancel()
        return answer.result()

    def _cancel_elsewhere(self, answer: AsyncGeneration) -> GenerationResult:
        threading.Timer(self._random.random() / 20, answer.cancel).start()
        return answer.result()

    def _as_task(self, answer: AsyncGeneration) -> GenerationResult | None:
        async def read() -> GenerationResult | None:
            try:
                async with asyncio.timeout(self._random.choice((0.01, 60))):
                    return await answer.aresult()
            except TimeoutError:
                return None

        return asyncio.run(read())


def _check_counters(engine: Engine, report: Report) -> None:
    until = time.monotonic() + 30
    while (counters := engine.counters()).active or counters.waiting:
        if time.monotonic() > until:
            report.wrong.append(f"{counters.active} active and {counters.waiting} waiting after the end")
            return
        time.sleep(0.01)
    ended = counters.finished + counters.cancelled + counters.failed
    if counters.requests != ended:
        report.wrong.append(f"{counters.requests} requests, but {ended} ended")
    # Of those that their callers left, some had ended otherwise.
    if counters.failed < report.failed or counters.finished < report.finished:
        report.wrong.append(f"{counters} do not match {report}")


def _check_service(engine: Engine, wanted: Wanted, report: Report) -> None:
    for (prompt, params), expected in wanted.items():
        try:
            result = engine.generate(prompt, params).result()
        except LlmEdgeError as error:
            if "the engine has failed" not in str(error):
                report.wrong.append(f"a request without failures failed: {error}")
            return
        if (expected.text, expected.tokens) != (result.text, result.tokens):
            report.wrong.append(f"afterwards another answer to {prompt[-10:]!r}: {result.text!r}")
    report.serves = True
