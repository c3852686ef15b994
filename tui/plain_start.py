"""Runs `llm-chat --ask` and `llm-chat --plain`."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any, TextIO

from llm_edge.chat.choice import open_responder
from llm_edge.chat.history.store import InMemoryStore, Store, default_path
from llm_edge.chat.parameters import ChatParameters, as_json_values
from llm_edge.chat.responder import LocalResponder, Responder
from llm_edge.chat.session import ChatSession
from llm_edge.chat.text import printable
from llm_edge.runtime.errors import ContextLengthError, InputError
from llm_edge.tui.plain import HINT, PlainChat
from llm_edge.tui.standard_input import StandardInput, too_long, with_context

if TYPE_CHECKING:
    from llm_edge.tui.cli import ChatOptions


def chat(options: ChatOptions, sampling: Mapping[str, Any]) -> int:
    """Answer one question, or lines of standard input; returns the exit code."""
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper):  # bytes that are not text, and text that the locale lacks
            stream.reconfigure(errors=errors)
    choice = options.choice()
    assert choice is not None
    store = Store(default_path()) if options.save or options.continue_ else InMemoryStore()
    try:
        context = StandardInput(sys.stdin, options.stdin) if options.ask is not None else None
        responder = open_responder(choice)
        system = {"system": options.system} if options.system else {}
        given = {**as_json_values(sampling), **system}
        session = ChatSession(store, ChatParameters(responder.default_params, given))
        session.set_responder(responder)
        if options.continue_:
            _continue_latest(session, given)
        if options.ask is not None and context is not None:
            return _ask(session, options.ask, context.text(_note))
        return _lines(session, responder)
    finally:
        store.close()


def _continue_latest(session: ChatSession, given: Mapping[str, Any]) -> None:
    """Show the latest conversation; what the command line sets replaces its parameters."""
    if not session.open_latest():
        raise InputError("--continue: there is no conversation yet: leave it out for the first one")
    session.apply_change(lambda parameters: parameters.load({**parameters.changed, **given}))


def _ask(session: ChatSession, question: str, context: str | None) -> int:
    chat = PlainChat(session, sys.stdout, sys.stderr, reasoning=_stderr_if_watched(), with_figures=sys.stdout.isatty())
    try:
        chat.ask(question if context is None else with_context(context, question), title=question)
    except ContextLengthError as error:
        if context is None:
            raise
        raise too_long(context, error) from error
    return chat.save_error.exit_code if chat.save_error is not None else 0


def _lines(session: ChatSession, responder: Responder) -> int:
    interactive = sys.stdin.isatty() and sys.stdout.isatty()
    if interactive:
        where = f"{responder.detail}, on {responder.provider}" if isinstance(responder, LocalResponder) else ""
        print(printable(f"{responder.name}, {where or responder.detail}. {HINT}\n"))
    reasoning = sys.stdout if interactive else _stderr_if_watched()
    chat = PlainChat(session, sys.stdout, sys.stderr, reasoning=reasoning, interactive=interactive)
    code = chat.run(_typed_lines() if interactive else sys.stdin)
    return 0 if interactive else code


def _note(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)


def _stderr_if_watched() -> TextIO | None:
    """Stderr if it is a terminal: reasoning is shown there, while stdout receives only the answer."""
    return sys.stderr if sys.stderr.isatty() else None


def _typed_lines() -> Iterator[str]:
    """Lines typed in a terminal, edited with readline where it is available."""
    import contextlib

    with contextlib.suppress(ImportError):
        import readline

        readline.parse_and_bind("set enable-bracketed-paste on")  # several pasted lines are one question
    while True:
        try:
            yield input("> ")
        except EOFError:
            print()  # so that the shell's prompt starts a line
            return
        except KeyboardInterrupt:
            print()
            raise
