"""Attacks an engine for as long as it takes: python tests/stress/run.py [SEED [ROUNDS]].

Each round runs 16 threads with 40 requests each, and prints how they ended. The exit code is 1 if anything went wrong:
a caller left waiting, counters that do not add up, a wrong answer, an error that is not one line.
"""

from __future__ import annotations

import secrets
import sys
import tempfile
import time
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1] / "support")]

import tiny  # noqa: E402
from stress import stress  # noqa: E402

from llm_edge.exporter.export import export  # noqa: E402
from llm_edge.exporter.options import ExportOptions  # noqa: E402

RATES = (0.0, 0.0005, 0.002, 0.01)


def main() -> int:
    """Run the rounds; returns the exit code."""
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else secrets.randbelow(10**6)
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else len(RATES)
    wrong = 0
    with tempfile.TemporaryDirectory() as folder:
        bundle = Path(folder) / "bundle"
        export(str(tiny.save_checkpoint(Path(folder) / "tiny")), ExportOptions(bundle, precision="fp32"))
        for number in range(rounds):
            rate, began = RATES[number % len(RATES)], time.monotonic()
            report = stress(bundle, seed + number, callers=16, requests=40, rate=rate, patience=600)
            print(
                f"seed {seed + number}, rate {rate}: {report.finished} finished, {report.cancelled} cancelled, "
                f"{report.failed} failed, {report.refused} refused; {report.failures} failures injected; "
                f"the engine {'serves' if report.serves else 'refuses'}; {time.monotonic() - began:.0f} s",
                flush=True,
            )
            for line in report.wrong:
                print(f"  wrong: {line}")
            wrong += len(report.wrong)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
