"""Damages copies of a bundle and loads them, each in a forked process with limits.

`python tests/fuzz/run.py BUNDLE [SEED]`: 300 flipped bits and 60 cut files. Every case either works or raises an
`InputError` of one line, in less than 3 seconds and 1 GB. Checksums are corrected, so that the damage reaches the
readers. Linux only.
"""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections import Counter
from pathlib import Path

from llm_edge.runtime import Model, SamplingParams
from llm_edge.runtime.bundle import MANIFEST, manifest_entry
from llm_edge.runtime.errors import LlmEdgeError

SECONDS, BYTES = 3, 1 << 30
FLIPS, CUTS = 300, 60


def attempt(bundle: Path) -> int:
    """Load a bundle and generate; returns the exit code of a command."""
    try:
        model = Model.load(bundle, "fp32", provider="cpu", threads=1)
        model.generate("Hello", SamplingParams(temperature=0, max_tokens=3)).result()
    except LlmEdgeError as error:
        return error.exit_code if "\n" not in str(error) else 70
    return 0


def forked(bundle: Path) -> int:
    """The exit code of `attempt` in a child process with limits; negative for a signal."""
    child = os.fork()
    if child == 0:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        pages = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (pages + BYTES, pages + BYTES))
        signal.alarm(SECONDS)
        code = 71
        try:
            code = attempt(bundle)
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def damage(bundle: Path, name: str, cut: bool, rng: random.Random) -> None:
    """Flip bits of a file or cut it, and correct its entry in the manifest."""
    path = bundle / name
    content = bytearray(path.read_bytes())
    if cut:
        del content[rng.randrange(len(content)) :]
    else:
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    if name != MANIFEST:
        manifest = json.loads((bundle / MANIFEST).read_text(encoding="utf-8"))
        manifest["files"][name] = manifest_entry(path)
        (bundle / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")


def main() -> None:
    original, seed = Path(sys.argv[1]), int(sys.argv[2]) if len(sys.argv) > 2 else random.randrange(1 << 32)
    print(f"seed {seed}")
    rng, results = random.Random(seed), Counter[str]()
    names = [name for name in json.loads((original / MANIFEST).read_text())["files"] if "_data" not in name]
    for number in range(FLIPS + CUTS):
        cut, name = number >= FLIPS, rng.choice([MANIFEST, *names])
        with tempfile.TemporaryDirectory() as folder:
            bundle = Path(shutil.copytree(original, Path(folder) / "bundle"))
            damage(bundle, name, cut, rng)
            code = forked(bundle)
        results[f"exit {code}"] += 1
        if code not in (0, 2):
            print(f"case {number}: {name}, {'cut' if cut else 'flipped'}: exit {code}", flush=True)
    print(dict(results))
    sys.exit(0 if results.keys() <= {"exit 0", "exit 2"} else 1)


if __name__ == "__main__":
    main()
