"""Sends 5,000 requests made from the OpenAPI document to a server with a tiny model: `make schemathesis [SEED=n]`.

Prints a line per operation; any 5xx ends it with the request as a curl command.
"""

from __future__ import annotations

import secrets
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "support"))

import tiny
from api_cases import operations, send_cases
from serving import Served

from llm_edge.exporter.export import export
from llm_edge.exporter.options import ExportOptions

CASES = 5_000


def main(seed: int) -> None:
    """Send the cases and print how many there were."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        source = tiny.save_checkpoint(folder / "source")
        export(str(source), ExportOptions(folder / "models" / "tiny", precision="fp32", validate=False))
        server = Served(folder / "models", models={"generation": {"max_tokens": 4}})
        try:
            found = operations(server.url)
            examples, sent = CASES // len(found) + 1, 0
            for operation in found:
                began = time.perf_counter()
                count = send_cases(server.url, operation, examples, seed)
                sent += count
                seconds = time.perf_counter() - began
                print(f"{operation.method.upper():6} {operation.path:32} {count:5} {seconds:6.1f} s", flush=True)
        finally:
            server.stop()
    print(f"seed {seed}: {sent:,} requests without a 5xx")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 and sys.argv[1] else secrets.randbelow(10**6))
