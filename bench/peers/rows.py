"""`python -m llm_edge.bench.peers.rows BUNDLE`: concurrent answers by our engine and llama.cpp, interleaved.

Tokens/s of 1 to 16 sequences after 100 tokens each, as llama-batched-bench counts them: llama.cpp does not sample, ours
are sampled and read by as many threads through the public API.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

from llm_edge.bench.driver import Worker
from llm_edge.bench.engine import TOKENS, WIDTHS
from llm_edge.bench.peers import without_amx as amx
from llm_edge.bench.peers.engines import choose, make
from llm_edge.bench.peers.run import TEXT, say, source_of, tokens_of
from llm_edge.runtime.bundle import Bundle
from llm_edge.runtime.command import run
from llm_edge.runtime.errors import InputError

PROMPT = 100
_PAIRS = (("ours/int8", "llama.cpp/Q8_0"), ("ours/int4", "llama.cpp/Q4_0"))
_OURS = "llm_edge.bench.peers.engine_worker"


def compare(path: Path, work: Path, threads: int, rounds: int, prefix: Sequence[str]) -> None:
    """Measure interleaved; print medians, and medians of the ratios of paired samples."""
    bundle = Bundle.open(path)
    bundle.verify()
    text = tokens_of(bundle, TEXT)
    pairs = [pair for pair in _PAIRS if pair[0].split("/")[1] in bundle.precisions]
    names = choose(",".join(name for pair in pairs for name in pair), list(bundle.precisions))
    work = work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    commands: dict[str, tuple[str, ...]] = {}
    for contender in make(names, bundle, source_of((), bundle), work, threads, say):
        if contender.name.startswith("ours/"):
            _, _, precision = contender.name.partition("/")
            commands[contender.name] = (sys.executable, "-m", _OURS, str(path), precision, str(threads))
        else:
            commands[contender.name] = (*contender.speed, "rows")
    rates: dict[tuple[str, int], list[float]] = {(name, width): [] for name in commands for width in WIDTHS}
    workers = {name: Worker([*prefix, *command]) for name, command in commands.items()}
    try:
        for number in range(rounds + 1):  # the first one warms up
            say(f"round {number} of {rounds}")
            for width in WIDTHS:
                rows = [text[(number + row) * 7 :][:PROMPT] for row in range(width)]
                for name, worker in workers.items():
                    rate = worker.ask(rows=rows, count=TOKENS)["rate"]
                    if number:
                        rates[name, width].append(rate)
    finally:
        for worker in workers.values():
            worker.close()
    for name in commands:
        print(name, *(f"{statistics.median(rates[name, width]):8.0f}" for width in WIDTHS), "tok/s")
    for ours, theirs in pairs:
        both = [zip(rates[ours, width], rates[theirs, width], strict=True) for width in WIDTHS]
        print(f"{ours} / {theirs}:", *(f"{statistics.median(one / other for one, other in each):.2f}" for each in both))


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--work", type=Path, default=Path(".peers"), help="folder for environments and models")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--without-amx", action="store_true", help="refuse AMX to all, as laptops do")
    options = parser.parse_args(arguments)
    prefix = (sys.executable, "-I", "-S", amx.__file__) if options.without_amx else ()

    def measure() -> None:
        if options.without_amx and (reason := amx.problem()) is not None:
            raise InputError(f"--without-amx: {reason}")
        compare(options.bundle, options.work, options.threads, options.rounds, prefix)

    sys.exit(run(measure, native_output=True))


if __name__ == "__main__":
    main()
