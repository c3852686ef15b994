"""A process with one precision of a bundle that `driver.py` measures: one request and one reply per line.

`python -m llm_edge.bench.worker BUNDLE PRECISION THREADS` (0 threads: onnxruntime's default).

    {"tokens": [...], "count": n}   ->  {"first": s, "rest": s, "count": n, "inside": s}
    {"peak": true}                  ->  {"peak_mb": x}

A worker that fails writes {"error": "one line"} and ends.

`first` is the time from the request to the first of `count` greedy tokens, `rest` that of the others, `inside` the part
of both spent in onnxruntime. Another engine can be measured by a program with the same protocol.
"""

from __future__ import annotations

import json
import sys
from typing import Any

from llm_edge.runtime.command import machine_failure
from llm_edge.runtime.errors import LlmEdgeError


def main() -> None:
    """Answer until standard input ends."""
    bundle, precision, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    from llm_edge.bench.peers.serving import peak_mb  # needs `resource`: `llm-bench` says so where it is missing
    from llm_edge.runtime import Model, SamplingParams

    model = Model.load(bundle, precision, provider="cpu", threads=threads or None)
    model.speculative = False  # other engines do not do this, and the gain depends on the text

    def answer(request: dict[str, Any]) -> dict[str, float]:
        if "peak" in request:
            return {"peak_mb": peak_mb()}
        model.clear_cache()  # every request computes its whole prompt
        before = model.run_seconds
        params = SamplingParams(temperature=0.0, max_tokens=request["count"])
        timings = model.generate(request["tokens"], params).result().timings
        return {
            "first": timings.time_to_first_token,
            "rest": timings.decode_seconds,
            "count": timings.completion_tokens,
            "inside": model.run_seconds - before,
        }

    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    try:
        main()
    except Exception as failure:
        reason = str(failure) if isinstance(failure, LlmEdgeError) else machine_failure(failure)
        if reason is None:
            raise
        print(json.dumps({"error": reason}), flush=True)
        sys.exit(1)
