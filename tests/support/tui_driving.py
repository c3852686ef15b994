"""The chat application with a script for a model, driven by Textual's pilot."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

from textual.pilot import Pilot

from llm_edge.chat.fake import FakeResponder, Said
from llm_edge.chat.history.store import Store
from llm_edge.chat.settings import Settings
from llm_edge.tui.app import ChatApp
from llm_edge.tui.widgets.composer import Composer
from llm_edge.tui.widgets.conversation_view import ConversationView
from llm_edge.tui.widgets.message_view import MessageView

Driven = tuple[ChatApp, Pilot[None], FakeResponder]


def drive(scene: Coroutine[Any, Any, None]) -> None:
    """Play a scene to its end."""
    asyncio.run(scene)


async def until(pilot: Pilot[Any], condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "what was waited for has not come"
        await pilot.pause(0.02)


@contextlib.asynccontextmanager
async def app_with(
    folder: Path, *said: Said | str, size: tuple[int, int] = (100, 30), pause: float = 0.0, context_length: int = 4096
) -> AsyncIterator[Driven]:
    """The application, its script loaded."""
    fake = FakeResponder(*said, pause=pause, context_length=context_length)
    app = ChatApp(Store(folder / "chats.db"), lambda: fake, Settings(folder))
    async with app.run_test(size=size, notifications=True) as pilot:
        await until(pilot, lambda: app.session.responder is not None)
        await pilot.pause()
        yield app, pilot, fake


async def ask(pilot: Pilot[Any], text: str, *, wait: bool = True) -> None:
    """Write a question, send it, and wait for the end of its answer."""
    app = pilot.app
    assert isinstance(app, ChatApp)
    app.query_one(Composer).write(text)
    before = len(app.session.conversation.messages)
    await pilot.press("enter")
    await until(pilot, lambda: len(app.session.conversation.messages) > before)
    if wait:
        await until(pilot, lambda: app.session.answering is None)
        await pilot.pause()


def views(app: ChatApp) -> list[MessageView]:
    """The messages on the screen."""
    return app.query_one(ConversationView).views


def shown(view: MessageView) -> str:
    """What a message shows, as text."""
    return "\n".join(view.render_line(y).text.rstrip() for y in range(view.size.height))


def screen(app: ChatApp) -> str:
    """What the whole screen shows, as text."""
    width, height = app.size
    lines = app.screen._compositor.render_strips()
    assert len(lines) == height
    return "\n".join(line.text[:width].rstrip() for line in lines)
