"""The requests of `bench/worker.py`, for logits and for many rows, for the workers beside this file. Knows no engine.

    {"tokens": [...], "count": n}      ->  {"first": s, "rest": s, "count": n}
    {"logits": [...], "to": "FILE"}    ->  {"rows": n}
    {"rows": [[...], ...], "count": n} ->  {"rate": tokens per second}
    {"peak": true}                     ->  {"peak_mb": x}

Logits are those of all positions of a window that starts from an empty context: raw little-endian float32, [rows, V].
A worker imports this by its bare name, in an environment that knows nothing of llm_edge.
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
        generate: takes tokens and how many greedy ones to make; returns at what `time.perf_counter` each of them was
            there. What it keeps of an earlier request must not make a later one faster.
        logits: takes a window of tokens; returns a buffer of float32, [rows, V].
        replies: where answers go; see `private_stdout`.
        rows: takes prompts and how many tokens to make behind each of them, all at once; returns tokens a second of
            all of them together, without their prompts.
    """

    def answer(request: dict[str, Any]) -> dict[str, float]:
        if "peak" in request:
            scale = 1 if sys.platform == "darwin" else 1024
            return {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e6}
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


def private_stdout() -> TextIO:
    """Standard output for replies alone: whatever a library prints goes to standard error from here on."""
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return replies
