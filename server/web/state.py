"""`WebState`: what the page's handlers share: the store of conversations and the user's settings."""

from __future__ import annotations

import asyncio
import tempfile
from dataclasses import dataclass
from pathlib import Path

from fastapi import Request
from starlette.concurrency import run_in_threadpool

from llm_edge.chat.history.store import Store, default_path
from llm_edge.chat.presets import Presets
from llm_edge.chat.questions import QUICK, QUICK_SECTION, Questions
from llm_edge.chat.settings import Settings
from llm_edge.runtime.errors import LlmEdgeError
from llm_edge.server.state import ServerState
from llm_edge.server.web.chats import LiveChats


@dataclass(frozen=True)
class WebState:
    """What the page's handlers share.

    Attributes:
        chats: the conversations.
        presets: named parameter values.
        questions: the quick questions.
        note: why conversations or settings are lost when the server stops; "" if they are kept.
    """

    chats: LiveChats
    presets: Presets
    questions: Questions
    note: str


class WebOpener:
    """Opens the `WebState` of a server when the page is first used: a server of programs needs no store."""

    def __init__(self, server: ServerState) -> None:
        self._server = server
        self._lock = asyncio.Lock()
        self._opened: WebState | None = None
        self._folder: tempfile.TemporaryDirectory[str] | None = None

    async def state(self) -> WebState:
        """The state, opened at the first call."""
        async with self._lock:
            if self._opened is None:
                self._opened = await run_in_threadpool(self._open)
                self._server.spawn(self._end_streams(self._opened.chats))
            return self._opened

    async def close(self) -> None:
        """Save the answers that the shutdown ended, and close the store."""
        if self._opened is not None:
            await self._opened.chats.close()
        if self._folder is not None:
            self._folder.cleanup()

    async def _end_streams(self, chats: LiveChats) -> None:
        await self._server.closing.wait()
        chats.end_streams()

    def _open(self) -> WebState:
        note = ""
        try:
            store = Store(default_path())
        except (LlmEdgeError, OSError) as error:
            note = f"Conversations are lost when the server stops: {error}"
            store = Store(self._temporary() / "conversations.sqlite3")
        try:
            settings = Settings()
        except LlmEdgeError as error:
            note = note or f"Settings are lost when the server stops: {error}"
            settings = Settings(self._temporary())
        chats = LiveChats(store, self._server.pool, self._server.spawn)
        return WebState(chats, Presets(settings), Questions(settings, QUICK_SECTION, QUICK), note)

    def _temporary(self) -> Path:
        if self._folder is None:
            self._folder = tempfile.TemporaryDirectory(prefix="llm-edge-")
        return Path(self._folder.name)


async def web_state(request: Request) -> WebState:
    """The page's state of the application that a request belongs to."""
    opener = request.app.state.web
    assert isinstance(opener, WebOpener)
    return await opener.state()
