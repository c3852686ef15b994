"""Runs commands on random hostile input: python tests/fuzz/run.py [SEED] [--kind KIND] [--count N] [--case NUMBER].

Every command has to succeed, or to print one line and exit with 2, in less than 3 seconds of processor time and 1 GB.
The folder of a case that does not is kept in .fuzz/, with the command that repeats it. Linux only.
"""

from __future__ import annotations

import argparse
import functools
import os
import random
import secrets
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

# A child that is forked beside threads of native libraries could wait for them for ever.
os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false", HF_HUB_OFFLINE="1")
ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT / "tests" / name) for name in ("support", "checkpoint")]

import damaged_bundles  # noqa: E402
import damaged_checkpoints  # noqa: E402
import damaged_stores  # noqa: E402
import hostile_graphs  # noqa: E402
import hostile_templates  # noqa: E402
import hostile_tokenizers  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402
from sandbox import Command, run  # noqa: E402

from llm_edge.exporter.bundle import onnx_writer  # noqa: E402

KEPT = ROOT / ".fuzz"


@dataclass(frozen=True)
class Kind:
    """A kind of hostile input.

    Attributes:
        count: number of cases by default.
        prepare: writes what the cases are made from to a folder.
        make: writes case `number` to a folder: make(originals, folder, number, rng).
    """

    count: int
    prepare: Callable[[Path], None]
    make: Callable[[Path, Path, int, random.Random], Command]


KINDS = {
    "flips": Kind(300, damaged_bundles.prepare, damaged_bundles.flipped),
    "truncations": Kind(60, damaged_bundles.prepare, damaged_bundles.truncated),
    "tokenizers": Kind(60, damaged_bundles.prepare, hostile_tokenizers.make),
    "templates": Kind(100, damaged_bundles.prepare, hostile_templates.make),
    "graphs": Kind(40, damaged_bundles.prepare, hostile_graphs.make),
    "stores": Kind(60, damaged_stores.prepare, damaged_stores.make),
    **{
        name: Kind(200, damaged_checkpoints.prepare, functools.partial(damaged_checkpoints.make, name))
        for name in damaged_checkpoints.FORMATS
    },
}


def prepare_process() -> None:
    """Keep this process free of threads, and let its children inherit the traces of intact models."""
    torch.set_num_threads(1)
    transformers.utils.logging.disable_progress_bar()
    onnx_writer.trace = functools.cache(onnx_writer.trace)  # it depends on the shape alone


def prepared(kinds: list[Kind], folder: Path) -> dict[Callable[[Path], None], Path]:
    """The folders with what the cases of these kinds are made from."""
    prepare_process()
    found = {}
    for number, prepare in enumerate(dict.fromkeys(kind.prepare for kind in kinds)):
        found[prepare] = folder / str(number)
        found[prepare].mkdir()
        prepare(found[prepare])
    return found


def attempt(name: str, number: int, seed: int, originals: Path, place: Path) -> tuple[int, str | None, float]:
    """Run one case; returns its exit code, what is wrong, and the processor time in seconds."""
    folder = place / f"{name}-{seed}-{number}"
    folder.mkdir()
    command = KINDS[name].make(originals, folder, number, random.Random(f"{seed} {name} {number}"))
    outcome = run(command, folder)
    problem = outcome.problem()
    if problem is not None:
        shutil.rmtree(KEPT / folder.name, ignore_errors=True)
        kept = shutil.copytree(folder, KEPT / folder.name, symlinks=True)
        (kept / "command.txt").write_text(command.shell(kept) + "\n", errors="backslashreplace")
        problem = f"{problem}: {command.what}\n  {(outcome.err or outcome.out)[-300:]}\n  see {kept}/command.txt"
    for path in place.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return outcome.code, problem, outcome.seconds


def main() -> int:
    """Run all cases; returns the exit code."""
    parser = argparse.ArgumentParser()
    parser.add_argument("seed", nargs="?", type=int, default=secrets.randbelow(10**6))
    parser.add_argument("--kind", action="append", choices=KINDS, help="may be repeated; default: all")
    parser.add_argument("--count", type=int, help="number of cases of each kind")
    parser.add_argument("--case", type=int, help="run only the case with this number")
    given = parser.parse_args()
    names, wrong = given.kind or list(KINDS), 0
    print(f"seed {given.seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="llm-edge-fuzz-") as temporary:
        originals = prepared([KINDS[name] for name in names], Path(temporary))
        place = Path(temporary) / "cases"
        place.mkdir()
        for name in names:
            kind, codes, began, slowest = KINDS[name], Counter[int](), time.monotonic(), 0.0
            numbers = range(given.count or kind.count) if given.case is None else [given.case]
            for number in numbers:
                code, problem, seconds = attempt(name, number, given.seed, originals[kind.prepare], place)
                codes[code] += 1
                slowest = max(slowest, seconds)
                if problem is not None:
                    wrong += 1
                    print(f"{name} {number}: {problem}", flush=True)
            counted = ", ".join(f"{count} with exit code {code}" for code, count in sorted(codes.items()))
            print(f"{name}: {counted}; slowest {slowest:.1f} s; {time.monotonic() - began:.0f} s", flush=True)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
