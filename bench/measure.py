"""Measures one precision of a bundle in a process of its own.

`python -m llm_edge.bench.measure BUNDLE PRECISION START THREADS` prints one JSON object. START is the time (seconds
since the epoch) at which the process was begun, so that the first token's time holds Python's start, imports and
loading too; THREADS is 0 for onnxruntime's own choice.
"""

from __future__ import annotations

import json
import resource
import sys
import time

TEXT = (
    "The harbour office opened at seven. By then the ferries had been running for an hour, and the clerk who kept "
    "the tide tables had already crossed out two of yesterday's predictions. She liked the work: every figure in "
    "the ledger had once been a length of wet rope, measured by somebody who would rather have been at breakfast. "
)
DECODE_TOKENS = 64


def main() -> None:
    """Measure and print."""
    bundle, precision, begun, threads = sys.argv[1], sys.argv[2], float(sys.argv[3]), int(sys.argv[4])
    from llm_edge.runtime import Model, SamplingParams

    model = Model.load(bundle, precision, provider="cpu", threads=threads or None)
    greedy = SamplingParams(temperature=0.0, max_tokens=1)
    next(iter(model.chat([{"role": "user", "content": "Hi"}], greedy)))
    cold_start = time.time() - begun

    tokens = model.tokenizer.encode(TEXT * 20)
    decode = SamplingParams(temperature=0.0, max_tokens=DECODE_TOKENS)
    figures: dict[str, float] = {"cold_start_s": cold_start}
    for length in (128, 512):
        runs = [model.generate(tokens[:length], greedy).result().timings for _ in range(4)]
        figures[f"prefill_{length}"] = max(run.prefill_tokens_per_second for run in runs)
    for depth in (0, 512):
        run = model.generate(tokens[: max(depth, 1)], decode).result().timings
        before, began = model.run_seconds, time.perf_counter()
        run = model.generate(tokens[: max(depth, 1)], decode).result().timings
        whole = time.perf_counter() - began
        figures[f"decode_{depth}"] = run.decode_tokens_per_second
        outside = whole - (model.run_seconds - before)
        figures[f"python_share_{depth}"] = outside / (whole - run.prefill_seconds)
    scale = 1 if sys.platform == "darwin" else 1024
    figures["peak_mb"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * scale / 1e6
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
