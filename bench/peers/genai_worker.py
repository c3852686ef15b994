"""`worker.py` for onnxruntime-genai: `python genai_worker.py FOLDER THREADS`, run where onnxruntime-genai is installed.

Without a number of threads in its configuration genai may use a single one.
"""

from __future__ import annotations

import json
import os
import sys
from time import perf_counter
from typing import Any


def main() -> None:
    """Load the folder and answer."""
    from serving import private_stdout, serve  # type: ignore[import-not-found]

    folder, threads = sys.argv[1], int(sys.argv[2])
    replies = private_stdout()
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before the library starts
    import numpy as np
    import onnxruntime_genai as og  # type: ignore[import-not-found]

    config = og.Config(folder)
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
    model = og.Model(config)

    def start(tokens: list[int], count: int) -> Any:
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(tokens) + count, do_sample=False)
        generator = og.Generator(model, params)
        generator.append_tokens(tokens)
        return generator

    def generate(tokens: list[int], count: int) -> list[float]:
        generator = start(tokens, count)
        times: list[float] = []
        while len(times) < count and not generator.is_done():
            generator.generate_next_token()
            times.append(perf_counter())
        return times

    def logits(tokens: list[int]) -> Any:
        found = start(tokens, 1).get_output("logits")
        return np.ascontiguousarray(found, dtype="<f4").tobytes()

    serve(generate, logits, replies)


if __name__ == "__main__":
    main()
