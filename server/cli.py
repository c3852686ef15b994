"""`llm-serve`: the command line. It is parsed before anything slow is imported."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import typer

from llm_edge.runtime.command import given_on_command_line, print_version, run, with_options
from llm_edge.runtime.installation import imports_of_extra
from llm_edge.server.options import ServeOptions

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
@with_options(ServeOptions)
def serve(
    context: typer.Context,
    options: ServeOptions,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML file with these options; docs/serving.md.")
    ] = None,
    print_config: Annotated[
        bool, typer.Option("--print-config", help="Print the effective configuration, without keys, and exit.")
    ] = False,
    show_version: Annotated[  # noqa: ARG001 (its callback acts)
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Serve bundles to OpenAI, Anthropic and Ollama clients, and a chat page to browsers."""
    given = {
        field.name: getattr(options, field.name)
        for field in dataclasses.fields(options)
        if given_on_command_line(context, field.name)
    }

    def command() -> None:
        with imports_of_extra("llm-serve", "serve"):
            from llm_edge.server.config_file import ConfigFile, dump_config, merged, read_config
            from llm_edge.server.process import serve_forever
        file = read_config(config) if config is not None else ConfigFile()
        for note in file.notes:
            print(f"note: {note}", file=sys.stderr)
        effective = merged(file, given)
        configured = effective.to_config(file.generation)
        if print_config:
            print(dump_config(effective, file.generation), end="")
        else:
            serve_forever(configured)

    raise typer.Exit(run(command))


def main() -> None:
    """Entry point of `llm-serve`."""
    app()
