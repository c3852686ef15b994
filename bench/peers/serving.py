"""The protocol of `bench/worker.py` for the workers in this folder, with requests for logits and concurrent rows.

    {"tokens": [...], "count": n}      ->  {"first": s, "rest": s, "count": n}
    {"logits": [...], "to": "FILE"}    ->  {"rows": n}
    {"rows": [[...], ...], "count": n} ->  {"rate": tokens per second}
    {"peak": true}                     ->  {"peak_mb": x}

Logits are those of all positions of a window that starts from an empty context: raw little-endian float32, [rows, V].
Workers import this by its bare name, in environments without llm_edge.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any, TextIO

Generate = Callable[[list[int], int], Sequence[float]]
Logits = Callable[[list[int]], Any]
Rows = Callable[[list[list[int]], int], float]


def serve(generate: Generate, logits: Logits, replies: TextIO, rows: Rows | None = None) -> None:
    """Answer until standard input ends.

    Args:
        generate: takes tokens and the number of greedy tokens to generate; returns the `time.perf_counter()` of each.
            Nothing cached from an earlier request may make a later one faster.
        logits: takes a window of tokens; returns a buffer of float32, [rows, V].
        replies: output stream; see `private_stdout`.
        rows: takes prompts and the number of tokens to generate after each, concurrently; returns their total tokens/s
            without the prompts.
    """

    def answer(request: dict[str, Any]) -> dict[str, float]:
        if "peak" in request:
            return {"peak_mb": peak_mb()}
        if "logits" in request:
            with open(request["to"], "wb") as file:  # noqa: PTH123 - pathlib would count as the engine's cold start
                file.write(logits(request["logits"]))
            return {"rows": len(request["logits"])}
        if "rows" in request and rows is not None:
            return {"rate": rows(request["rows"], request["count"])}
        start = time.perf_counter()
        times = generate(request["tokens"], request["count"])
        return {"first": times[0] - start, "rest": times[-1] - times[0], "count": len(times)}

    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=replies, flush=True)


def peak_mb() -> float:
    """Peak resident memory of this process, in 10^6 bytes.

    Linux counts the parent's memory at the start of a process in `ru_maxrss`, but not in `VmHWM`.
    """
    if sys.platform == "linux":
        with open("/proc/self/status", encoding="utf-8") as file:  # noqa: PTH123 - see above
            return next(int(line.split()[1]) for line in file if line.startswith("VmHWM:")) * 1024 / 1e6
    scale = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e6


def private_stdout() -> TextIO:
    """Reserve standard output for replies: what libraries print goes to standard error from here on."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies
