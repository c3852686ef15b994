"""`make compat-kinds`: which other runtimes run a tiny model of each architecture with the tokens of ours.

Exports each to fp32 and prints a row: for each consumer "equal", "differs", or the end of its error. Exit code 1 if the
manifest lists one that is not equal.
"""

from __future__ import annotations

import contextlib
import io
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "tests" / "support")]
from general_models import save  # noqa: E402
from run import CONSUMERS, Outcome, compare  # noqa: E402

from llm_edge.exporter.export import export  # noqa: E402
from llm_edge.exporter.families import families  # noqa: E402
from llm_edge.exporter.options import ExportOptions  # noqa: E402

TOKENS = 12
PRECISION = "fp32"


def main(kinds: Sequence[str]) -> int:
    """Check these architectures, or all; print a row for each."""
    print("architecture", *CONSUMERS, sep="\t")
    good = True
    for kind in kinds or families():
        with tempfile.TemporaryDirectory() as folder:
            try:
                verdicts, agrees = check(kind, Path(folder))
            except Exception as error:  # noqa: BLE001 (of whatever makes the tiny model; the others go on)
                print(kind, f"not exported: {error}", sep="\t", flush=True)
                continue
        good = good and agrees
        print(kind, *verdicts, "" if agrees else "MANIFEST", sep="\t", flush=True)
    return 0 if good else 1


def check(kind: str, folder: Path) -> tuple[list[str], bool]:
    """Export a tiny model; return each consumer's verdict, and whether they are as the manifest says."""
    bundle = folder / kind
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        export(str(save(kind, folder / "source")), ExportOptions(output=bundle, precision=PRECISION))
        outcomes = compare(list(CONSUMERS.values()), bundle, TOKENS, unlisted=True)
    manifest = json.loads((bundle / "manifest.json").read_text(encoding="utf-8"))
    listed = manifest["precisions"][PRECISION]["runtimes"]
    agrees = all(outcome.good or outcome.consumer not in listed for outcome in outcomes)
    return [_verdict(outcome) for outcome in outcomes], agrees


def _verdict(outcome: Outcome) -> str:
    if outcome.good:
        return "equal"
    if outcome.version:
        return "differs"
    errors = [note for note in outcome.notes if "Error" in note or "error" in note]
    return (errors or ["refused"])[0][:120]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
