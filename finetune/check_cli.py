"""`llm-finetune check`: the command that shows what is in a data file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llm_edge.finetune.data.options import DataOptions
from llm_edge.runtime.command import run, with_options
from llm_edge.runtime.installation import imports_of_extra

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
@with_options(DataOptions)
def check(
    data: Annotated[Path, typer.Argument(help="JSONL file, one conversation per line.")],
    model: Annotated[str, typer.Option("--model", "-m", help="Checkpoint that will be trained, as for llm-export.")],
    options: DataOptions,
    row: Annotated[
        int | None, typer.Option(min=1, help="Show the samples of this line, with the trained tokens in colour.")
    ] = None,
) -> None:
    """Check a data file: list every problem with its line, duplicates and lengths."""

    def command() -> None:
        with imports_of_extra("llm-finetune", "train"):
            from llm_edge.finetune.data.encoding import ConversationEncoder, prompt_processor
            from llm_edge.finetune.data.load import read_data
            from llm_edge.finetune.data.report import print_report, print_row
            from llm_edge.finetune.source import open_model
        from rich.console import Console

        console = Console(highlight=False)
        encoder = ConversationEncoder(prompt_processor(open_model(model, options)), options.max_length)
        file = read_data(data, encoder, options.long)
        if row is not None:
            print_row(file, row, encoder.prompts.tokenizer, console)
            return
        paths = [options.evaluation_data] if options.evaluation_data is not None else []
        files = [file, *(read_data(path, encoder, options.long) for path in paths)]
        for each in files:
            print_report(each, encoder.max_length, console)
        for each in files:
            each.check()

    raise typer.Exit(run(command))
