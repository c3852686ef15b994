"""`worker.py` for onnxruntime-genai: `python bench/genai_worker.py FOLDER`, run in an environment that holds genai."""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

import onnxruntime_genai as og  # type: ignore[import-not-found]


def main() -> None:
    """Answer until standard input ends."""
    model = og.Model(sys.argv[1])

    def answer(request: dict[str, Any]) -> dict[str, float]:
        if "peak" in request:
            return {"peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e6}
        tokens, count = request["tokens"], request["count"]
        params = og.GeneratorParams(model)
        params.set_search_options(max_length=len(tokens) + count, do_sample=False)
        start = time.perf_counter()
        generator = og.Generator(model, params)
        generator.append_tokens(tokens)
        generator.generate_next_token()
        first = time.perf_counter()
        made = 1
        while made < count and not generator.is_done():
            generator.generate_next_token()
            made += 1
        return {"first": first - start, "rest": time.perf_counter() - first, "count": made}

    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
