"""`llm-chat`: arguments alone; heavy modules are imported once the arguments are known to be good."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from llm_edge.runtime.command import run

if TYPE_CHECKING:
    from llm_edge.chat.history.store import Store
    from llm_edge.chat.recorder import ConversationRecorder
    from llm_edge.runtime.model import Model
    from llm_edge.runtime.sampling.params import SamplingParams

DEFAULT_BUNDLE = Path("artifacts/smollm2-135m")

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)


@app.command()
def chat(
    bundle: Annotated[Path, typer.Argument(help="Bundle folder made by llm-export.")] = DEFAULT_BUNDLE,
    ask: Annotated[
        str | None, typer.Option(help="Answer this once on stdout, and leave; what is piped in is its context.")
    ] = None,
    plain: Annotated[bool, typer.Option("--plain", help="Chat line by line; also through a pipe.")] = False,
    save: Annotated[bool, typer.Option("--save", help="Keep what --ask or --plain say among the chat's.")] = False,
    stdin: Annotated[
        bool | None,
        typer.Option(help="With --ask: wait for standard input, or leave it alone. Default: as it looks."),
    ] = None,
    precision: Annotated[
        str | None,
        typer.Option(
            help="One that the bundle holds: fp32, int8, int4. Default: int8, on CUDA fp16, where it is there."
        ),
    ] = None,
    draft: Annotated[Path | None, typer.Option(help="Bundle of a smaller model of the family: it guesses.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 always takes the most likely token.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from the k most likely tokens; 0: all.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the most likely tokens that make up p.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Draw from tokens at least p times as likely as the top.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Above 1: avoid recent tokens.")] = None,
    max_tokens: Annotated[int | None, typer.Option(help="Length of an answer at most.")] = None,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same answer.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End the answer before this text; may be repeated.")] = None,
    serve: Annotated[bool, typer.Option("--serve", help="Offer the chat in a browser, on this machine.")] = False,
    host: Annotated[str, typer.Option(help="With --serve: the address to listen on.")] = "localhost",
    port: Annotated[int, typer.Option(min=1, max=65_535, help="With --serve: the port.")] = 8020,
    fake: Annotated[bool, typer.Option("--fake", help="Look around: a script answers, no model is needed.")] = False,
    provider: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    threads: Annotated[int | None, typer.Option(help="Threads of an operator. Default: physical cores.")] = None,
) -> None:
    """Chat with a bundle, in the terminal or in a browser, or ask it once. What is not given is the model's own."""
    given = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "max_tokens": max_tokens,
        "seed": seed,
        "stop": tuple(stop) if stop else None,
    }
    changes = {name: value for name, value in given.items() if value is not None}
    whole = ask is None and not plain
    if (serve or fake) and not whole:
        raise typer.Exit(run(lambda: _refuse("--serve and --fake are of the whole chat: leave out --ask and --plain")))
    if whole and (serve or fake or _on_screen()):
        choice = None if fake else (bundle, precision, provider, threads, draft)
        raise typer.Exit(run(lambda: _application(choice, changes, system, (host, port) if serve else None)))
    words = (bundle, ask, plain, save, stdin, precision, draft, system, changes, provider, threads)
    raise typer.Exit(run(lambda: _chat(*words)))


def _refuse(why: str) -> None:
    from llm_edge.runtime.errors import ParameterError

    raise ParameterError(why)


def _on_screen() -> bool:
    """Whether there is a screen for the application, and what it needs."""
    import importlib.util

    # The application draws on stderr; what textual-serve starts has a browser's page, whatever its streams are.
    streams = (sys.stdin, sys.stdout, sys.stderr)
    whole = all(stream is not None and stream.isatty() for stream in streams) and os.environ.get("TERM") != "dumb"
    return (whole or "TEXTUAL_DRIVER" in os.environ) and importlib.util.find_spec("textual") is not None


def _application(
    choice: tuple[Path, str | None, str, int | None, Path | None] | None,
    changes: dict[str, Any],
    system: str | None,
    where: tuple[str, int] | None,
) -> None:
    from llm_edge.runtime.errors import InputError
    from llm_edge.runtime.sampling.params import SamplingParams

    SamplingParams(**changes)  # a wrong parameter is told before the screen is taken
    if choice is not None and choice[0] != DEFAULT_BUNDLE and not choice[0].exists():
        raise InputError(f"{choice[0]}: no such folder; make a bundle with llm-export, or name another")
    try:
        from llm_edge.chat.choice import BundleChoice
        from llm_edge.tui import start
    except ImportError as e:
        raise InputError(f"the chat on a whole screen needs {e.name}: pip install 'llm-edge[tui]', or --plain") from e
    if where is None and not _on_screen():
        raise InputError("--fake fills a terminal, which this is not: open it in one, or add --serve")
    if where is not None:
        start.serve([word for word in sys.argv[1:] if word != "--serve"], *where)
    else:
        raise typer.Exit(start.chat(BundleChoice(*choice) if choice is not None else None, changes, system))


def _chat(
    bundle: Path,
    ask: str | None,
    plain: bool,  # noqa: ARG001 (the only chat there is so far)
    save: bool,
    stdin: bool | None,
    precision: str | None,
    draft: Path | None,
    system: str | None,
    changes: dict[str, Any],
    provider: str,
    threads: int | None,
) -> None:
    import dataclasses
    import io

    from llm_edge.chat.text import printable
    from llm_edge.runtime.errors import BundleError, InputError, ParameterError
    from llm_edge.runtime.sampling.params import SamplingParams
    from llm_edge.tui.plain import HINT, PlainChat
    from llm_edge.tui.standard_input import StandardInput

    if sys.stdout is None:
        raise InputError("stdout is closed, so an answer has nowhere to go: open it, or send it to a file")
    SamplingParams(**changes)  # a wrong parameter is told before a model loads
    if ask is not None and not ask.strip():
        raise ParameterError("--ask is empty: give a question")
    if ask is None and stdin is not None:
        raise ParameterError("--stdin and --no-stdin go with --ask: give a question, or leave them out")
    if bundle == DEFAULT_BUNDLE and not bundle.exists():
        raise BundleError(f"{bundle} is not there yet: make it with 'llm-export smollm2', or name another bundle")
    from llm_edge.runtime.model import Model

    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper):  # bytes that are no text, and text that a locale lacks
            stream.reconfigure(errors=errors)
    store = _store() if save else None
    given = StandardInput(sys.stdin, stdin) if ask is not None else None
    model = Model.load(bundle, precision, provider=provider, threads=threads, draft=draft)
    params = dataclasses.replace(model.default_params, **changes)
    kept = _kept(store, model, system) if store is not None else None
    if ask is not None and given is not None:
        _ask(model, params, system, ask, given.text(_note), kept)
        return
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        print(printable(f"{model.bundle.name}, {model.precision.name}, on {model.provider}. {HINT}\n"))
    reasoning = sys.stdout if interactive else _watched_errors()
    session = PlainChat(
        model, params, system, sys.stdout, sys.stderr, reasoning=reasoning, interactive=interactive, kept=kept
    )
    worst = session.run(_lines() if interactive else sys.stdin)
    if kept is not None and kept.error is not None:
        worst = max(worst, kept.error.exit_code)
    if worst and not interactive:
        raise typer.Exit(worst)


def _ask(
    model: Model,
    params: SamplingParams,
    system: str | None,
    question: str,
    context: str | None,
    kept: ConversationRecorder | None,
) -> None:
    from llm_edge.runtime.errors import ContextLengthError
    from llm_edge.tui.plain import PlainChat
    from llm_edge.tui.standard_input import too_long, with_context

    chat = PlainChat(
        model,
        params,
        system,
        sys.stdout,
        sys.stderr,
        reasoning=_watched_errors(),
        with_figures=sys.stdout.isatty(),
        kept=kept,
    )
    try:
        chat.answer(question if context is None else with_context(context, question), about=question)
    except ContextLengthError as error:
        if context is None:
            raise
        raise too_long(context, error.prompt_tokens, error.limit) from error
    if kept is not None and kept.error is not None:
        raise typer.Exit(kept.error.exit_code)


def _store() -> Store:
    """Where the chat keeps its conversations."""
    from llm_edge.runtime.errors import InputError

    try:
        from llm_edge.chat.history.store import Store, default_path
    except ImportError as e:
        raise InputError(f"--save needs {e.name}: pip install 'llm-edge[tui]'") from e
    return Store(default_path())


def _kept(store: Store, model: Model, system: str | None) -> ConversationRecorder:
    from llm_edge.chat.recorder import ConversationRecorder

    return ConversationRecorder(
        store, model.bundle.name, model.precision.name, model.default_params, system or "", _note
    )


def _note(text: str) -> None:
    from llm_edge.chat.text import printable

    print(printable(text), file=sys.stderr, flush=True)


def _watched_errors() -> TextIO | None:
    """Stderr where somebody sees it: the place for reasoning, where stdout is for answers alone."""
    return sys.stderr if sys.stderr.isatty() else None


def _lines() -> Iterator[str]:
    """Lines of a terminal, with the editing keys and the history of readline where it is there."""
    import contextlib

    with contextlib.suppress(ImportError):
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")  # several lines at once are one question
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()  # so that the shell begins a line of its own
            return
        except KeyboardInterrupt:
            print()
            raise


def main() -> None:
    """Entry point of `llm-chat`."""
    if sys.stdin is None:  # as Python has it where it was closed before the start
        sys.stdin = Path(os.devnull).open(encoding="utf-8")  # noqa: SIM115 (for the life of the process)
    if sys.stderr is None:
        sys.stderr = Path(os.devnull).open("w", encoding="utf-8")  # noqa: SIM115
    app()
