"""The export screen: real exports, fake ones for failures, and cancelling."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from textual.widgets import Checkbox, Input
from tui_driving import app_with, ask, drive, screen, until

from llm_edge.chat.choice import BundleChoice
from llm_edge.chat.export_process import Export, ExportRequest, named_options, parse_options
from llm_edge.chat.responder import LocalResponder
from llm_edge.exporter.options import PRECISIONS, ExportOptions
from llm_edge.exporter.quantization.recipes import RECIPES
from llm_edge.runtime.errors import ParameterError
from llm_edge.runtime.installation import install_hint
from llm_edge.tui.app import ChatApp
from llm_edge.tui.screens.export import CheckpointTree, CrossCheckbox, ExportScreen

StandIn = Callable[[str], None]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> StandIn:
    """Runs these lines of Python instead of `llm-export`."""
    return lambda code: monkeypatch.setattr(
        "llm_edge.chat.export_process._COMMAND", f"import json, os, signal, sys, time\n{code}"
    )


def stage(name: str, share: float | None = None, detail: str = "") -> str:
    return f"print({json.dumps({'stage': name, 'share': share, 'detail': detail})!r}, flush=True)\n"


async def open_export(app: ChatApp, pilot: Any, *typed: str) -> None:
    """Open the export screen: F4, filter text, Enter."""
    await pilot.press("f4")
    await until(pilot, lambda: getattr(app.screen, "_entries", None))
    await pilot.press(*typed, "enter")
    await until(pilot, lambda: isinstance(app.screen, ExportScreen) and app.screen.query("#error"))
    await pilot.pause()


def value(app: ChatApp, name: str) -> Input:
    return app.screen.query_one(f"#option-{name} Input", Input)


def bare_state_dict(path: Path) -> None:
    """A two-layer model in Meta's naming, without a config."""
    torch.manual_seed(0)
    tensors = {"tok_embeddings.weight": torch.randn(331, 64) * 0.02, "output.weight": torch.randn(331, 64) * 0.05}
    for layer in range(2):
        for name in ("wq", "wk", "wv", "wo"):
            tensors[f"layers.{layer}.attention.{name}.weight"] = torch.randn(64, 64) * 0.05
        for name, shape in (("w1", (128, 64)), ("w3", (128, 64)), ("w2", (64, 128))):
            tensors[f"layers.{layer}.feed_forward.{name}.weight"] = torch.randn(shape) * 0.05
        for name in ("attention_norm", "ffn_norm"):
            tensors[f"layers.{layer}.{name}.weight"] = torch.ones(64)
    torch.save({**tensors, "norm.weight": torch.ones(64)}, path)


def test_a_bare_state_dict_is_exported_after_entering_missing_options(place: Path) -> None:
    """Runs the real `llm-export` twice: its error shows the options, and with them the bundle is created and loaded."""
    bare_state_dict(place / "model.pt")
    tiny.save_tokenizer(place / "words")

    async def scene() -> None:
        async with app_with(place, "From the script.") as (app, pilot, _):
            await ask(pilot, "First?")
            await open_export(app, pilot, *"export file")
            await pilot.press(*"model.pt")
            app.screen.query_one("#precision-int8", Checkbox).value = False
            app.screen.query_one("#precision-fp32", Checkbox).value = True
            await pilot.press("enter")
            await until(pilot, lambda: "head count" in screen(app), 60)
            assert app.screen.query_one("#option-n-heads").display
            assert app.screen.query_one("#option-rope-theta").display
            assert not app.screen.query_one("#option-adapter").display
            given = {"n-heads": "2", "rope-theta": "10000", "norm-eps": "1e-5", "max-seq-len": "128"}
            for name, text in {**given, "tokenizer": "words"}.items():
                value(app, name).value = text
            await pilot.press("f10")
            await until(pilot, lambda: "reading" in screen(app), 60)
            await until(pilot, lambda: isinstance(app.session.responder, LocalResponder), 90)
            assert app.session.responder is not None
            assert app.session.responder.detail == "fp32"
            assert (place / "artifacts/model/manifest.json").exists()
            app.session.apply_change(lambda parameters: parameters.set("max_tokens", 4))
            await ask(pilot, "Second?")
            path = app.session.conversation.path()
            assert [each.content for each in path[:2]] == ["First?", "From the script."]
            assert path[3].figures["tokens"] > 0

    drive(scene())


def test_stages_and_progress_are_shown_during_an_export(place: Path, tiny_bundle: Path, stand_in: StandIn) -> None:
    go = place / "go"
    stand_in(
        stage("reading", None, "owner/name")
        + stage("quantizing", 0.5, "int8 \x1b[31mlayer")
        + "print('no JSON'); print('[1]'); print('x' * 300000); print(json.dumps({'stage': 5}), flush=True)\n"
        + f"while not os.path.exists({str(go)!r}): time.sleep(0.01)\n"
        + f"print(json.dumps({{'stage': 'done', 'path': {str(tiny_bundle)!r}}}))\n"
    )

    async def scene() -> None:
        async with app_with(place, size=(80, 24)) as (app, pilot, fake):
            await open_export(app, pilot, *"hugging")
            await pilot.press(*"owner/name", "enter")
            await until(pilot, lambda: "50%" in screen(app))
            shown = screen(app)
            assert "✓ reading" in shown
            assert "▸ quantizing" in shown
            assert "int8" in shown
            assert "\x1b" not in shown
            assert app.session.responder is fake
            go.touch()
            await until(pilot, lambda: isinstance(app.session.responder, LocalResponder))

    drive(scene())


def test_arguments_match_the_form(place: Path, stand_in: StandIn) -> None:
    stand_in("print('error: ' + json.dumps(sys.argv[1:]), file=sys.stderr); sys.exit(2)")
    typed = parse_options({"config": " a b.yaml ", "n-heads": " ", "norm-eps": "1e-5"})
    options = ExportOptions(**typed, precision="int8,int4", validate=False, force=True)
    export = Export(ExportRequest("-x.pt", options))
    assert export.result() is None
    expected = ["--progress=json", "--precision=int8,int4", "--config=a b.yaml", "--norm-eps=1e-05"]
    assert json.loads(export.error()) == [*expected, "--no-validate", "--force", "--", "-x.pt"]


def test_an_option_that_is_not_a_number_is_rejected() -> None:
    with pytest.raises(ParameterError, match="--n-heads is 'two', not an integer"):
        parse_options({"n-heads": "two"})


def test_the_form_offers_all_precisions() -> None:
    assert list(PRECISIONS) == list(RECIPES)


def test_an_existing_bundle_can_be_replaced(place: Path, tiny_bundle: Path, stand_in: StandIn) -> None:
    stand_in(
        "if '--force' not in sys.argv:\n"
        "    sys.exit('error: artifacts/x exists: choose another folder with -o, or replace it with --force')\n"
        f"print(json.dumps({{'stage': 'done', 'path': {str(tiny_bundle)!r}}}))\n"
    )

    async def scene() -> None:
        async with app_with(place) as (app, pilot, _):
            await open_export(app, pilot, *"hugging")
            assert not app.screen.query_one("#force").display
            await pilot.press(*"owner/x", "enter")
            await until(pilot, lambda: "artifacts/x exists" in screen(app))
            assert app.screen.query_one("#option-output").display
            app.screen.query_one("#force", Checkbox).value = True
            await pilot.press("f10")
            await until(pilot, lambda: isinstance(app.session.responder, LocalResponder))

    drive(scene())


def test_options_are_extracted_from_errors() -> None:
    assert named_options("x exists: choose another folder with -o, or replace it with --force") == ["output", "force"]
    assert named_options("give --config FILE or --n-heads N")[:3] == ["config", "n-heads", "tokenizer"]
    assert named_options("see --help, --explain, x--config and one-of") == []


def gone(process: int) -> bool:
    """Whether the process no longer runs."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return True
    return False


@pytest.mark.parametrize("ignores", [False, True])
def test_escape_stops_an_export_and_its_child_processes(
    place: Path, stand_in: StandIn, ignores: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_edge.chat.export_process._GRACE", 0.3)
    stand_in(
        ("signal.signal(signal.SIGTERM, signal.SIG_IGN)\n" if ignores else "")
        + "child = os.fork()\n"
        + "open('pids', 'a').write(f'{os.getpid()} ')\n"
        + stage("reading")
        + "time.sleep(600)\n"
    )

    async def scene() -> None:
        async with app_with(place) as (app, pilot, fake):
            await open_export(app, pilot, *"hugging")
            await pilot.press(*"owner/name", "enter")
            await until(pilot, lambda: (place / "pids").exists() and len((place / "pids").read_text().split()) == 2)
            processes = [int(each) for each in (place / "pids").read_text().split()]
            await pilot.press("escape")
            await until(pilot, lambda: "was cancelled" in screen(app))
            await until(pilot, lambda: all(map(gone, processes)))
            assert isinstance(app.screen, ExportScreen)  # with the values of the form
            assert app.screen.query_one("#source", Input).value == "owner/name"
            await pilot.press("escape", "escape")
            await until(pilot, lambda: len(app.screen_stack) == 1)
            assert app.session.responder is fake

    drive(scene())


def test_no_export_outlives_the_chat(place: Path, stand_in: StandIn) -> None:
    stand_in("open('pid', 'w').write(str(os.getpid()))\n" + stage("reading") + "time.sleep(600)\n")
    number = place / "pid"

    async def scene() -> None:
        async with app_with(place) as (app, pilot, _):
            await open_export(app, pilot, *"hugging")
            await pilot.press(*"owner/name", "enter")
            await until(pilot, lambda: number.exists() and number.read_text())

    drive(scene())
    end = time.monotonic() + 10
    while not gone(int(number.read_text())):
        assert time.monotonic() < end
        time.sleep(0.02)


def test_without_the_export_extra_the_error_names_the_remedy(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs the real `llm-export` with torch unavailable."""
    without = place / "without"
    without.mkdir()
    (without / "torch.py").write_text("raise ModuleNotFoundError(\"No module named 'torch'\", name='torch')\n")
    monkeypatch.setenv("PYTHONPATH", str(without))
    export = Export(ExportRequest("smollm2"))
    assert export.result() is None
    assert export.error() == f"llm-export needs torch: {install_hint('export')}"


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("print('noise\\nerror: x.pt: cut\\x1b[2J off\\nmore', file=sys.stderr); sys.exit(2)", "x.pt: cut[2J off"),
        ("raise RuntimeError('out\\nof order')", "of order"),
        ("sys.exit(7)", "code 7"),
        ("os.kill(os.getpid(), 9)", "killed (signal 9)"),
        ("print('y' * 10**7, file=sys.stderr); sys.exit(1)", "yyy"),
        ("print(json.dumps({'stage': 'done', 'path': 'x'}), flush=True); sys.exit(1)", "code 1"),
    ],
)
def test_errors_are_one_line(place: Path, stand_in: StandIn, code: str, expected: str) -> None:
    stand_in(code)
    export = Export(ExportRequest("x"))
    assert export.result() is None
    error = export.error()
    assert expected in error
    assert "\n" not in error
    assert "\x1b" not in error
    assert len(error) <= 600


def test_a_missing_command_is_reported(place: Path) -> None:
    async def scene() -> None:
        async with app_with(place) as (app, pilot, _):
            await app.push_screen(ExportScreen(app.exports, "owner/name", command=[str(place / "nothing")]))
            await pilot.press("enter")
            await until(pilot, lambda: "could not be started" in screen(app))

    drive(scene())


@pytest.mark.parametrize("size", [(80, 24), (200, 60)])
def test_the_file_dialog_lists_only_exportable_files(
    place: Path, tiny_bundle: Path, stand_in: StandIn, size: tuple[int, int]
) -> None:
    for name in ("a.pt", "b.gguf", "c.txt", ".d.pt", "e.SAFETENSORS"):
        (place / name).touch()
    (place / "folder").mkdir()
    (place / "folder/inner.pth").touch()
    stand_in(
        "open('source', 'w').write(sys.argv[-1])\n"
        f"print(json.dumps({{'stage': 'done', 'path': {str(tiny_bundle)!r}}}))\n"
    )
    results: list[BundleChoice | None] = []

    async def scene() -> None:
        async with app_with(place, size=size) as (app, pilot, _):
            await app.push_screen(ExportScreen(app.exports, browse=True), results.append)
            await until(pilot, lambda: "a.pt" in screen(app))
            shown = screen(app)
            assert "b.gguf" in shown
            assert "e.SAFETENSORS" in shown
            assert "folder" in shown
            assert "c.txt" not in shown
            assert ".d.pt" not in shown
            assert "Cancel" in shown
            tree = app.screen.query_one(CheckpointTree)
            await pilot.press("tab", "down", "enter")
            await until(pilot, lambda: "inner.pth" in screen(app))
            assert app.screen.query_one("#source", Input).value == str(place / "folder")
            await pilot.press("down", "enter")
            await until(pilot, lambda: app.screen.query_one("#source", Input).value.endswith("inner.pth"))
            assert not tree.has_focus
            await pilot.press("enter")
            await until(pilot, lambda: results)

    drive(scene())
    assert results == [BundleChoice(tiny_bundle)]
    assert (place / "source").read_text() == str(place / "folder/inner.pth")


def test_a_missing_source_is_reported(place: Path) -> None:
    async def scene() -> None:
        async with app_with(place) as (app, pilot, _):
            await app.push_screen(ExportScreen(app.exports, browse=True))
            await pilot.press("enter")
            await until(pilot, lambda: "Enter the path" in screen(app))

    drive(scene())


# ---- precision check boxes


def inside(tick: CrossCheckbox) -> str:
    """The text of a check box without colours."""
    return tick.render_line(0).text[1]


@pytest.mark.parametrize("by", ["space", "click"])
def test_ticked_precisions_are_visible_without_colours_and_exported(place: Path, stand_in: StandIn, by: str) -> None:
    stand_in("sys.exit('error: ' + json.dumps(sys.argv[1:]))")

    async def scene() -> None:
        async with app_with(place, size=(80, 24)) as (app, pilot, _):

            async def turn(name: str) -> None:
                tick = app.screen.query_one(f"#precision-{name}", CrossCheckbox)
                before = tick.value
                if by == "space":
                    tick.focus()
                    await pilot.press("space")
                else:
                    await pilot.click(tick, offset=(1, 0))
                await until(pilot, lambda: tick.value is not before)

            await open_export(app, pilot, *"hugging")
            ticks = [app.screen.query_one(f"#precision-{name}", CrossCheckbox) for name in PRECISIONS]
            assert {each.id for each in ticks if inside(each) == "X"} == {"precision-int8"}
            await turn("fp32")
            await turn("int4")
            await turn("int8")
            await until(pilot, lambda: "▐X▌ fp32" in screen(app) and "▐X▌ int4" in screen(app))
            assert "▐ ▌ int8" in screen(app)
            assert {each.id for each in ticks if inside(each) == "X"} == {"precision-fp32", "precision-int4"}
            assert {inside(each) for each in ticks} == {" ", "X"}
            app.screen.query_one("#source").focus()
            await pilot.press(*"a/b", "enter")
            await until(pilot, lambda: '"--precision=fp32,int4", "--", "a/b"' in " ".join(screen(app).split()))

            for name in ("int4", "fp32"):
                await turn(name)
            assert "X▌" not in screen(app)
            app.screen.query_one("#source").focus()
            await pilot.press("enter")  # none: the default of llm-export
            await until(pilot, lambda: '["--progress=json", "--", "a/b"]' in " ".join(screen(app).split()))

    drive(scene())
