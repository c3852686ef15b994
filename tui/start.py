"""Starts the full-screen chat in this terminal or serves it to browsers."""

from __future__ import annotations

import contextlib
import functools
import os
import shlex
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import Any

from llm_edge.chat.choice import Choice, open_responder, remember
from llm_edge.chat.fake import FakeResponder
from llm_edge.chat.history.store import Store, default_path
from llm_edge.chat.parameters import EDITABLE, as_json_values
from llm_edge.chat.responder import Responder
from llm_edge.chat.settings import Settings
from llm_edge.runtime.errors import InputError, MachineError
from llm_edge.runtime.installation import install_hint
from llm_edge.tui.app import ChatApp

_FIXED_SIZE = ("COLUMNS", "LINES")
"""Environment variables that some shells export; with them, the screen would not follow the size of the window."""


def chat(choice: Choice | None, sampling: Mapping[str, Any], system: str | None, *, continue_: bool = False) -> int:
    """Open the application; returns its exit code. Without a choice of a model, a script answers.

    `continue_`: show the latest conversation.
    """
    changed = as_json_values(sampling)
    if system:
        changed["system"] = system
    if "TEXTUAL_DRIVER" not in os.environ:  # textual-serve passes the page's size in them
        for name in _FIXED_SIZE:
            os.environ.pop(name, None)
    store, settings = Store(default_path()), Settings()
    load = functools.partial(_open, choice, settings) if choice is not None else lambda: FakeResponder(pause=0.02)
    try:
        app = ChatApp(store, load, settings, {name: changed[name] for name in changed if name in EDITABLE})
        if continue_:
            app.session.open_latest()
        app.run()
    finally:
        store.close()
        _leave_terminal()
    return app.return_code or 0


def _open(choice: Choice, settings: Settings) -> Responder:
    """Open a model, and list it first from now on."""
    responder = open_responder(choice)
    with contextlib.suppress(MachineError):  # reported when the user changes a setting
        remember(choice, settings)
    return responder


def _leave_terminal() -> None:
    """End the process if Textual's input thread does not end.

    A closing terminal sends SIGHUP and SIGCONT. Textual takes SIGCONT for a return from the background and starts to
    read the terminal again; that thread reads its end forever, and the process would wait for it.
    """
    for thread in threading.enumerate():
        if thread.name == "textual-input":
            thread.join(timeout=1.0)
            if thread.is_alive():
                os._exit(130)


def serve(arguments: Sequence[str], host: str, port: int) -> None:
    """Serve the application to browsers, with one process per visitor.

    Raises:
        InputError: textual-serve is not installed, or the address cannot be used.
    """
    try:
        from llm_edge.tui import browser
    except ImportError as e:
        raise InputError(f"--serve needs {e.name}: {install_hint('tui')}") from e
    browser.serve(shlex.join([sys.executable, "-m", "llm_edge.tui", *arguments]), host, port)
