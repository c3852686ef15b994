"""Measures several workers (see `worker.py`) in turn, request by request, so that all see the same load."""

from __future__ import annotations

import contextlib
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_edge.runtime.errors import MachineError

COLUMNS: Mapping[str, tuple[str, str]] = {
    "prefill_128": ("prefill 128", "{:,.0f} tok/s"),
    "prefill_512": ("prefill 512", "{:,.0f} tok/s"),
    "decode_0": ("decode @0", "{:,.0f} tok/s"),
    "decode_512": ("decode @512", "{:,.0f} tok/s"),
    "cold_start_s": ("first token, cold", "{:.2f} s"),
    "peak_mb": ("peak memory", "{:,.0f} MB"),
    "python_share": ("Python's share", "{:.1%}"),
}
"""Figures by key: title, and how a number is shown. Python's share is of a decode step; other engines have none."""

DECODE_TOKENS = 48
MIN_CONTEXT = 512 + DECODE_TOKENS

Figures = dict[str, list[float]]
"""All samples of each figure, in the order in which they were taken."""


class Worker:
    """A process to measure."""

    def __init__(self, command: Sequence[str]) -> None:
        self._began = time.perf_counter()
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, **request: Any) -> dict[str, float]:
        """Send a request and wait for the reply.

        Raises:
            MachineError: the process has ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            reply: dict[str, Any] = json.loads(self._process.stdout.readline())
        except (OSError, ValueError) as error:
            raise MachineError(f"a process to measure has failed (exit code {self._process.wait()})") from error
        if "error" in reply:
            raise MachineError(f"a process to measure has failed: {reply['error']}")
        return reply

    @property
    def age(self) -> float:
        """Seconds since the process was started."""
        return time.perf_counter() - self._began

    def close(self) -> None:
        """End the process; unread output is discarded."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def our_command(bundle: Path, precision: str, threads: int | None) -> list[str]:
    """Command of a worker for a precision of a bundle."""
    return [sys.executable, "-m", "llm_edge.bench.worker", str(bundle), precision, str(threads or 0)]


def measure(
    commands: Mapping[str, Sequence[str]],
    tokens: Sequence[int],
    rounds: int,
    repeats: int,
    progress: Callable[[str], None],
) -> dict[str, Figures]:
    """Measure every command in every round, each round in fresh processes.

    Args:
        commands: workers by name.
        tokens: at least 512 tokens of ordinary text.
        rounds: samples of cold start and peak memory.
        repeats: samples of everything else in a round.
        progress: receives status messages.
    """
    figures: dict[str, Figures] = {name: {key: [] for key in COLUMNS} for name in commands}
    for number in range(rounds):
        workers: dict[str, Worker] = {}
        try:
            for name, command in commands.items():
                progress(f"round {number + 1} of {rounds}: {name} starts")
                workers[name] = Worker(command)
                workers[name].ask(tokens=tokens[:32], count=1)
                figures[name]["cold_start_s"].append(workers[name].age)
                workers[name].ask(tokens=tokens[:512], count=DECODE_TOKENS)  # allocates the buffers
            progress(f"round {number + 1} of {rounds}: {', '.join(commands)} in turn")
            for _ in range(repeats):
                _sample(workers, tokens, figures)
            for name, worker in workers.items():
                figures[name]["peak_mb"].append(worker.ask(peak=True)["peak_mb"])
        finally:
            for worker in workers.values():
                worker.close()
    return figures


def _sample(workers: Mapping[str, Worker], tokens: Sequence[int], figures: dict[str, Figures]) -> None:
    for length in (128, 512):
        for name, worker in workers.items():
            reply = worker.ask(tokens=tokens[:length], count=1)
            figures[name][f"prefill_{length}"].append(length / reply["first"])
    for depth in (0, 512):
        for name, worker in workers.items():
            reply = worker.ask(tokens=tokens[: max(depth, 1)], count=DECODE_TOKENS)
            if reply["count"] < 2:
                continue  # the model ended immediately
            figures[name][f"decode_{depth}"].append((reply["count"] - 1) / reply["rest"])
            if depth == 0 and "inside" in reply:
                whole = reply["first"] + reply["rest"]
                figures[name]["python_share"].append(1 - reply["inside"] / whole)


def median(samples: Sequence[float]) -> float | None:
    """Median of the samples; None if there are none."""
    return statistics.median(samples) if samples else None


def median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    """Median of the ratios of paired samples; None if there are none."""
    return median([our / their for our, their in zip(ours, theirs, strict=False)])
