"""Checkpoints of a run: complete, atomic, and continued to the bit (checks 8 and 9)."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from project import ROOT
from tiny_training import OPTIONS, digest, run, tiny_decoder

from llm_edge.finetune import saving
from llm_edge.finetune.checkpoint_files import CheckpointFiles
from llm_edge.finetune.training import Listener, Step
from llm_edge.runtime.errors import InputError, MachineError, ParameterError


def test_08_runs_killed_at_random_points_resume_to_the_same_bits(tmp_path: Path) -> None:
    """SIGKILL at three random lines of the source, in the middle of a step or of writing a file as well."""
    script = ROOT / "tests" / "support" / "tiny_training.py"
    done = subprocess.run(
        [sys.executable, script, tmp_path, "5", "3"], capture_output=True, text=True, check=False, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert len(found["resumed"]) == 3
    assert set(found["resumed"].values()) == {found["whole"]}


class Interrupt(Listener):
    """Sends a signal to this process in a step."""

    def __init__(self, number: int, step: int) -> None:
        self._number, self._step = number, step

    def on_step(self, step: Step) -> None:
        if step.number == self._step:
            os.kill(os.getpid(), self._number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("lora", [False, True])
def test_08_an_interrupted_run_resumes_to_the_same_bits(lora: bool, number: int, tmp_path: Path) -> None:
    whole, _ = run(tmp_path / "whole", tiny_decoder(lora=lora))
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "part", tiny_decoder(lora=lora), listener=Interrupt(number, 4))
    resumed, progress = run(tmp_path / "part", tiny_decoder(lora=lora), resume=True)
    assert progress.step == OPTIONS.steps == len(progress.steps)
    assert digest(resumed) == digest(whole)


def test_08_an_interruption_between_the_rows_of_a_step_loses_that_step_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llm_edge.finetune import step

    whole, _ = run(tmp_path / "whole")
    original, calls = step.batch_loss, []

    def counted(*arguments: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 8:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*arguments)

    monkeypatch.setattr(step, "batch_loss", counted)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "part")
    monkeypatch.undo()
    assert digest(run(tmp_path / "part", resume=True)[0]) == digest(whole)


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
def test_09_a_failure_while_saving_leaves_the_previous_checkpoint(
    error: BaseException, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = run(tmp_path / "whole")
    real, calls = saving.save_file, []

    def failing(tensors: Any, path: Path, metadata: Any) -> None:
        calls.append(1)
        if len(calls) == 4:  # the last checkpoint after step 3
            Path(path).write_bytes(b"half a file")
            raise error
        real(tensors, path, metadata)

    monkeypatch.setattr(saving, "save_file", failing)
    with pytest.raises(MachineError if isinstance(error, OSError) else KeyboardInterrupt) as raised:
        run(tmp_path / "part")
    if isinstance(error, OSError):
        assert "No space left on device" in str(raised.value)
        assert "\n" not in str(raised.value)
    monkeypatch.undo()
    assert not list((tmp_path / "part").rglob("*.partial"))
    resumed, _ = run(tmp_path / "part", resume=True)
    assert digest(resumed) == digest(whole)


def test_resuming_requires_a_checkpoint_of_the_same_run(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="has no checkpoint to resume"):
        run(tmp_path, resume=True)
    run(tmp_path, steps=1)
    with pytest.raises(ParameterError, match=r"--learning-rate differs from the interrupted run \(0.01, now 0.5\)"):
        run(tmp_path, resume=True, learning_rate=0.5)
    files = CheckpointFiles(tmp_path, {})
    path = files.folder / "last.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match=r"last\.safetensors: damaged checkpoint"):
        run(tmp_path, resume=True)


def test_a_finished_run_resumes_to_itself(tmp_path: Path) -> None:
    first, _ = run(tmp_path)
    again, progress = run(tmp_path, resume=True)
    assert progress.step == OPTIONS.steps
    assert digest(again) == digest(first)
