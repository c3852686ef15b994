"""`llm-serve`: the command line. It is parsed before anything slow is imported."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from llm_edge.runtime.command import run
from llm_edge.runtime.errors import InputError, ParameterError
from llm_edge.server.config import GIB, LOOPBACK, JobConfig, ModelConfig, ServerConfig
from llm_edge.server.upstream_config import read_upstreams

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)
_MIN_KEY = 8  # characters


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
def serve(
    *,
    models: Annotated[Path, typer.Option(metavar="DIR", help="Folder of bundles.")] = Path("artifacts"),
    model: Annotated[str | None, typer.Option(metavar="NAME", help="Default model. Default: the first.")] = None,
    precision: Annotated[
        str | None, typer.Option(help="Precision where a request names none. Default: int8, if available.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on; other than loopback needs a key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65_535, help="Port to listen on.")] = 8000,
    api_key: Annotated[
        list[str] | None,
        typer.Option(help="Key that requests have to carry; repeatable. Visible in ps: prefer --api-key-file."),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="File with one key per line.")] = None,
    allowed_host: Annotated[
        list[str] | None, typer.Option(metavar="NAME", help="Further name of this server; repeatable.")
    ] = None,
    allowed_origin: Annotated[
        list[str] | None, typer.Option(metavar="ORIGIN", help="Origin of pages that may use the API; repeatable.")
    ] = None,
    memory: Annotated[
        float | None, typer.Option(metavar="GB", min=0.1, help="Memory for all models. Default: half of the machine's.")
    ] = None,
    parallel: Annotated[int, typer.Option(min=1, max=1024, help="Answers generated at the same time.")] = 8,
    queue: Annotated[int, typer.Option(min=0, max=1024, help="Requests that may wait for each model.")] = 64,
    threads: Annotated[int | None, typer.Option(help="Threads per operator. Default: physical cores.")] = None,
    provider: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "cpu",
    allow_uploads: Annotated[
        bool, typer.Option("--allow-uploads", help="Let clients upload checkpoints, which are exported here.")
    ] = False,
    allow_downloads: Annotated[
        bool, typer.Option("--allow-downloads", help="Let clients add models of the Hugging Face Hub by their id.")
    ] = False,
    upstreams: Annotated[
        Path | None, typer.Option(metavar="FILE", help="YAML file of OpenAI-compatible servers to offer models of.")
    ] = None,
    max_upload: Annotated[float, typer.Option(metavar="GB", min=0.001, help="Size limit of an upload.")] = 20.0,
) -> None:
    """Serve bundles to OpenAI, Anthropic and Ollama clients, and a chat page to browsers."""

    def config() -> ServerConfig:
        keys = _keys(api_key or [], api_key_file)
        if host.strip("[]").lower() not in LOOPBACK and not keys:
            raise ParameterError(f"--host {host} can be reached from other machines: add --api-key-file or --api-key")
        defaults = ModelConfig()
        limit = int(memory * GIB) if memory is not None else defaults.memory
        folder = ModelConfig(models, model, precision, provider, threads, limit, parallel, queue)
        jobs = JobConfig(allow_uploads, allow_downloads, int(max_upload * 1e9))
        names, origins = tuple(allowed_host or ()), tuple(allowed_origin or ())
        relayed = read_upstreams(upstreams) if upstreams is not None else ()
        return ServerConfig(folder, jobs, relayed, host, port, keys, names, origins)

    raise typer.Exit(run(lambda: _serve(config())))


def _serve(config: ServerConfig) -> None:
    try:
        from llm_edge.server.process import serve_forever
    except ImportError as error:
        raise InputError(f"llm-serve needs {error.name}: pip install 'llm-edge[serve]'") from error
    serve_forever(config)


def _keys(given: list[str], file: Path | None) -> tuple[str, ...]:
    keys = list(given)
    if file is not None:
        try:
            lines = file.read_text("utf-8").splitlines()
        except (OSError, ValueError) as error:
            raise InputError(f"{file}: the API keys cannot be read: {error}") from error
        keys += [line.strip() for line in lines if line.strip() and not line.startswith("#")]
        if not keys:
            raise InputError(f"{file} contains no key: write one per line")
    for key in keys:
        if len(key) < _MIN_KEY or not key.isascii() or not key.isprintable() or " " in key:
            raise InputError(f"an API key is shorter than {_MIN_KEY} characters or not printable ASCII without spaces")
    return tuple(keys)


def main() -> None:
    """Entry point of `llm-serve`."""
    app()
