"""Answers `{"rows": …}` of `serving.py` by `Engine`: `python -m …engine_worker BUNDLE PRECISION THREADS`."""

from __future__ import annotations

import json
import sys

from llm_edge.bench.engine import together
from llm_edge.runtime.engine import Engine
from llm_edge.runtime.sampling.params import SamplingParams


def main() -> None:
    """Answer until standard input ends."""
    bundle, precision, threads = sys.argv[1], sys.argv[2], int(sys.argv[3])
    with Engine.load(bundle, precision, threads=threads or None, active=16, kept=16) as engine:
        for line in sys.stdin:
            request = json.loads(line)
            for prompt in request["rows"]:  # computed first: the rate is that of decoding
                engine.generate(prompt, SamplingParams(temperature=0.0, max_tokens=1)).result()
            print(json.dumps({"rate": together(engine, request["rows"], request["count"])}), flush=True)


if __name__ == "__main__":
    main()
