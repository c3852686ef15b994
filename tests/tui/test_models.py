"""The model picker: bundles, endpoints, and the chat while a model loads."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from openai_server import Server, text_events
from textual.widgets import Input, OptionList, Select
from tui_driving import app_with, ask, drive, screen, until

from llm_edge.chat import bundles
from llm_edge.chat.bundles import Broken, Offer
from llm_edge.chat.choice import BundleChoice, open_responder
from llm_edge.chat.endpoint import client as endpoint
from llm_edge.chat.endpoint import key as endpoint_key
from llm_edge.chat.endpoint.client import Endpoint, EndpointResponder
from llm_edge.chat.fake import FakeResponder
from llm_edge.chat.history.store import Store
from llm_edge.chat.responder import LocalResponder
from llm_edge.chat.settings import Settings
from llm_edge.runtime.load_options import LoadOptions
from llm_edge.tui.app import ChatApp
from llm_edge.tui.screens.endpoint import EndpointScreen
from llm_edge.tui.screens.export import ExportScreen
from llm_edge.tui.screens.models import ModelsScreen

CANARY = "sk-canary-91c2"
HOSTILE = "evil\x1b]52;c;aGk=\x07[red]\u202etxt\x9b2J"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory with an empty `artifacts/`."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "artifacts").mkdir()
    return tmp_path


@pytest.fixture
def two(place: Path, tiny_bundle: Path) -> Path:
    """`artifacts/` with a good bundle and a broken one."""
    shutil.copytree(tiny_bundle, place / "artifacts/good")
    shutil.copytree(tiny_bundle, place / "artifacts/cut")
    (place / "artifacts/cut/tokenizer.json").write_text("{}")
    return place


async def open_models(app: ChatApp, pilot: Any, key: str = "f4") -> ModelsScreen:
    await pilot.press(key)
    await until(pilot, lambda: isinstance(app.screen, ModelsScreen) and app.screen._entries)
    await pilot.pause()
    found = app.screen
    assert isinstance(found, ModelsScreen)
    return found


def line(app: ChatApp, *words: str) -> str:
    """The only line of the screen that contains these words."""
    found = [each for each in screen(app).splitlines() if all(word in each for word in words)]
    assert len(found) == 1, screen(app)
    return found[0]


# ---- listing


def test_bundles_are_listed_with_size_and_fidelity_and_broken_ones_with_the_reason(
    two: Path, tiny_bundle: Path
) -> None:
    found = bundles.offers([tiny_bundle, two / "gone", two / "artifacts/good"])
    broken = [each for each in found if isinstance(each, Broken)]
    assert [each.path.name for each in broken] == ["cut"]
    assert "tokenizer.json" in broken[0].reason
    assert "\n" not in broken[0].reason
    offers = [each for each in found if isinstance(each, Offer)]
    assert [(each.path.name, each.precision) for each in offers[:3]] == [
        ("good", "fp32"),
        ("good", "int8"),
        ("good", "int4"),
    ]
    assert {each.path for each in offers[3:]} == {tiny_bundle}  # the recent one, without duplicates
    assert [each.precision for each in offers if each.preferred] == ["int8", "int8"]
    model = two / "artifacts/good/onnx"
    size = sum((model / f"model{end}").stat().st_size for end in (".onnx", ".onnx_data"))
    assert offers[0].size == size
    assert all(each.fidelity.startswith("KL ") and "top-1" in each.fidelity for each in offers)


def test_recent_bundles_are_listed_latest_first_without_duplicates(place: Path) -> None:
    settings = Settings(place)
    for name in ("a", "b", "a"):
        bundles.used(settings, Path(name))
    assert bundles.recent(Settings(place)) == [place / "a", place / "b"]


@pytest.mark.parametrize("size", [(80, 24), (200, 60)])
@pytest.mark.parametrize("key", ["f4", "ctrl+l"])
def test_each_precision_has_one_line(two: Path, size: tuple[int, int], key: str) -> None:
    async def scene() -> None:
        async with app_with(two, size=size) as (app, pilot, _):
            await open_models(app, pilot, key)
            for precision in ("fp32", "int8", "int4"):
                assert "MB" in line(app, "good", precision)
                assert "top-1" in line(app, "good", precision)
            assert "bytes instead of" in line(app, "✗", "cut")
            assert "Hugging Face" in line(app, "+ Export from")
            await pilot.press("escape")
            assert not isinstance(app.screen, ModelsScreen)

    drive(scene())


# ---- choosing


def test_a_bundle_is_found_by_typing_and_the_conversation_continues_with_it(two: Path) -> None:
    async def scene() -> None:
        async with app_with(two, "From the script.") as (app, pilot, fake):
            await ask(pilot, "First?")
            await open_models(app, pilot)
            await pilot.press(*"good int4", "enter")
            await until(pilot, lambda: isinstance(app.session.responder, LocalResponder))
            assert app.session.responder is not None
            assert app.session.responder.detail == "int4"
            await until(pilot, lambda: fake.closed)
            app.session.apply_change(lambda parameters: parameters.set("max_tokens", 5))
            await ask(pilot, "Second?")
            path = app.session.conversation.path()
            assert [each.content for each in path[:3]] == ["First?", "From the script.", "Second?"]
            assert path[1].model == "script"
            assert path[3].model == app.session.responder.name
            assert path[3].figures["precision"] == "int4"
            assert path[3].figures["tokens"] > 0
            models = await open_models(app, pilot)
            assert "int4" in line(app, "●", "good")
            place = models.query_one(OptionList).highlighted
            assert place is not None
            assert models._shown[place].choice == BundleChoice(Path("artifacts/good"), LoadOptions("int4"))
            assert bundles.recent(app.settings) == [two / "artifacts/good"]

    drive(scene())


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> Callable[[], tuple[threading.Event, FakeResponder]]:
    """The chosen bundle loads once an event is set, as a fake model."""

    def make() -> tuple[threading.Event, FakeResponder]:
        loaded, second = threading.Event(), FakeResponder("From the second.", name="second")

        def load(_choice: object) -> FakeResponder:
            assert loaded.wait(20)
            return second

        monkeypatch.setattr("llm_edge.tui.model_loader.open_responder", load)
        return loaded, second

    return make


def test_the_old_model_answers_until_the_new_one_is_loaded(
    two: Path, slow: Callable[[], tuple[threading.Event, FakeResponder]]
) -> None:
    loaded, second = slow()

    async def scene() -> None:
        async with app_with(two, "From the first.") as (app, pilot, _):
            await open_models(app, pilot)
            await pilot.press(*"good int8", "enter")
            await ask(pilot, "Who are you?")
            assert app.session.conversation.path()[-1].content == "From the first."
            loaded.set()
            await until(pilot, lambda: app.session.responder is second)
            await ask(pilot, "And now?")
            path = app.session.conversation.path()
            assert [each.content for each in path[1::2]] == ["From the first.", "From the second."]

    drive(scene())


def test_a_running_answer_finishes_with_the_old_model(
    two: Path, slow: Callable[[], tuple[threading.Event, FakeResponder]]
) -> None:
    loaded, second = slow()
    text = "word " * 60

    async def scene() -> None:
        async with app_with(two, text, pause=0.01) as (app, pilot, _):
            await open_models(app, pilot)
            await pilot.press(*"good int8", "enter")
            await ask(pilot, "Go on and on.", wait=False)
            loaded.set()
            await until(pilot, lambda: app.session.responder is second)
            answer = app.session.conversation.path()[-1]
            assert answer.figures["finish_reason"] == "stop"
            assert answer.content.split() == text.split()

    drive(scene())


def test_a_load_error_is_reported_and_changes_nothing(two: Path) -> None:
    async def scene() -> None:
        async with app_with(two) as (app, pilot, fake):
            await open_models(app, pilot)
            (two / "artifacts/good/onnx/model.onnx_data").unlink()
            await pilot.press(*"good fp32", "enter")
            await until(pilot, lambda: any("model.onnx_data is missing" in each.message for each in app._notifications))
            assert app.session.responder is fake
            assert bundles.recent(app.settings) == []

    drive(scene())


def test_a_missing_bundle_leads_to_the_export(place: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enter exports SmolLM2; here a fake `llm-export` returns the tiny model instead."""
    says = f"""
import json, sys
open("arguments", "w").write(json.dumps(sys.argv[1:]))
print(json.dumps({{"stage": "reading", "share": None, "detail": "smollm2"}}), flush=True)
print(json.dumps({{"stage": "done", "path": {str(tiny_bundle)!r}, "seconds": 1.0}}), flush=True)
"""
    monkeypatch.setattr("llm_edge.chat.export_process._COMMAND", says)

    async def scene() -> None:
        app = ChatApp(Store(place / "x.db"), lambda: open_responder(BundleChoice(bundles.DEFAULT)), Settings(place))
        async with app.run_test(size=(80, 24), notifications=True) as pilot:
            await until(pilot, lambda: isinstance(app.screen, ModelsScreen) and app.screen._entries)
            await pilot.pause()
            assert ": not found" in screen(app)
            assert "SmolLM2" in line(app, "+ Make", "now")
            await pilot.press("enter")
            await until(pilot, lambda: isinstance(app.session.responder, LocalResponder))
            arguments = json.loads((place / "arguments").read_text())
            assert arguments == [
                "--progress=json", "--precision=int8", "--no-validate", "--force", "--", "smollm2"
            ]  # fmt: skip
            await ask(pilot, "Hi", wait=False)
            app.session.stop()

    drive(scene())


@pytest.mark.parametrize(
    ("typed", "kind", "field"),
    [
        ("owner/name", ExportScreen, "#source"),
        ("./some.pt", ExportScreen, "#source"),
        ("https://x.example/v1", EndpointScreen, "#url"),
    ],
)
def test_typed_paths_ids_and_urls_open_the_matching_form(two: Path, typed: str, kind: type, field: str) -> None:
    async def scene() -> None:
        async with app_with(two) as (app, pilot, _):
            await open_models(app, pilot)
            await pilot.press(*typed, "enter")
            await until(pilot, lambda: isinstance(app.screen, kind) and app.screen.query(field))
            assert app.screen.query_one(field, Input).value == typed

    drive(scene())


def test_a_filter_without_matches_chooses_nothing(two: Path) -> None:
    async def scene() -> None:
        async with app_with(two) as (app, pilot, fake):
            models = await open_models(app, pilot)
            await pilot.press(*"zebra", "enter", "down", "up", "up")
            await pilot.pause()
            assert app.screen is models
            assert app.session.responder is fake

    drive(scene())


# ---- endpoints


def test_an_endpoint_is_connected_and_saved(place: Path, server: Server) -> None:
    async def scene() -> None:
        async with app_with(place, "From the script.") as (app, pilot, _):
            await ask(pilot, "First?")
            await open_models(app, pilot)
            await pilot.press(*"connect", "enter")
            await until(pilot, lambda: isinstance(app.screen, EndpointScreen))
            await pilot.press(*server.url.removeprefix("http://"), "enter")
            await until(pilot, lambda: app.screen.query_one("#models", OptionList).option_count == 2)
            await pilot.press("down", "enter")  # large, small
            await until(pilot, lambda: isinstance(app.session.responder, EndpointResponder))
            assert app.session.responder is not None
            assert app.session.responder.name == "small"
            await ask(pilot, "Second?")
            path = app.session.conversation.path()
            assert path[-1].content == "Hello there"
            asked = [(each["role"], each["content"]) for each in server.requests[-1]["messages"]]
            assert asked == [("user", "First?"), ("assistant", "From the script."), ("user", "Second?")]
            await open_models(app, pilot)
            assert "127.0.0.1" in line(app, "●", "small")
        assert endpoint.endpoints(Settings(place)) == [Endpoint(server.url, "small")]

    drive(scene())


def connect(app: ChatApp, endpoint: Endpoint | None) -> None:
    assert endpoint is not None
    app.chat_screen.loader.start(lambda: open_responder(endpoint))


def test_a_key_for_the_keyring_is_never_shown(place: Path, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    kept: dict[tuple[str, str], str] = {}

    class Ring:
        def get_password(self, service: str, name: str) -> str | None:
            return kept.get((service, name))

        def set_password(self, service: str, name: str, password: str) -> None:
            kept[service, name] = password

    monkeypatch.setattr("keyring.get_keyring", Ring)
    server.key = CANARY
    server.events = lambda: text_events("I know", " you")
    screens: list[str] = []

    async def scene() -> None:
        async with app_with(place, size=(100, 30)) as (app, pilot, _):
            await app.push_screen(
                EndpointScreen(server.url),
                lambda endpoint: endpoint and app.chat_screen.loader.start(lambda: open_responder(endpoint)),
            )
            await until(pilot, lambda: isinstance(app.screen, EndpointScreen) and app.screen.is_mounted)
            await pilot.press("enter")
            await until(pilot, lambda: "requires an API key" in screen(app))
            app.screen.query_one("#key-location", Select).value = "keyring"
            await pilot.pause()
            app.screen.query_one("#key", Input).focus()
            await pilot.press(*"sk-wrong", "enter")
            await until(pilot, lambda: "rejects the API key" in screen(app))
            app.screen.query_one("#key", Input).focus()
            await pilot.press(*CANARY)
            screens.append(screen(app))
            await pilot.press("enter")
            await until(pilot, lambda: app.screen.query_one("#models", OptionList).option_count == 2)
            assert app.screen.query_one("#key", Input).value == ""
            screens.append(screen(app))
            await pilot.press("enter")
            await until(pilot, lambda: isinstance(app.session.responder, EndpointResponder))
            await ask(pilot, "Hi")
            assert app.session.conversation.path()[-1].content == "I know you"
            screens.append(screen(app))

    drive(scene())
    assert kept == {(endpoint_key._SERVICE, server.url): CANARY}
    assert all(CANARY not in each for each in screens)
    for file in place.rglob("*"):
        if file.is_file():
            assert CANARY.encode() not in file.read_bytes(), file


def test_endpoint_errors_are_shown_in_the_form(place: Path, server: Server) -> None:
    async def scene() -> None:
        async with app_with(place) as (app, pilot, _):
            await app.push_screen(EndpointScreen())
            await until(pilot, lambda: isinstance(app.screen, EndpointScreen) and app.screen.is_mounted)
            await pilot.press("enter")
            await until(pilot, lambda: "base URL is missing" in screen(app))
            await pilot.press(*"http://x.invalid/v1")
            app.screen.query_one("#key-location", Select).value = "environment"
            await until(pilot, lambda: "unencrypted http" in screen(app))
            app.screen.query_one("#url", Input).value = server.url
            app.screen.query_one("#key-location", Select).value = "none"
            app.screen.query_one("#model", Input).value = "huge"
            await pilot.press("f10")
            await until(pilot, lambda: "Model 'huge' not found" in screen(app))
            assert "large" in screen(app)
            await pilot.press("escape")
            await until(pilot, lambda: not isinstance(app.screen, EndpointScreen))

    drive(scene())


# ---- untrusted names


def test_names_cannot_control_the_terminal(two: Path, server: Server) -> None:
    (two / "artifacts" / HOSTILE).mkdir()
    (two / "artifacts" / HOSTILE / "manifest.json").write_text("{")
    (two / f"{HOSTILE}.pt").write_bytes(b"")
    server.models = {"data": [{"id": HOSTILE}, {"id": "fine"}]}
    settings = Settings(two)
    endpoint.used(settings, Endpoint("http://127.0.0.1:1/v1", HOSTILE))

    async def scene() -> None:
        async with app_with(two) as (app, pilot, _):
            await open_models(app, pilot)
            seen = [screen(app)]
            await app.push_screen(ExportScreen(app.exports, browse=True))
            await until(pilot, lambda: ".pt" in screen(app))
            seen.append(screen(app))
            await app.push_screen(EndpointScreen(server.url))
            await until(pilot, lambda: isinstance(app.screen, EndpointScreen) and app.screen.is_mounted)
            await pilot.press("enter")
            await until(pilot, lambda: app.screen.query_one("#models", OptionList).option_count == 2)
            await pilot.pause()
            seen.append(screen(app))
            for each in seen:
                assert "evil" in each
                assert "[red]" in each
                assert not {"\x1b", "\x07", "\x9b", "\u202e"} & set(each)

    drive(scene())


def test_invalid_settings_are_ignored(place: Path) -> None:
    (place / "settings.json").write_text(
        '{"endpoints": [{"url": 5}, {"model": "x", "url": "ftp://y"}], "recent": ["\\u0000"]}'
    )
    settings = Settings(place)
    assert endpoint.endpoints(settings) == []
    assert bundles.offers(bundles.recent(settings)) == []
    (place / "settings.json").write_text('{"endpoints": 5, "recent": {}}')
    assert endpoint.endpoints(Settings(place)) == []
    assert bundles.recent(Settings(place)) == []
