"""The files of the panel of conversations: asks for their names, and writes or reads them beside the screen."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from textual.app import App

from llm_edge.chat.history import transcript
from llm_edge.chat.history.importing import import_file
from llm_edge.chat.history.search import Summary
from llm_edge.chat.history.store import Store
from llm_edge.chat.text import printable
from llm_edge.runtime.errors import LlmEdgeError
from llm_edge.tui.screens.dialogs import AskText, AskYesNo
from llm_edge.tui.widgets.history_list import file_name

_TELL_EVERY = 100  # conversations


async def export(app: App[Any], store: Store, summary: Summary) -> None:
    """Write a conversation to a file whose name is asked for; never over one that is there without asking."""
    proposed, refusal = file_name(summary.title), ""
    while True:
        asked = AskText(
            "Export to",
            proposed,
            accept="Export",
            help_text=".json keeps everything and can be imported again; any other name is Markdown.",
            refusal=refusal,
        )
        name = await app.push_screen_wait(asked)
        if name is None:
            return
        overwrite = await asyncio.to_thread(_is_there, name)
        if overwrite and not await app.push_screen_wait(AskYesNo(f"{name} is there already. Replace it?", "Replace")):
            return
        try:
            await asyncio.to_thread(_write, store, summary.id, name, overwrite)
        except LlmEdgeError as error:
            proposed, refusal = name, str(error)
        else:
            _say(app, f"Exported to {name}")
            return


async def import_conversations(app: App[Any], store: Store, tell: Callable[[str], None]) -> None:
    """Take in conversations from a file whose name is asked for; `tell` hears how far it is."""
    asked = AskText(
        "Import",
        accept="Import",
        placeholder="~/Downloads/chatgpt-export.zip",
        help_text="The zip that ChatGPT sends, the conversations.json in it, or a .json exported here.",
    )
    name = await app.push_screen_wait(asked)
    if name is None:
        return
    tell(f"importing {name} …")
    loop, ended = asyncio.get_running_loop(), False

    def told(count: int) -> bool:
        if count % _TELL_EVERY == 0 and not ended:
            loop.call_soon_threadsafe(tell, f"importing … {count:,} conversations")
        return not ended

    try:
        imported = await asyncio.to_thread(partial(import_file, name, store, told))
    except LlmEdgeError as error:
        _say(app, str(error), "error")
    else:
        count = imported.conversations
        what = "1 conversation" if count == 1 else f"{count:,} conversations"
        odd = f" {imported.unreadable:,} made no sense and were left out." if imported.unreadable else ""
        _say(app, f"{what} imported.{odd}")
    finally:
        ended = True  # the application ends: so does the thread, at the next conversation


def _write(store: Store, number: int, name: str, overwrite: bool) -> None:
    transcript.save(name, store.load(number), overwrite=overwrite)


def _is_there(name: str) -> bool:
    try:
        return Path(os.path.expanduser(name)).is_file()  # noqa: PTH111 (Path's own refuses a ~ of nobody)
    except (OSError, ValueError):
        return False


def _say(app: App[Any], text: str, severity: str = "information") -> None:
    app.notify(printable(text), severity=severity, markup=False)  # type: ignore[arg-type]
