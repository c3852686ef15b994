"""Logits of a precision of a bundle: `python -m llm_edge.bench.peers.our_logits BUNDLE PRECISION THREADS`.

Uses the protocol of `serving.py` without timings: the speed is measured by `bench/worker.py`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> None:
    """Answer until standard input ends."""
    from llm_edge.runtime.backend.graph import ExecutionOptions, GraphFile
    from llm_edge.runtime.backend.open import open_session
    from llm_edge.runtime.bundle import Bundle

    bundle = Bundle.open(sys.argv[1])
    file = GraphFile.of(bundle, bundle.precision(sys.argv[2]))
    session = open_session(file, ExecutionOptions("cpu", int(sys.argv[3])))
    for line in sys.stdin:
        request = json.loads(line)
        session.clear_cache()
        logits = session.step(request["logits"], num_logits=0)
        Path(request["to"]).write_bytes(logits.astype("<f4", copy=False).tobytes())
        print(json.dumps({"rows": len(logits)}), flush=True)


if __name__ == "__main__":
    main()
