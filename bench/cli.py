"""`llm-bench`: speed and memory of a bundle, each precision in processes of its own, in turn."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated

import typer

from llm_edge.runtime.command import run

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

COLUMNS = {
    "prefill_128": "prefill 128",
    "prefill_512": "prefill 512",
    "decode_0": "decode @0",
    "decode_512": "decode @512",
    "cold_start_s": "first token, cold",
    "peak_mb": "peak memory",
    "python_share_0": "Python's share",
}


@app.command()
def bench(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder made by llm-export.")],
    precision: Annotated[str | None, typer.Option(help="Comma-separated. Default: all that the bundle holds.")] = None,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Runs of each precision; medians are shown.")] = 3,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads of an operator. Default: physical cores.")] = None,
) -> None:
    """Measure tokens per second, time to the first token of a cold process and peak memory.

    Prints a table, and one JSON object as the last line.
    """
    raise typer.Exit(run(lambda: _bench(bundle, precision, rounds, threads)))


def _bench(path: Path, precision: str | None, rounds: int, threads: int | None) -> None:
    from llm_edge.runtime.bundle import Bundle

    bundle = Bundle.open(path)
    names = [name.strip() for name in precision.split(",")] if precision else list(bundle.precisions)
    infos = [bundle.precision(name) for name in names]
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for number in range(rounds):
        for name in names:
            print(f"round {number + 1} of {rounds}: {name}", file=sys.stderr, flush=True)
            runs[name].append(_measure(path, name, threads))
    medians = {name: {key: _median([run[key] for run in runs[name]]) for key in COLUMNS} for name in names}
    _print_table({info.name: info.size for info in infos}, medians)
    print(
        json.dumps(
            {
                "bundle": bundle.name,
                "machine": machine(),
                "threads": threads,
                "rounds": rounds,
                "precisions": medians,
            }
        )
    )


def _measure(path: Path, precision: str, threads: int | None) -> dict[str, float]:
    from llm_edge.runtime.errors import MachineError

    command = [
        sys.executable,
        "-m",
        "llm_edge.bench.measure",
        str(path),
        precision,
        str(time.time()),
        str(threads or 0),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        last = done.stderr.strip().splitlines()[-1:] or ["no message"]
        raise MachineError(f"measuring {precision} failed: {last[0]}")
    figures: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return figures


def _median(values: list[float]) -> float:
    import statistics

    return statistics.median(values)


def _print_table(sizes: dict[str, int], medians: dict[str, dict[str, float]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "size", *COLUMNS.values()):
        table.add_column(title, justify="right" if title else "left")
    units = {"cold_start_s": "{:.2f} s", "peak_mb": "{:,.0f} MB", "python_share_0": "{:.1%}"}
    for name, figures in medians.items():
        cells = [units.get(key, "{:,.0f} tok/s").format(figures[key]) for key in COLUMNS]
        table.add_row(name, f"{sizes[name] / 1e6:,.0f} MB", *cells)
    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(table)


def machine() -> str:
    """The processor and how many of its threads we may use."""
    import os

    model = next(
        (line.split(":", 1)[1].strip() for line in _cpuinfo() if line.startswith("model name")),
        "unknown processor",
    )
    return f"{model}, {len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()} threads"


def _cpuinfo() -> list[str]:
    try:
        return Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return []


def main() -> None:
    """Entry point of `llm-bench`."""
    app()
