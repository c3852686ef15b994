"""Exporting and importing conversations, with the dialogs that ask for the file."""

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
from llm_edge.runtime.errors import LlmEdgeError
from llm_edge.tui.notifications import notify
from llm_edge.tui.screens.dialogs import ConfirmDialog, TextPrompt
from llm_edge.tui.widgets.conversation_list import file_name

_REPORT_EVERY = 100  # conversations


async def export_conversation(app: App[Any], store: Store, summary: Summary) -> None:
    """Ask for a file and write a conversation to it; asks again before replacing a file."""
    proposed, problem = file_name(summary.title), ""
    while True:
        prompt = TextPrompt(
            "Export to",
            proposed,
            accept="Export",
            help_text="A .json file holds everything and can be imported again; other names give Markdown.",
            error=problem,
        )
        name = await app.push_screen_wait(prompt)
        if name is None:
            return
        overwrite = await asyncio.to_thread(_exists, name)
        if overwrite and not await app.push_screen_wait(
            ConfirmDialog(f"{name} already exists. Replace it?", "Replace")
        ):
            return
        try:
            await asyncio.to_thread(_write, store, summary.id, name, overwrite)
        except LlmEdgeError as error:
            proposed, problem = name, str(error)
        else:
            notify(app, f"Exported to {name}")
            return


async def import_conversations(app: App[Any], store: Store, report: Callable[[str], None]) -> None:
    """Ask for a file and import its conversations; `report` is called with the progress."""
    prompt = TextPrompt(
        "Import",
        accept="Import",
        placeholder="~/Downloads/chatgpt-export.zip",
        help_text="A ChatGPT export (.zip or conversations.json), or an llm-edge export (.json).",
    )
    name = await app.push_screen_wait(prompt)
    if name is None:
        return
    report(f"Importing {name} …")
    loop, ended = asyncio.get_running_loop(), False

    def imported_so_far(count: int) -> bool:
        if count % _REPORT_EVERY == 0 and not ended:
            loop.call_soon_threadsafe(report, f"Importing … {count:,} conversations")
        return not ended

    try:
        imported = await asyncio.to_thread(partial(import_file, name, store, imported_so_far))
    except LlmEdgeError as error:
        notify(app, str(error), "error")
    else:
        count = imported.conversations
        conversations = "1 conversation" if count == 1 else f"{count:,} conversations"
        skipped = f" Skipped {imported.unreadable:,} that could not be read." if imported.unreadable else ""
        notify(app, f"Imported {conversations}.{skipped}")
    finally:
        ended = True  # if the application quits, the thread stops at the next conversation


def _write(store: Store, number: int, name: str, overwrite: bool) -> None:
    transcript.save(name, store.load(number), overwrite=overwrite)


def _exists(name: str) -> bool:
    try:
        return Path(os.path.expanduser(name)).is_file()  # noqa: PTH111 (Path.expanduser raises for unknown users)
    except (OSError, ValueError):
        return False
