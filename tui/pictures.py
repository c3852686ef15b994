"""`python -m llm_edge.tui.pictures BUNDLE FOLDER`: pictures of the chat's screens, as SVG; `make pictures`.

The scenes are played in the application itself, without a terminal; tests play them with a script for a model.
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

SIZES = ((80, 24), (120, 36))
_RATES = [20.0, 30.0, 40.0, 45.0, 44.0, 46.0, 45.0, 44.0, 46.0, 45.0]  # tokens a second, for the picture of the speed
_PATIENCE = 120.0  # seconds that anything may take
_CODE = "Write a Python function that adds two numbers."


class Stage:
    """The application, and how to play on it."""

    def __init__(self, app: ChatApp, pilot: Pilot[None]) -> None:
        self.app = app
        self._pilot = pilot

    async def until(self, condition: Callable[[], object]) -> None:
        """Wait until something holds.

        Raises:
            MachineError: it does not, for long.
        """
        end = time.monotonic() + _PATIENCE
        while not condition():
            if time.monotonic() > end:
                raise MachineError("a scene of the chat does not go on")
            await self._pilot.pause(0.05)
        await self._pilot.pause()

    async def press(self, *keys: str) -> None:
        """Press keys."""
        await self._pilot.press(*keys)
        await self._pilot.pause(0.3)

    async def ask(self, question: str) -> None:
        """Ask, and wait for the answer's end."""
        session = self.app.session
        self.app.composer.write(question)
        before = len(session.conversation.messages)
        await self.press("enter")
        await self.until(lambda: len(session.conversation.messages) > before and session.answering is None)

    async def settle(self) -> None:
        """Let the screen be what it is whenever it is played."""
        self.app.clear_notifications()
        if self.app.sampling is not None:
            self.app.sampling.stop()
        self.app.instruments.speed(_RATES)
        await self._pilot.pause(0.3)


Scene = Callable[[Stage], Awaitable[None]]


async def _conversation(stage: Stage) -> None:
    for name, value in (("temperature", 0.0), ("max_tokens", 200)):
        stage.app.session.parameters.set(name, value)
    await stage.ask("What is the capital of France?")
    await stage.ask(_CODE)


async def _parameters(stage: Stage) -> None:
    await stage.ask("What is the capital of France?")
    await stage.press("f3", "up", "up")


async def _history(stage: Stage) -> None:
    await stage.ask("Tell me a joke")
    await stage.press("ctrl+n")
    await stage.ask("What is the fastest animal?")
    await stage.press("f2")
    await stage.until(lambda: stage.app.history.has_class("open"))


async def _questions(stage: Stage) -> None:
    await stage.press("f5")


async def _tokens(stage: Stage) -> None:
    stage.app.session.parameters.set("logprobs", 5)
    await stage.ask("What is the capital of France?")
    await stage.press("f6")
    await stage.press("right", "right")


async def _compare(stage: Stage) -> None:
    stage.app.composer.write("What is the capital of France?")
    await stage.press("f7")


async def _models(stage: Stage) -> None:
    await stage.press("f4")


async def _help(stage: Stage) -> None:
    await stage.press("f1")


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


async def play(
    scene: Scene, responder: Responder, size: tuple[int, int], look: Callable[[ChatApp], Any], theme: str | None = None
) -> Any:
    """Play a scene in a new application with nothing kept; returns what `look` makes of it."""
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "conversations.sqlite3") as store:
        app = ChatApp(store, lambda: responder, Settings(Path(folder)))
        async with app.run_test(size=size) as pilot:
            stage = Stage(app, pilot)
            await stage.until(lambda: app.session.responder is not None)
            if theme is not None:
                app.theme = theme
            await scene(stage)
            await stage.settle()
            return look(app)


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and draw."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--precision")
    parser.add_argument("--scenes", nargs="+", default=["conversation", "parameters", "tokens"], choices=SCENES)
    options = parser.parse_args(arguments)

    def draw() -> None:
        responder = LocalResponder(Model.load(options.bundle, options.precision))
        options.folder.mkdir(parents=True, exist_ok=True)
        for name in options.scenes:
            svg = asyncio.run(play(SCENES[name], responder, SIZES[-1], lambda app: app.export_screenshot()))
            path = options.folder / f"{name}.svg"
            path.write_text(svg, encoding="utf-8")
            print(path)

    sys.exit(run(draw))


if __name__ == "__main__":
    main()
