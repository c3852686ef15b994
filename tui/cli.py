"""`llm-chat`: the command line. It is parsed before anything slow is imported."""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from llm_edge.chat.options import sampling_options
from llm_edge.runtime.command import given_on_command_line, print_version, run
from llm_edge.runtime.errors import BundleError, InputError, ParameterError
from llm_edge.runtime.installation import install_hint
from llm_edge.runtime.load_options import LoadOptions

if TYPE_CHECKING:
    from llm_edge.chat.choice import Choice

DEFAULT_BUNDLE = Path("artifacts/smollm2-135m")

app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """The command line without the sampling parameters; see `chat` for the fields."""

    bundle: Path
    load: LoadOptions
    endpoint: str | None
    model: str | None
    key: str | None
    system: str | None
    ask: str | None
    plain: bool
    continue_: bool
    save: bool
    stdin: bool | None
    fake: bool
    serve: bool
    host: str
    port: int
    given: frozenset[str]  # names of the options and arguments on the command line

    @property
    def full_screen(self) -> bool:
        """Neither `--ask` nor `--plain` was given."""
        return self.ask is None and not self.plain

    def choice(self) -> Choice | None:
        """The model to chat with; None = `--fake`."""
        from llm_edge.chat.choice import BundleChoice
        from llm_edge.chat.endpoint.client import named_endpoint

        if self.fake:
            return None
        if self.endpoint is None:
            return BundleChoice(self.bundle, self.load)
        return named_endpoint(self.endpoint, self.model or "", self.key)

    def check(self) -> None:
        """Check combinations of options.

        Raises:
            ParameterError: options that exclude each other, lack another one, or would be ignored.
            InputError: a question stands where a bundle is expected.
            BundleError: the bundle does not exist, and `--ask` or `--plain` cannot export it.
        """
        if (self.serve or self.fake) and not self.full_screen:
            raise ParameterError("--serve and --fake need the full-screen chat: remove --ask and --plain")
        if self.full_screen and self.save:
            raise ParameterError("--save needs --ask or --plain: the full-screen chat saves by itself")
        if not self.serve and (unused := self._given("host", "port")):
            raise ParameterError(f"{unused} has no effect without --serve: add --serve, or remove it")
        if self.endpoint is not None and (unused := self._given("bundle", "precision", "draft", "provider", "threads")):
            raise ParameterError(f"{unused} has no effect with --endpoint: remove one of them")
        if self.fake and (unused := self._given("bundle", "endpoint", "precision", "draft", "provider", "threads")):
            raise ParameterError(f"{unused} has no effect with --fake: remove one of them")
        if len(str(self.bundle).split()) > 1 and not self.bundle.exists():
            raise InputError(f"{str(self.bundle)!r} is not a bundle folder: to ask a question, put --ask before it")
        if self.ask is not None and not self.ask.strip():
            raise ParameterError("--ask is empty: give a question")
        if self.ask is not None and self.plain:
            raise ParameterError("--ask and --plain exclude each other: remove one of them")
        if self.endpoint is not None and not (self.model or "").strip():
            raise ParameterError("--endpoint needs a model: add --model NAME")
        if self.endpoint is None and (self.model is not None or self.key is not None):
            raise ParameterError("--model and --key need an endpoint: add --endpoint URL")

    def _given(self, *names: str) -> str:
        """The first of these that was used, as it is written on the command line; "" = none."""
        used = next((name for name in names if name in self.given), "")
        return "a bundle" if used == "bundle" else f"--{used}" if used else ""


@app.command(context_settings={"help_option_names": ["-h", "--help"]})
@sampling_options
def chat(
    context: typer.Context,
    bundle: Annotated[Path, typer.Argument(help="Bundle folder exported by llm-export.")] = DEFAULT_BUNDLE,
    *,
    ask: Annotated[
        str | None, typer.Option(help="Answer one question on stdout and exit; piped input becomes its context.")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Chat line by line; works through pipes.")] = False,
    continue_: Annotated[
        bool, typer.Option("--continue", "-c", help="Continue the latest conversation of the history.")
    ] = False,
    save: Annotated[bool, typer.Option("--save", help="Save --ask/--plain conversations to history.")] = False,
    stdin: Annotated[
        bool | None, typer.Option(help="With --ask: read standard input, or ignore it. Default: auto-detect.")
    ] = None,
    endpoint: Annotated[
        str | None, typer.Option(metavar="URL", help="Chat with an OpenAI-compatible endpoint instead of a bundle.")
    ] = None,
    model: Annotated[str | None, typer.Option(metavar="NAME", help="With --endpoint: the model.")] = None,
    key: Annotated[
        str | None,
        typer.Option(
            metavar="PLACE",
            help="With --endpoint: where its API key is, env:VARIABLE or keyring. Default: as last used, else none.",
        ),
    ] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    precision: Annotated[
        str | None,
        typer.Option(help="Precision to load, such as fp32, int8, int4. Default: int8, or fp16 on CUDA, if available."),
    ] = None,
    draft: Annotated[
        Path | None, typer.Option(help="Bundle of a smaller model of the same family, for speculative decoding.")
    ] = None,
    provider: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Threads per operator. Default: physical cores.")] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Serve the chat to a browser on this machine.")] = False,
    host: Annotated[str, typer.Option(help="With --serve: address to listen on.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65_535, help="With --serve: port to listen on.")] = 8020,
    fake: Annotated[bool, typer.Option("--fake", help="Try the chat without a model: a script answers.")] = False,
    show_version: Annotated[  # noqa: ARG001 (its callback acts)
        bool, typer.Option("--version", callback=print_version, is_eager=True, help="Show the version and exit.")
    ] = False,
    sampling: Mapping[str, Any],
) -> None:
    """Chat with a model in the terminal or a browser, or ask it one question.

    Unset options use the model's defaults.
    """
    load, given = LoadOptions(precision, provider, threads, draft=draft), _given(context)
    question = (ask, plain, continue_, save, stdin)
    options = ChatOptions(bundle, load, endpoint, model, key, system, *question, fake, serve, host, port, given)
    raise typer.Exit(run(lambda: _chat(options, sampling)))


def _given(context: typer.Context) -> frozenset[str]:
    """Names of the options and arguments that are on the command line."""
    return frozenset(name for name in context.params if given_on_command_line(context, name))


def _chat(options: ChatOptions, sampling: Mapping[str, Any]) -> None:
    from llm_edge.runtime.sampling.params import SamplingParams

    SamplingParams(**sampling)  # reports a wrong value before a model loads
    options.check()
    if options.full_screen and (options.serve or options.fake or _on_screen()):
        _open_screen(options, sampling)
        return
    if options.ask is None and options.stdin is not None:
        raise ParameterError("--stdin and --no-stdin need a question: add --ask")
    if sys.stdout is None:
        raise InputError("stdout is closed, so the answer cannot be written: open it, or redirect it to a file")
    if options.endpoint is None and options.bundle == DEFAULT_BUNDLE and not options.bundle.exists():
        raise BundleError(f"{options.bundle}: not found: {_export_hint()}, or name another bundle")
    from llm_edge.tui import plain_start

    code = plain_start.chat(options, sampling)
    if code:
        raise typer.Exit(code)


def _export_hint() -> str:
    """How to get a bundle, which may need the export extra first."""
    import importlib.util

    missing = importlib.util.find_spec("torch") is None
    return f"run {install_hint('export')}, then llm-export smollm2" if missing else "run 'llm-export smollm2'"


def _on_screen() -> bool:
    """Whether there is a terminal for the full-screen chat, and textual is installed."""
    import importlib.util

    # The application draws on stderr. Under textual-serve the browser is the screen, whatever the streams are.
    streams = (sys.stdin, sys.stdout, sys.stderr)
    terminal = all(stream is not None and stream.isatty() for stream in streams) and os.environ.get("TERM") != "dumb"
    return (terminal or "TEXTUAL_DRIVER" in os.environ) and importlib.util.find_spec("textual") is not None


def _without_server_options(words: Sequence[str]) -> list[str]:
    """The command line of the chat that a visitor gets: without `--serve`, `--host` and `--port`."""
    kept: list[str] = []
    rest = iter(words)
    for word in rest:
        if word in ("--host", "--port"):
            next(rest, None)
        elif word != "--serve" and not word.startswith(("--host=", "--port=")):
            kept.append(word)
    return kept


def _open_screen(options: ChatOptions, sampling: Mapping[str, Any]) -> None:
    if options.endpoint is None and options.bundle != DEFAULT_BUNDLE and not options.bundle.exists():
        raise InputError(f"{options.bundle}: no such folder: export a bundle with llm-export, or name another one")
    try:
        from llm_edge.tui import start
    except ImportError as e:
        raise InputError(f"the full-screen chat needs {e.name}: {install_hint('tui')}, or use --plain") from e
    if options.serve:
        start.serve(_without_server_options(sys.argv[1:]), options.host, options.port)
        return
    if not _on_screen():
        raise InputError("--fake needs a terminal: run it in one, or add --serve")
    raise typer.Exit(start.chat(options.choice(), sampling, options.system, continue_=options.continue_))


def main() -> None:
    """Entry point of `llm-chat`."""
    if sys.stdin is None:  # it was closed before the start
        sys.stdin = Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115 (for the life of the process)
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    app()
