"""Exports in the background of the chat: progress, success, failure, cancelling, and quitting."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from test_export_screen import gone, stage, value
from textual.command import CommandPalette
from textual.widgets import Checkbox, Input, OptionList
from tui_driving import app_with, ask, drive, screen, until

from llm_edge.chat.export_process import ExportRequest
from llm_edge.chat.history.store import Store
from llm_edge.chat.responder import LocalResponder, Responder
from llm_edge.chat.settings import Settings
from llm_edge.runtime.errors import InputError
from llm_edge.tui.app import ChatApp
from llm_edge.tui.screens.endpoint import EndpointScreen
from llm_edge.tui.screens.export import ExportScreen
from llm_edge.tui.screens.models import ModelsScreen

BEGUN = "open('begun', 'a').write(f'{os.getpid()} ')\n"
WAIT = "while not os.path.exists('go'): time.sleep(0.01)\n"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Runs these lines of Python instead of `llm-export`."""
    return lambda code: monkeypatch.setattr(
        "llm_edge.chat.export_process._COMMAND", f"import json, os, signal, sys, time\n{BEGUN}{code}"
    )


def done(bundle: Path) -> str:
    return f"print(json.dumps({{'stage': 'done', 'path': {str(bundle)!r}}}), flush=True)\n"


def started(place: Path) -> list[int]:
    """The process ids started so far."""
    noted = place / "begun"
    return [int(each) for each in noted.read_text().split()] if noted.exists() else []


async def open_models(app: ChatApp, pilot: Any) -> ModelsScreen:
    await pilot.press("f4")
    await until(pilot, lambda: isinstance(app.screen, ModelsScreen) and app.screen._entries)
    await pilot.pause()
    assert isinstance(app.screen, ModelsScreen)
    return app.screen


async def write(app: ChatApp, pilot: Any, field: str, text: str) -> None:
    """Fill in a field without typing, and press Enter in it."""
    app.screen.query_one(field, Input).value = text
    app.screen.query_one(field).focus()
    await pilot.pause()
    await pilot.press("enter")


async def open_export(app: ChatApp, pilot: Any, typed: str = "") -> None:
    await open_models(app, pilot)
    await write(app, pilot, "#filter", typed)
    await until(pilot, lambda: isinstance(app.screen, ExportScreen) and app.screen.query("#error"))
    await pilot.pause()


async def export_in_background(app: ChatApp, pilot: Any, place: Path, key: str = "ctrl+b") -> None:
    """Start an export of owner/name and return to the conversation."""
    await open_export(app, pilot, "hugging")
    await write(app, pilot, "#source", "owner/name")
    await until(pilot, lambda: "▸" in screen(app) and started(place))
    await pilot.press(key)
    await until(pilot, lambda: len(app.screen_stack) == 1)


def notified(app: ChatApp, text: str) -> bool:
    """Whether a notification contains the text."""
    return any(text in each.message for each in app._notifications)


@pytest.mark.parametrize(("key", "size"), [("ctrl+b", (80, 24)), ("b", (120, 40))])
def test_the_chat_works_during_an_export_whose_bundle_can_then_be_chosen(
    place: Path, tiny_bundle: Path, stand_in: Callable[[str], None], key: str, size: tuple[int, int]
) -> None:
    stand_in(stage("quantizing", 0.45) + WAIT + done(tiny_bundle))
    answer = "word " * 29 + "end"

    async def scene() -> None:
        async with app_with(place, answer, size=size, pause=0.05) as (app, pilot, fake):
            await open_export(app, pilot, "hugging")
            assert "Run in background" not in screen(app)
            await write(app, pilot, "#source", "owner/bob")
            await until(pilot, lambda: "45%" in screen(app))
            assert "Run in background" in screen(app)
            await pilot.press(key)
            await until(pilot, lambda: len(app.screen_stack) == 1)
            assert notified(app, "Exporting owner/bob in the background. Press F4 to see the progress.")
            await until(pilot, lambda: "Export: quantizing 45%" in screen(app))
            await ask(pilot, "While it works?", wait=False)
            assert app.session.answering is not None
            (place / "go").touch()
            await until(pilot, lambda: notified(app, f"Exported {tiny_bundle.name}. Press F4 to use it."))
            await until(pilot, lambda: app.session.answering is None)
            assert app.session.conversation.path()[-1].content == answer
            assert app.session.responder is fake
            await open_models(app, pilot)  # it is outside artifacts/, and highlighted nevertheless
            await pilot.press("enter")
            await until(pilot, lambda: isinstance(app.session.responder, LocalResponder))
            assert isinstance(app.session.responder, LocalResponder)
            assert app.session.responder.path == tiny_bundle

    drive(scene())


def test_every_export_row_opens_the_running_export(place: Path, stand_in: Callable[[str], None]) -> None:
    """None of them starts a second one."""
    stand_in(stage("quantizing", 0.45) + "time.sleep(600)\n")

    async def scene() -> None:
        async with app_with(place, size=(80, 24)) as (app, pilot, _):
            await export_in_background(app, pilot, place)
            models = await open_models(app, pilot)
            assert "Exporting owner/name: quantizing 45%" in models._entries[0].label.plain
            assert models.query_one("#models", OptionList).highlighted == 0
            await pilot.press("escape")
            for row in ("", "export file", "hugging", "smollm2 now", "validate", "./other.pt", "an/other"):
                await open_export(app, pilot, row)
                await until(pilot, lambda: "▸ quantizing" in screen(app))
                assert "Exporting owner/name" in screen(app)
                await pilot.press("ctrl+b")
                await until(pilot, lambda: len(app.screen_stack) == 1)
            with pytest.raises(InputError, match="still running"):
                app.exports.start(ExportRequest("second"))
            assert len(started(place)) == 1

    drive(scene())


def test_the_list_shows_the_progress_and_then_the_bundle(
    place: Path, tiny_bundle: Path, stand_in: Callable[[str], None]
) -> None:
    stand_in(stage("reading") + WAIT + stage("writing", 0.9) + WAIT.replace("go", "on") + done(tiny_bundle))

    async def scene() -> None:
        async with app_with(place, size=(100, 30)) as (app, pilot, _):
            await export_in_background(app, pilot, place)
            await open_models(app, pilot)
            assert ": reading" in screen(app)
            await write(app, pilot, "#filter", "connect")
            await until(pilot, lambda: isinstance(app.screen, EndpointScreen) and app.screen.query("#url"))
            await pilot.press("escape")
            await until(pilot, lambda: isinstance(app.screen, ModelsScreen))
            await pilot.pause()
            assert ": reading" in screen(app)
            app.screen.query_one("#filter", Input).value = "tiny"
            (place / "go").touch()
            await until(pilot, lambda: ": writing 90%" in screen(app))
            (place / "on").touch()
            await until(pilot, lambda: "Exporting" not in screen(app) and "KL" in screen(app))
            assert app.screen.query_one("#filter", Input).value == "tiny"
            await pilot.press("enter")
            await until(pilot, lambda: isinstance(app.session.responder, LocalResponder))

    drive(scene())


def test_a_running_export_can_be_reopened_and_cancelled(place: Path, stand_in: Callable[[str], None]) -> None:
    stand_in(stage("reading") + "time.sleep(600)\n")

    async def scene() -> None:
        async with app_with(place) as (app, pilot, _):
            await export_in_background(app, pilot, place)
            await open_export(app, pilot)
            await pilot.press("escape")
            await until(pilot, lambda: "was cancelled" in screen(app))
            assert all(map(gone, started(place)))
            assert app.screen.query_one("#source", Input).value == "owner/name"
            await pilot.press("escape", "escape")
            await until(pilot, lambda: len(app.screen_stack) == 1)
            models = await open_models(app, pilot)
            assert all("export of" not in row.searched for row in models._entries)  # shown once, then removed

    drive(scene())


@pytest.mark.parametrize("row", ["", "hugging"])
def test_an_error_is_reported_and_the_form_keeps_its_values(
    place: Path, tiny_bundle: Path, stand_in: Callable[[str], None], row: str
) -> None:
    stand_in(
        "open('arguments', 'w').write(json.dumps(sys.argv[1:]))\n"
        "if os.path.exists('again'):\n    " + done(tiny_bundle) + "    sys.exit()\n"
        + stage("reading") + WAIT
        + "sys.exit('error: what is it?\\x1b[2J give --n-heads N; or x exists: replace it with --force')\n"
    )  # fmt: skip

    async def scene() -> None:
        async with app_with(place, size=(100, 40)) as (app, pilot, _):
            await open_export(app, pilot, "hugging")
            for name, text in {"n-heads": "9", "config": ""}.items():
                app.screen.query_one(f"#option-{name}").display = True
                value(app, name).value = text
            app.screen.query_one("#precision-int4", Checkbox).value = True
            force = app.screen.query_one("#force", Checkbox)
            force.display = force.value = True
            await write(app, pilot, "#source", "owner/name")
            await until(pilot, lambda: "▸ reading" in screen(app))
            await pilot.press("ctrl+b")
            await until(pilot, lambda: len(app.screen_stack) == 1)
            (place / "go").touch()
            await until(pilot, lambda: notified(app, "Export of owner/name failed: what is it?[2J give --n-heads N"))
            (place / "again").touch()
            app.clear_notifications()
            models = await open_models(app, pilot)
            assert "✗ Export of owner/name failed: what is it?" in models._entries[0].label.plain
            assert models.query_one("#models", OptionList).highlighted == 0
            await write(app, pilot, "#filter", row)
            await until(pilot, lambda: isinstance(app.screen, ExportScreen) and "what is it?" in screen(app))
            shown = app.screen
            assert shown.query_one("#source", Input).value == "owner/name"
            assert (value(app, "n-heads").value, value(app, "n-heads").has_focus) == ("9", True)
            ticked = {str(each.id) for each in shown.query(Checkbox) if each.value}
            assert ticked == {"precision-int8", "precision-int4", "force"}
            assert shown.query_one("#force").display
            assert not shown.query_one("#option-adapter").display
            value(app, "n-heads").value = "3"
            await pilot.press("f10")
            await until(pilot, lambda: isinstance(app.session.responder, LocalResponder))
            arguments = json.loads((place / "arguments").read_text())
            assert arguments == [
                "--progress=json", "--precision=int8,int4", "--n-heads=3", "--force", "--", "owner/name"
            ]  # fmt: skip

    drive(scene())


def test_a_failed_export_does_not_block_another_source(place: Path, stand_in: Callable[[str], None]) -> None:
    stand_in(stage("reading") + WAIT + "sys.exit('error: no')\n")

    async def scene() -> None:
        async with app_with(place) as (app, pilot, _):
            await export_in_background(app, pilot, place, "b")
            (place / "go").touch()
            await until(pilot, lambda: notified(app, "failed: no"))
            await open_export(app, pilot, "an/other")
            assert app.screen.query_one("#source", Input).value == "an/other"
            await pilot.press("escape", "escape")
            await open_export(app, pilot)  # the first one, whose result has not been shown yet
            assert app.screen.query_one("#source", Input).value == "owner/name"
            await pilot.press("escape", "escape")
            await open_export(app, pilot, "hugging")
            assert app.screen.query_one("#source", Input).value == ""

    drive(scene())


def test_options_are_kept_for_the_second_attempt(place: Path, stand_in: Callable[[str], None]) -> None:
    stand_in("open('arguments', 'w').write(json.dumps(sys.argv[1:]))\nsys.exit('error: the network is down')\n")

    async def scene() -> None:
        async with app_with(place) as (app, pilot, _):
            await open_export(app, pilot, "smollm2 now")
            await until(pilot, lambda: "the network is down" in screen(app))
            assert "--no-validate" in json.loads((place / "arguments").read_text())
            assert app.screen.query_one("#force").display  # ticked options are visible
            (place / "arguments").unlink()
            await pilot.press("f10")
            await until(pilot, lambda: len(started(place)) == 2 and "the network is down" in screen(app))
            assert "--no-validate" in json.loads((place / "arguments").read_text())
            app.screen.query_one("#precision-int4", Checkbox).value = True
            await pilot.press("f10")
            await until(pilot, lambda: len(started(place)) == 3 and "the network is down" in screen(app))
            assert "--no-validate" not in json.loads((place / "arguments").read_text())

    drive(scene())


def test_without_a_model_the_exported_bundle_is_loaded_immediately(
    place: Path, tiny_bundle: Path, stand_in: Callable[[str], None]
) -> None:
    stand_in(stage("reading") + WAIT + done(tiny_bundle))

    def load() -> Responder:
        raise InputError("nobody is here")

    async def scene() -> None:
        app = ChatApp(Store(place / "x.db"), load, Settings(place))
        async with app.run_test(size=(80, 24), notifications=True) as pilot:
            await until(pilot, lambda: isinstance(app.screen, ModelsScreen) and app.screen._entries)
            await write(app, pilot, "#filter", "smollm2 now")
            await until(pilot, lambda: "▸ reading" in screen(app))
            await pilot.press("ctrl+b")
            await until(pilot, lambda: len(app.screen_stack) == 1)
            (place / "go").touch()
            await until(pilot, lambda: isinstance(app.session.responder, LocalResponder))
            assert app.exports.job is None

    drive(scene())


@pytest.mark.parametrize("fails", [False, True])
def test_an_export_that_ends_while_the_palette_is_open_is_shown_afterwards(
    place: Path, tiny_bundle: Path, stand_in: Callable[[str], None], fails: bool
) -> None:
    stand_in(stage("reading") + WAIT + ("sys.exit('error: out of luck')\n" if fails else done(tiny_bundle)))

    async def scene() -> None:
        async with app_with(place, size=(80, 24)) as (app, pilot, fake):
            await open_export(app, pilot, "hugging")
            await write(app, pilot, "#source", "owner/name")
            await until(pilot, lambda: "▸ reading" in screen(app))
            await pilot.press("ctrl+p")
            await until(pilot, lambda: isinstance(app.screen, CommandPalette))
            (place / "go").touch()
            await until(pilot, lambda: app.exports.job is not None and app.exports.job.ended)
            await pilot.pause()
            assert isinstance(app.screen, CommandPalette)
            assert app.session.responder is fake
            await pilot.press("escape")
            if fails:
                await until(pilot, lambda: "out of luck" in screen(app))
                assert isinstance(app.screen, ExportScreen)
            else:
                await until(pilot, lambda: isinstance(app.session.responder, LocalResponder))
                await until(pilot, lambda: len(app.screen_stack) == 1)

    drive(scene())


def test_an_export_that_ends_before_it_is_shown_is_shown_as_finished(
    place: Path, tiny_bundle: Path, stand_in: Callable[[str], None]
) -> None:
    stand_in(stage("reading") + WAIT + done(tiny_bundle))
    results: list[Any] = []

    async def scene() -> None:
        async with app_with(place) as (app, pilot, _):
            await export_in_background(app, pilot, place)
            job = app.exports.running
            assert job is not None
            (place / "go").touch()
            await until(pilot, lambda: job.ended)
            await app.push_screen(ExportScreen(app.exports, job=job), results.append)
            await until(pilot, lambda: results)
            assert results[0].path == tiny_bundle
            await until(pilot, lambda: len(app.screen_stack) == 1)

    drive(scene())


@pytest.mark.parametrize("ignores", [False, True])
def test_no_background_export_outlives_the_chat(
    place: Path, stand_in: Callable[[str], None], ignores: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_edge.chat.export_process._GRACE", 0.3)
    stand_in(
        ("signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if ignores else "") + stage("reading") + "time.sleep(600)\n"
    )

    async def scene() -> None:
        async with app_with(place) as (app, pilot, _):
            await export_in_background(app, pilot, place)
            await pilot.press("ctrl+q")

    drive(scene())
    assert len(started(place)) == 1
    assert gone(started(place)[0])  # it has already ended
