"""Writes screenshots of the chat as SVG: `python docs/screenshots.py BUNDLE docs/pictures` (`make pictures`).

Scenes are played in the real application without a terminal; the snapshot tests play them with a fake model.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from textual.pilot import Pilot

from llm_edge.chat.history.store import Store
from llm_edge.chat.responder import LocalResponder, Responder
from llm_edge.chat.settings import Settings
from llm_edge.runtime.command import run
from llm_edge.runtime.errors import MachineError
from llm_edge.runtime.model import Model
from llm_edge.tui.app import ChatApp

SIZES = ((80, 24), (120, 36))  # columns, lines
_PICTURE = (112, 28)  # columns, lines of the README's pictures
_RATES = [20.0, 30.0, 40.0, 45.0, 44.0, 46.0, 45.0, 44.0, 46.0, 45.0]  # tokens per second shown in the status bar
_TIMEOUT = 120.0  # seconds
_CODE_QUESTION = "Write a Python function that adds two numbers."


class ScenePlayer:
    """Drives the application in a scene.

    Args:
        app: the application.
        pilot: presses its keys.
    """

    def __init__(self, app: ChatApp, pilot: Pilot[None]) -> None:
        self.app, self.chat = app, app.chat_screen
        self._pilot = pilot

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait for a condition.

        Raises:
            MachineError: it was not met in time.
        """
        end = time.monotonic() + _TIMEOUT
        while not condition():
            if time.monotonic() > end:
                raise MachineError("a scene of the chat has timed out")
            await self._pilot.pause(0.05)
        await self._pilot.pause()

    async def press(self, *keys: str) -> None:
        """Press keys."""
        await self._pilot.press(*keys)
        await self._pilot.pause(0.3)

    async def ask(self, question: str) -> None:
        """Ask a question and wait for the answer."""
        session = self.app.session
        self.chat.composer.write(question)
        before = len(session.conversation.messages)
        await self.press("enter")
        await self.until(lambda: len(session.conversation.messages) > before and session.answering is None)

    async def settle(self) -> None:
        """Remove everything from the screen that depends on timing."""
        self.app.clear_notifications()
        if self.chat.status_bar.sampling is not None:
            self.chat.status_bar.sampling.stop()
        self.chat.status_bar.show_speed(_RATES)
        await self._pilot.pause(0.3)


Scene = Callable[[ScenePlayer], Awaitable[None]]


async def _conversation(player: ScenePlayer) -> None:
    for name, value in (("temperature", 0.0), ("max_tokens", 200)):
        player.app.session.parameters.set(name, value)
    await player.ask("What is the capital of France?")
    await player.ask(_CODE_QUESTION)


async def _parameters(player: ScenePlayer) -> None:
    player.app.session.parameters.set("seed", 1)
    await player.ask("What is the capital of France?")
    await player.press("f3", "right", "right")


async def _history(player: ScenePlayer) -> None:
    await player.ask("Tell me a joke")
    await player.press("ctrl+n")
    await player.ask("What is the fastest animal?")
    await player.press("f2")
    await player.until(lambda: player.chat.history.has_class("open"))


async def _questions(player: ScenePlayer) -> None:
    await player.press("f5")


async def _tokens(player: ScenePlayer) -> None:
    player.app.session.parameters.set("logprobs", 5)
    await player.ask("What is the capital of France?")
    await player.press("f6")
    await player.press("right", "right")


async def _compare(player: ScenePlayer) -> None:
    player.chat.composer.write("What is the capital of France?")
    await player.press("f7")


async def _models(player: ScenePlayer) -> None:
    await player.press("f4")


async def _help(player: ScenePlayer) -> None:
    await player.press("f1")


SCENES: Mapping[str, Scene] = {
    "conversation": _conversation,
    "parameters": _parameters,
    "history": _history,
    "questions": _questions,
    "tokens": _tokens,
    "compare": _compare,
    "models": _models,
    "help": _help,
}


async def play_scene(
    scene: Scene,
    responder: Responder,
    size: tuple[int, int],
    capture: Callable[[ChatApp], Any],
    theme: str | None = None,
) -> Any:
    """Play a scene in a new application with an empty history; returns what `capture` returns."""
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "conversations.sqlite3") as store:
        app = ChatApp(store, lambda: responder, Settings(Path(folder)))
        async with app.run_test(size=size) as pilot:
            player = ScenePlayer(app, pilot)
            await player.until(lambda: app.session.responder is not None)
            if theme is not None:
                app.theme = theme
            await scene(player)
            await player.settle()
            return capture(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point: parse the arguments and write the screenshots."""
    parser = argparse.ArgumentParser(description="Write screenshots of the chat as SVG.")
    parser.add_argument("bundle", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precision")
    parser.add_argument("--scenes", nargs="+", default=["conversation", "parameters", "tokens"], choices=SCENES)
    options = parser.parse_args(arguments)

    def write_all() -> None:
        responder = LocalResponder(Model.load(options.bundle, options.precision))
        options.folder.mkdir(parents=True, exist_ok=True)
        for name in options.scenes:
            svg = asyncio.run(play_scene(SCENES[name], responder, _PICTURE, lambda app: app.export_screenshot()))
            path = options.folder / f"{name}.svg"
            path.write_text(svg, encoding="utf-8")
            print(path)

    sys.exit(run(write_all))


if __name__ == "__main__":
    main()
