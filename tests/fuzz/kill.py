"""Kills exports at random moments: python tests/fuzz/kill.py [SEED [COUNT]].

Every second export replaces an older bundle with --force. After each kill the old or the new bundle has to stand under
its name and to answer, and the next export must leave nothing else beside it. Linux only.
"""

from __future__ import annotations

import json
import os
import random
import secrets
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

import run as fuzz  # first: it prepares this process for forks
import tiny
from damaged_bundles import ASK, SMALL
from sandbox import Command, run

from llm_edge.exporter import cli as export_cli
from llm_edge.exporter.export import export
from llm_edge.exporter.options import ExportOptions
from llm_edge.runtime.bundle import MANIFEST
from llm_edge.tui import cli as chat_cli

COUNT = 60
OPTIONS = ("--no-validate", "--precision", "fp32", "--progress", "none")


def export_words(source: str, *, force: bool) -> tuple[str, ...]:
    return ("llm-export", source, "-o", "bundle", *OPTIONS, *(["--force"] if force else []))


def killed(words: tuple[str, ...], folder: Path, moment: float) -> bool:
    """Start an export, and kill it after so many seconds; returns whether it was still running."""
    child = os.fork()
    if child == 0:
        try:
            for number in (1, 2):
                os.dup2(os.open(os.devnull, os.O_WRONLY), number)
            os.chdir(folder)
            sys.argv = list(words)
            export_cli.main()
        finally:
            os._exit(0)
    time.sleep(moment)
    os.kill(child, signal.SIGKILL)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL


def standing(folder: Path) -> str:
    """Which bundle stands under its name: "old", "new" or "none"; or what is wrong with it."""
    if not (folder / "bundle").exists():
        return "none"
    done = run(Command("", chat_cli.main, ("llm-chat", "bundle", *ASK)), folder)
    if done.code != 0:
        return f"unusable: {done.err}"
    return str(json.loads((folder / "bundle" / MANIFEST).read_text(encoding="utf-8"))["name"])


def problem(folder: Path, force: bool) -> tuple[str, str | None]:
    """What stands after a kill, and what is wrong with it or with the next export."""
    found = standing(folder)
    if found not in (("old", "new") if force else ("new", "none")):
        return found, f"{found} after the kill"
    done = run(Command("", export_cli.main, export_words("new", force=True)), folder)
    if done.code != 0:
        return found, f"the next export failed: {done.err}"
    names = sorted(path.name for path in folder.iterdir())
    if names != ["bundle", "new"]:
        return found, f"left beside the bundle: {', '.join(names)}"
    after = standing(folder)
    return found, None if after == "new" else f"{after} after the next export"


def main() -> int:
    """Kill the exports; returns the exit code."""
    seed = int(sys.argv[1]) if len(sys.argv) > 1 else secrets.randbelow(10**6)
    count = int(sys.argv[2]) if len(sys.argv) > 2 else COUNT
    rng, wrong, found = random.Random(seed), 0, Counter[str]()
    print(f"seed {seed}", flush=True)
    with tempfile.TemporaryDirectory(prefix="llm-edge-kill-") as temporary:
        place = Path(temporary)
        fuzz.prepare_process()
        for number, name in enumerate(("old", "new")):
            source = tiny.save_checkpoint(place / name, seed=number, **SMALL)
            began = time.monotonic()
            export(str(source), ExportOptions(place / f"{name}-bundle", precision="fp32", validate=False))
        longest = time.monotonic() - began  # of the second, whose trace is known
        for number in range(count):
            force, folder = number % 2 == 1, place / "exports"
            shutil.copytree(place / "new", folder / "new")
            if force:
                shutil.copytree(place / "old-bundle", folder / "bundle")
            moment = rng.uniform(0, 1.5 * longest)
            running = killed(export_words("new", force=force), folder, moment)
            state, reason = problem(folder, force)
            found[state if running else "finished before"] += 1
            if reason is not None:
                wrong += 1
                print(f"{number}: killed after {moment:.3f} s{' with --force' if force else ''}: {reason}", flush=True)
            for path in place.glob("exports*"):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
    print(", ".join(f"{number} times {state}" for state, number in sorted(found.items())))
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
