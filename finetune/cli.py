"""The `llm-finetune` command line. Arguments are parsed before torch is imported, so that `--help` is fast."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from llm_edge.finetune.data.options import DataOptions
from llm_edge.runtime.command import run, with_options
from llm_edge.runtime.errors import InputError

check_app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@check_app.command(context_settings={"help_option_names": ["-h", "--help"]})
@with_options(DataOptions)
def check(
    data: Annotated[Path, typer.Argument(help="JSONL file, one conversation per line.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Checkpoint that will be trained, as for llm-export.")],
    options: DataOptions,
) -> None:
    """Check a data file: faults by line, duplicates and lengths."""

    def command() -> None:
        raise InputError(f"{data}: cannot be checked yet for {model} ({options.max_length} tokens)")

    raise typer.Exit(run(command))


def main() -> None:
    """Entry point of `llm-finetune`."""
    if sys.argv[1:2] == ["check"]:
        check_app(args=sys.argv[2:], prog_name="llm-finetune check")
    check_app()
