"""`llm-bench`: speed and memory of a bundle, and of other engines next to it."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm_edge.runtime.command import print_version, run

if TYPE_CHECKING:
    from llm_edge.runtime.bundle import Bundle

TEXT = (
    "The harbour office opened at seven. By then the ferries had been running for an hour, and the clerk who kept "
    "the tide tables had already crossed out two of yesterday's predictions. She liked the work: every figure in "
    "the ledger had once been a length of wet rope, measured by somebody who would rather have been at breakfast. "
)

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def bench(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder from llm-export.")],
    precision: Annotated[str | None, typer.Option(help="Comma-separated. Default: all in the bundle.")] = None,
    rounds: Annotated[int, typer.Option(min=1, max=100, help="Fresh processes of each; medians are reported.")] = 3,
    repeats: Annotated[int, typer.Option(min=1, max=1000, help="Measurements in each process, interleaved.")] = 5,
    threads: Annotated[int | None, typer.Option(min=1, help="Threads per operator. Default: physical cores.")] = None,
    against: Annotated[
        str | None, typer.Option(help="Command of another engine with the protocol of bench/worker.py.")
    ] = None,
    show_version: Annotated[  # noqa: ARG001 (its callback acts)
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Measure tokens per second, time to the first token of a cold process and peak memory.

    Prints a table, and one JSON object as the last line.
    """
    raise typer.Exit(run(lambda: _bench(bundle, precision, rounds, repeats, threads, against), native_output=True))


def _bench(
    path: Path, precision: str | None, rounds: int, repeats: int, threads: int | None, against: str | None
) -> None:
    from llm_edge.bench.driver import COLUMNS, MIN_CONTEXT, measure, median, median_ratio, our_command
    from llm_edge.bench.requirements import require_modules
    from llm_edge.runtime.bundle import Bundle
    from llm_edge.runtime.errors import InputError

    require_modules("llm-bench", "resource")
    bundle = Bundle.open(path)
    names = [name.strip() for name in precision.split(",")] if precision else list(bundle.precisions)
    sizes = {name: bundle.precision(name).size for name in names}
    if bundle.shape.max_position_embeddings < MIN_CONTEXT:
        context = bundle.shape.max_position_embeddings
        raise InputError(
            f"{path}: its context of {context} is shorter than {MIN_CONTEXT}: export it with a larger --max-seq-len, "
            "or measure another bundle"
        )
    for name in names:
        bundle.verify(name)
    commands = {name: our_command(path, name, threads) for name in names}
    if against is not None:
        try:
            commands["other"] = shlex.split(against)
        except ValueError as error:
            raise InputError(f"--against {against!r}: {error}") from error
        if not commands["other"] or shutil.which(commands["other"][0]) is None:
            raise InputError(f"--against {against!r} is no command that can be run: give that of a worker")
    figures = measure(commands, _tokens(bundle), rounds, repeats, lambda text: print(text, file=sys.stderr, flush=True))
    medians = {name: {key: median(found[key]) for key in COLUMNS} for name, found in figures.items()}
    report: dict[str, Any] = {
        "bundle": bundle.name,
        "machine": machine(),
        "threads": threads,
        "rounds": rounds,
        "repeats": repeats,
        "precisions": {name: medians[name] for name in names},
    }
    if against is not None:
        report["against"] = against
        report["other"] = medians["other"]
        report["ratios"] = {
            name: {key: median_ratio(figures[name][key], figures["other"][key]) for key in COLUMNS} for name in names
        }
    _print_table(sizes, medians, report.get("ratios", {}))
    print(json.dumps(report))


def _tokens(bundle: Bundle) -> list[int]:
    from llm_edge.runtime.errors import InputError
    from llm_edge.runtime.text.tokenizer import Tokenizer

    config = bundle.json("tokenizer_config.json")
    tokenizer = Tokenizer.from_files(bundle.file("tokenizer.json"), config, None)
    tokens = tokenizer.encode(TEXT * 20)
    if len(tokens) < 512:
        raise InputError(f"{bundle.path}: its tokenizer makes {len(tokens)} tokens of the text to measure with")
    return tokens


def _print_table(
    sizes: Mapping[str, int],
    medians: Mapping[str, Mapping[str, float | None]],
    ratios: Mapping[str, Mapping[str, float | None]],
) -> None:
    from rich.console import Console
    from rich.table import Table

    from llm_edge.bench.driver import COLUMNS

    table = Table(box=None, pad_edge=False, header_style="bold")
    for title in ("", "size", *(title for title, _ in COLUMNS.values())):
        table.add_column(title, justify="right" if title else "left")
    for name, found in medians.items():
        cells = [_cell(form, found[key]) for key, (_, form) in COLUMNS.items()]
        table.add_row(name, f"{sizes[name] / 1e6:,.0f} MB" if name in sizes else "", *cells)
    for name, found in ratios.items():
        table.add_row(f"{name} / other", "", *(_cell("{:.2f}", found[key]) for key in COLUMNS))
    Console(width=None if sys.stdout.isatty() else 140, highlight=False).print(table)


def _cell(form: str, value: float | None) -> str:
    return "" if value is None else form.format(value)


def machine() -> str:
    """The processor and the number of available threads."""
    threads = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "processor")
    return f"{model}, {threads} threads"


def main() -> None:
    """Entry point of `llm-bench`."""
    app()
