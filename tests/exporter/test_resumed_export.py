"""Interrupted exports continue at the layer where they stopped, with the same result."""

from __future__ import annotations

import functools
import hashlib
import json
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from calling import call

from llm_edge.exporter import cli
from llm_edge.exporter import export as export_module
from llm_edge.exporter.bundle import onnx_writer
from llm_edge.exporter.export import export
from llm_edge.exporter.graph.trace import trace
from llm_edge.exporter.options import ExportOptions
from llm_edge.exporter.quantization.journal import Journal
from llm_edge.exporter.quantization.observe import Observer
from llm_edge.runtime.errors import InputError, MachineError

LAYERS = 3
STEPS = 2 * LAYERS + 3  # layers, the head, the sensitivity of the head and of the layers, and of the embedding
PRECISION = "int8,int4"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save_checkpoint(tmp_path_factory.mktemp("source") / "model", num_hidden_layers=LAYERS)


@functools.cache
def _trace(*given: Any, **options: Any) -> Any:
    return trace(*given, **options)


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make small models resumable, with short texts and a shared trace."""
    monkeypatch.setattr(export_module, "LARGE", 0)
    tiny.shorten_texts(monkeypatch, 600)
    monkeypatch.setattr(onnx_writer, "trace", lambda *given, **options: _trace(*given, **options).clone())


@pytest.fixture(scope="module")
def whole(source: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The files of an export that was not interrupted."""
    target = tmp_path_factory.mktemp("whole") / "bundle"
    with pytest.MonkeyPatch.context() as patch:
        tiny.shorten_texts(patch, 600)
        run(source, target)
    return files(target)


def run(source: Path, target: Path, *, resumable: bool = True, **options: Any) -> list[str]:
    """Export; returns the progress in words."""
    said: list[str] = []
    given = {"precision": PRECISION, "validate": False, **options}
    export(
        str(source), ExportOptions(target, **given), lambda *words: said.append(f"{words[0]}: {words[2]}"),
        resumable=resumable,
    )  # fmt: skip
    return said


def files(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in folder.rglob("*")
        if path.is_file()
    }


def interrupt(source: Path, target: Path, step: int, how: type[BaseException] = KeyboardInterrupt) -> list[str]:
    """Export until the journal has `step` steps; returns what was computed."""
    complete = Journal.complete

    def stop(journal: Journal, *given: Any) -> None:
        if len(journal.steps) == step:
            raise how
        complete(journal, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Journal, "complete", stop)
        with pytest.raises(MachineError if how is MemoryError else how):
            run(source, target)
    return [path.name for path in target.parent.iterdir()]


@pytest.mark.parametrize("step", [1, LAYERS, LAYERS + 1, LAYERS + 3, STEPS - 1])
def test_an_export_that_was_interrupted_at_any_step_gives_the_same_bytes(
    step: int, source: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    target = tmp_path / "bundle"
    assert interrupt(source, target, step) == [".bundle.calibration"]
    run(source, target, resume=True)
    assert files(target) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


def test_completed_layers_are_not_computed_again(source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    interrupt(source, tmp_path / "bundle", step=2)
    observed: list[int] = []
    observe = Observer.observe

    def note(observer: Observer, number: int, layer: torch.nn.Module) -> Any:
        observed.append(number)
        return observe(observer, number, layer)

    monkeypatch.setattr(Observer, "observe", note)
    run(source, tmp_path / "bundle", resume=True)
    assert observed == [2]


def test_an_export_can_be_interrupted_again_and_while_the_bundle_is_written(
    source: Path, whole: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "bundle"
    interrupt(source, target, step=1)
    with monkeypatch.context() as patch:
        patch.setattr(export_module, "write_side_files", raise_interrupt)
        with pytest.raises(KeyboardInterrupt):
            run(source, target, resume=True)
    run(source, target, resume=True)
    assert files(target) == whole


def raise_interrupt(*_: object, **__: object) -> None:
    raise KeyboardInterrupt


KILLED = """
import os, signal, sys
import pytest
sys.path[:0] = sys.argv.pop().split(os.pathsep)
import tiny
from llm_edge.exporter import cli, export
from llm_edge.exporter.quantization.journal import Journal
tiny.shorten_texts(pytest.MonkeyPatch(), 600)
export.LARGE = 0
complete = Journal.complete
def kill(journal, *given):
    if len(journal.steps) == 2:
        with open(journal.folder / "journal.jsonl", "a") as file:
            file.write('["layer 2", [["half a l')
        os.kill(os.getpid(), signal.SIGKILL)
    complete(journal, *given)
Journal.complete = kill
cli.main()
"""


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="this system has no SIGKILL")
def test_a_killed_export_continues(source: Path, whole: dict[str, str], tmp_path: Path) -> None:
    target = tmp_path / "bundle"
    words = [str(source), "-o", str(target), "--precision", PRECISION, "--no-validate"]
    command = [sys.executable, "-c", KILLED, *words, str(Path(tiny.__file__).parent)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == -signal.SIGKILL, done.stderr
    said = run(source, target, resume=True)
    assert said[0].startswith("recovering: removed ")
    assert files(target) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


# ---- messages


def test_ctrl_c_says_how_to_continue(
    source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(onnx_writer, "trace", raise_interrupt)
    words = (source, "-o", tmp_path / "bundle", "--precision", "int8", "--no-validate")
    code, _, err = call(cli.main, capfd, "llm-export", *words)
    assert code == 130
    where = f"{tmp_path}/.bundle.calibration keeps what is done"
    assert err.endswith(f"interrupted ({where}: continue with the same command and --resume)\ninterrupted\n")


def test_a_full_disk_keeps_what_is_done(source: Path, tmp_path: Path) -> None:
    assert interrupt(source, tmp_path / "bundle", 2, MemoryError) == [".bundle.calibration"]


@pytest.mark.parametrize(("resumable", "large"), [(False, 0), (True, 10**9)])
def test_small_models_and_other_programs_keep_nothing(
    resumable: bool, large: int, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export_module, "LARGE", large)
    monkeypatch.setattr(onnx_writer, "trace", raise_interrupt)
    with pytest.raises(KeyboardInterrupt):
        run(source, tmp_path / "bundle", resumable=resumable)
    assert list(tmp_path.iterdir()) == []


def test_there_must_be_something_to_resume(source: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no interrupted export to resume: start without --resume$"):
        run(source, tmp_path / "bundle", resume=True)


def test_an_interrupted_export_is_not_started_again_by_mistake(
    source: Path, whole: dict[str, str], tmp_path: Path
) -> None:
    target = tmp_path / "bundle"
    interrupt(source, target, step=1)
    kept = files(tmp_path)
    with pytest.raises(InputError, match="has an interrupted export: continue it with the same command and --resume"):
        run(source, target)
    assert files(tmp_path) == kept
    run(source, target, force=True)
    assert files(target) == whole
    assert [path.name for path in tmp_path.iterdir()] == ["bundle"]


@pytest.mark.parametrize(
    ("change", "options", "words"),
    [
        ("precision", {"precision": "int4"}, "precisions"),
        ("weights", {}, "weights"),
        ("context", {"max_seq_len": 64}, "options of the model"),
        ("version", {}, "version of torch"),
    ],
)
def test_another_export_is_not_resumed(
    change: str, options: dict[str, Any], words: str, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(source, tmp_path / "copy"))
    interrupt(copy, tmp_path / "bundle", step=1)
    if change == "weights":
        tiny.save_checkpoint(copy, num_hidden_layers=LAYERS, seed=1)
    if change == "version":
        monkeypatch.setattr(torch, "__version__", "1.0")
    kept = files(tmp_path)
    with pytest.raises(InputError, match=rf"--resume requires the {words} of the interrupted export: .*--force$"):
        run(copy, tmp_path / "bundle", resume=True, **options)
    assert files(tmp_path) == kept


@pytest.mark.parametrize("name", ["export.json", "journal.jsonl", "outputs-0"])
def test_a_damaged_file_is_named(name: str, source: Path, tmp_path: Path) -> None:
    interrupt(source, tmp_path / "bundle", step=1)
    (tmp_path / ".bundle.calibration" / name).write_text("damaged\n")
    with pytest.raises(InputError, match=rf"\.bundle\.calibration/{name}") as raised:
        run(source, tmp_path / "bundle", resume=True)
    assert "\n" not in str(raised.value)


def test_the_journal_lists_the_steps(source: Path, tmp_path: Path) -> None:
    interrupt(source, tmp_path / "bundle", STEPS - 1)
    lines = (tmp_path / ".bundle.calibration" / "journal.jsonl").read_text().splitlines()
    steps = [json.loads(line)[0] for line in lines]
    assert steps == [
        *("layer 0", "layer 1", "layer 2", "lm_head"),
        *("sensitivity 3", "sensitivity 2", "sensitivity 1", "sensitivity 0"),
    ]
