"""The command llm-finetune: from checkpoint and data to a folder, interruptions, and one line for bad input."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import original
import pytest
import torch
from calling import call
from chat_data import write_rows
from safetensors.torch import load_file, save_file

from llm_edge.checkpoint.huggingface.checkpoint import read_folder
from llm_edge.checkpoint.lora.adapter import open_adapter
from llm_edge.checkpoint.source import SourceOptions, open_checkpoint
from llm_edge.finetune import cli
from llm_edge.finetune.checkpoint_files import FOLDER

QUICK = ("--steps", "4", "--batch-size", "4", "--evaluate-every", "2", "--sample-answers", "1", "--threads", "1")

Command = Callable[..., tuple[int, str, str]]


@pytest.fixture
def llm_finetune(capsys: pytest.CaptureFixture[str]) -> Command:
    return lambda *words: call(cli.main, capsys, "llm-finetune", *words)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    rows = [[f"What is {n}?", f"It is {n}."] for n in range(40)]
    return write_rows(tmp_path_factory.mktemp("data") / "data.jsonl", [{"data": row} for row in rows])


def test_a_run_writes_a_model_an_adapter_and_its_course(
    llm_finetune: Command, tiny_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    output = tmp_path / "out"
    code, shown, progress = llm_finetune(tiny_checkpoint, data, "-o", output, *QUICK, "--lr", "1e-2")
    assert code == 0, progress
    assert "evaluation before training: loss" in progress
    assert "step 4/4  loss" in progress
    assert "tokens/s" in progress
    assert f"Model: {output}" in shown
    assert "Evaluation loss: " in shown
    merged = read_folder(output)
    adapted = read_folder(tiny_checkpoint, open_adapter(output / "adapter"))
    name = "layers.0.attention.qkv.weight"
    assert torch.allclose(merged.weights[name], adapted.weights[name], atol=1e-6)
    assert not torch.equal(merged.weights[name], read_folder(tiny_checkpoint).weights[name])
    assert (output / FOLDER / "loss.svg").is_file()


def test_a_full_run_of_the_original_family_keeps_its_names(llm_finetune: Command, data: Path, tmp_path: Path) -> None:
    family = original.save_family(tmp_path / "family")
    output = tmp_path / "out"
    code, _, progress = llm_finetune(family.folder, data, "-o", output, *QUICK, "--method", "full")
    assert code == 0, progress
    trained = open_checkpoint(str(output), SourceOptions(), lambda _: None)
    state = torch.load(output / "model.pt", weights_only=True)
    assert state.keys() == family.model.state_dict().keys()
    assert trained.config == open_checkpoint(str(family.folder), SourceOptions(), lambda _: None).config
    assert not (output / "adapter").exists()


def test_a_terminated_run_resumes_to_the_model_of_a_whole_one(
    llm_finetune: Command, tiny_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    words = (*QUICK, "--steps", "15", "--save-every", "1")
    assert llm_finetune(tiny_checkpoint, data, "-o", tmp_path / "whole", *words)[0] == 0
    command = [sys.executable, "-m", "llm_edge.finetune", tiny_checkpoint, data, "-o", tmp_path / "part", *words]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        while not (tmp_path / "part" / FOLDER / "last.safetensors").exists() and process.poll() is None:
            time.sleep(0.02)
        os.kill(process.pid, signal.SIGTERM)
        assert process.stderr is not None
        shown = process.stderr.read()
        assert process.wait() == 130, shown
    assert "stopping: a checkpoint will be saved" in shown
    assert "continue with the same command and --resume" in shown
    assert not (tmp_path / "part" / "config.json").exists()
    assert llm_finetune(tiny_checkpoint, data, "-o", tmp_path / "part", *words, "--resume")[0] == 0
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "part"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_learning_rate_is_suggested_without_writing(
    llm_finetune: Command, tiny_checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, shown, progress = llm_finetune(tiny_checkpoint, data, "--find-lr", "--batch-size", "8", "--threads", "1")
    assert code == 0, progress
    assert shown.startswith("Suggested: --learning-rate ")
    assert list(tmp_path.iterdir()) == []


def damaged(folder: Path, source: Path) -> Path:
    """A copy of a checkpoint with a NaN among its weights."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def with_config(folder: Path, source: Path, **changes: Any) -> Path:
    """A copy of a checkpoint with changed keys of its config."""
    folder.mkdir()
    for file in source.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((source / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_bad_input_gets_one_line_and_changes_nothing(
    llm_finetune: Command, tiny_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    run = tmp_path / "run"
    assert llm_finetune(tiny_checkpoint, data, "-o", run, *QUICK)[0] == 0
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("mine")
    file = tmp_path / "file"
    file.write_text("mine")
    base, new = tiny_checkpoint, tmp_path / "new"
    quantized = with_config(tmp_path / "quantized", base, quantization_config={"quant_method": "gptq"})
    cases = [
        ((tmp_path / "missing", data, "-o", new), "no such file or folder"),
        ((base, tmp_path / "missing.jsonl", "-o", new), "missing.jsonl"),
        ((base, write_rows(tmp_path / "empty.jsonl", []), "-o", new), "empty.jsonl"),
        ((quantized, data, "-o", new), "quantization_config"),
        ((damaged(tmp_path / "nan", base), data, "-o", new), "model.layers.1.mlp.down_proj.weight contains NaN"),
        ((base, data, "-o", run), "continue it with --resume"),
        ((base, data, "-o", run, "--resume", "--lr", "3e-4"), "--learning-rate differs"),
        ((base, data, "-o", run, "--resume", "--batch-size", "3"), "--batch-size differs"),
        (
            (base, write_rows(tmp_path / "other.jsonl", [{"data": ["a", "b"]}] * 9), "-o", run, "--resume"),
            "the data differs",
        ),
        ((base, data, "-o", new, "--resume"), "has no checkpoint to resume"),
        ((base, data, "-o", foreign), "is not a fine-tuning run"),
        ((base, data, "-o", foreign, "--force"), "is not a fine-tuning run"),
        ((base, data, "-o", file), "is not a folder"),
        ((base, data, "-o", new, "--train-token", "<none>"), "'<none>' is not a token"),
        (
            (base, data, "-o", new, "--train-token", "<|im_start|>", "--no-merge"),
            "--train-token needs the merged model",
        ),
        ((base, data, "-o", new, "--device", "tpu"), "it must be cpu or cuda"),
        ((base, data, "-o", new, "--export", "--no-merge"), "--export needs the merged model"),
    ]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for words, message in cases:
        code, _, shown = llm_finetune(*QUICK, *words)
        errors = [line for line in shown.splitlines() if line.startswith("error: ")]
        assert code == 2, (words, shown)
        assert len(errors) == 1, shown
        assert message in errors[0], (words, errors)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before
    assert not new.exists()


def test_a_run_that_was_killed_before_its_first_checkpoint_can_be_started_again(
    llm_finetune: Command, tiny_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    (tmp_path / "out" / FOLDER).mkdir(parents=True)
    (tmp_path / "out" / FOLDER / ".last.safetensors.partial").write_bytes(b"half")
    assert llm_finetune(tiny_checkpoint, data, "-o", tmp_path / "out", *QUICK)[0] == 0
    assert not list(tmp_path.rglob("*.partial"))


def test_a_folder_in_use_is_refused(llm_finetune: Command, tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    from llm_edge.runtime.file_lock import locked

    (tmp_path / "out" / FOLDER).mkdir(parents=True)
    with locked(tmp_path / "out" / FOLDER):
        code, _, shown = llm_finetune(tiny_checkpoint, data, "-o", tmp_path / "out", *QUICK)
    assert code == 2
    assert "is in use by another llm-finetune" in shown


def test_tensorboard_is_named_if_it_is_missing(
    llm_finetune: Command, tiny_checkpoint: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    code, _, shown = llm_finetune(tiny_checkpoint, data, "-o", tmp_path / "out", *QUICK, "--tensorboard")
    assert (code, shown) == (2, "error: --tensorboard needs tensorboard: pip install tensorboard\n")
    assert not (tmp_path / "out").exists()


def test_help_loads_no_torch() -> None:
    code = "import sys; sys.argv = ['llm-finetune', '--help']\nfrom llm_edge.finetune.cli import main\ntry: main()\n"
    code += "except SystemExit: pass\nassert not {'torch', 'numpy', 'transformers'} & sys.modules.keys()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "--find-lr" in done.stdout


def test_a_resumed_run_has_the_options_of_the_interrupted_one(
    llm_finetune: Command, tiny_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    other = write_rows(tmp_path / "other.jsonl", [{"data": ["Who?", "Me."]}])
    chosen = ("--lr", "1e-2", "--rank", "4", "--schedule", "constant", "--long", "skip", "--evaluation-data", other)
    assert llm_finetune(tiny_checkpoint, data, "-o", tmp_path / "out", *QUICK, *chosen)[0] == 0
    code, shown, progress = llm_finetune(tiny_checkpoint, data, "-o", tmp_path / "out", "--resume", "--threads", "1")
    assert code == 0, progress
    assert "of 4 steps" in shown
    code, _, progress = llm_finetune(tiny_checkpoint, data, "-o", tmp_path / "out", "--resume", "--rank", "8")
    assert code == 2
    assert progress.splitlines()[-1].startswith("error: --resume: --rank differs from the interrupted run (4, now 8)")


def test_a_learning_rate_is_searched_with_the_checks_of_a_run(
    llm_finetune: Command, tiny_checkpoint: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("llm_edge.finetune.run.available_memory", lambda device: 10**6)
    code, shown, progress = llm_finetune(tiny_checkpoint, data, "--find-lr")
    assert (code, shown) == (3, "")
    assert "error: training needs about" in progress


def test_a_data_file_or_a_bundle_is_no_model(llm_finetune: Command, data: Path, tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text("{}")
    for model, message in (
        (data, "is no model: give the model first, then the data file"),
        (tmp_path, "is a bundle, which cannot be trained: give the checkpoint that it was made from"),
    ):
        expected = (2, "", f"error: {model} {message}\n")
        assert llm_finetune(model, data) == expected
        assert llm_finetune("check", data, "--model", model) == expected


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Callable[[int], Path]]:
    """Mounts a file system of some bytes, or resizes it, and returns its folder."""
    folder = tmp_path / "disk"
    folder.mkdir()

    def resized(size: int) -> Path:
        change = f"remount,size={size}" if folder.is_mount() else f"size={size}"
        command = ["mount", "-t", "tmpfs", "-o", change, "tmpfs", folder]
        if subprocess.run(command, capture_output=True, check=False).returncode:
            pytest.skip("no file system can be mounted")
        return folder

    if shutil.which("mount") is None:
        pytest.skip("no file system can be mounted")
    yield resized
    if folder.is_mount():
        subprocess.run(["umount", "--lazy", folder], check=True)  # the model may still be mapped


def test_09_a_full_disk_is_one_line_and_the_previous_checkpoint_continues(
    llm_finetune: Command, tiny_checkpoint: Path, data: Path, tmp_path: Path, small_disk: Callable[[int], Path]
) -> None:
    assert llm_finetune(tiny_checkpoint, data, "-o", tmp_path / "whole", *QUICK)[0] == 0
    size = (tmp_path / "whole" / FOLDER / "best.safetensors").stat().st_size
    output = small_disk(4 * size) / "out"  # holds the first checkpoint, but not the next, which has optimizer states
    code, _, shown = llm_finetune(tiny_checkpoint, data, "-o", output, *QUICK)
    assert code == 3
    (error,) = (line for line in shown.splitlines() if line.startswith("error: "))
    assert "cannot be written" in error
    assert not list(output.rglob("*.partial"))
    small_disk(100 * size)
    code, _, shown = llm_finetune(tiny_checkpoint, data, "-o", output, "--resume", "--threads", "1")
    assert code == 0, shown
    one, other = (load_file(folder / "model.safetensors") for folder in (tmp_path / "whole", output))
    assert all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning")
def test_tensorboard_reads_the_losses(llm_finetune: Command, tiny_checkpoint: Path, data: Path, tmp_path: Path) -> None:
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    code, _, shown = llm_finetune(tiny_checkpoint, data, "-o", tmp_path / "out", *QUICK, "--tensorboard")
    assert code == 0, shown
    events = accumulator.EventAccumulator(str(tmp_path / "out" / FOLDER / "tensorboard"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]
    assert [event.step for event in events.Scalars("evaluation/loss")] == [0, 2, 4]
    assert {"train/learning rate", "train/norm"} <= set(events.Tags()["scalars"])
