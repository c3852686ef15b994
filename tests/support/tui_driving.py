"""Drives the chat application with a fake model using Textual's pilot."""

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
    """Run a test scene."""
    asyncio.run(scene)


async def until(pilot: Pilot[Any], condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Wait until a condition is met."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "timed out"
        await pilot.pause(0.02)


@contextlib.asynccontextmanager
async def app_with(
    folder: Path,
    *answers: Said | str,
    size: tuple[int, int] = (100, 30),
    pause: float = 0.0,
    context_length: int = 4096,
) -> AsyncIterator[Driven]:
    """The application, with its fake model loaded."""
    fake = FakeResponder(*answers, pause=pause, context_length=context_length)
    app = ChatApp(Store(folder / "chats.db"), lambda: fake, Settings(folder))
    async with app.run_test(size=size, notifications=True) as pilot:
        await until(pilot, lambda: app.session.responder is not None)
        await pilot.pause()
        yield app, pilot, fake


async def ask(pilot: Pilot[Any], text: str, *, wait: bool = True) -> None:
    """Ask a question and wait until it is answered."""
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
    """The mounted messages."""
    return app.query_one(ConversationView).views


def shown(view: MessageView) -> str:
    """The visible text of a message."""
    return "\n".join(view.render_line(y).text.rstrip() for y in range(view.size.height))


def screen(app: ChatApp) -> str:
    """The visible text of the screen."""
    width, height = app.size
    lines = app.screen._compositor.render_strips()
    assert len(lines) == height
    return "\n".join(line.text[:width].rstrip() for line in lines)
