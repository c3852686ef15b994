"""Checkpoints of a run in progress, written atomically; a resumed run continues to the bit on a CPU."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from llm_edge.finetune.distributed import distributed_like, whole
from llm_edge.finetune.saving import write_tensors, writing
from llm_edge.runtime.errors import InputError, ParameterError

FOLDER = "training"
"""Name of the folder of a run's files within its output folder."""
_LAST, _BEST = "last.safetensors", "best.safetensors"
_UNNAMED = {"data": "the data", "model": "the model"}  # settings that are no options
_STATES = ("exp_avg", "exp_avg_sq")


@dataclass
class Progress:
    """How far a run is.

    Attributes:
        step: number of finished optimizer steps, which is also the position in the data.
        best_loss: lowest evaluation loss so far, or None.
        best_step: the step after which it was measured.
        stale: number of evaluations since then.
        stopped: whether the run was stopped early.
        steps: a record per step: loss, learning rate, norm of the gradient.
        evaluations: a record per evaluation: step and loss.
    """

    step: int = 0
    best_loss: float | None = None
    best_step: int = 0
    stale: int = 0
    stopped: bool = False
    steps: list[dict[str, float]] = field(default_factory=list)
    evaluations: list[dict[str, float]] = field(default_factory=list)


class CheckpointFiles:
    """The checkpoints in a run's folder: the last one, complete, and the weights of the best one.

    Args:
        output: output folder of the run.
        settings: what determines the result of the run: a resumed run must have the same.
    """

    def __init__(self, output: Path, settings: Mapping[str, Any]) -> None:
        self.folder = output / FOLDER
        self._settings = dict(settings)

    @property
    def exists(self) -> bool:
        """Whether there is a checkpoint to continue from."""
        return (self.folder / _LAST).is_file()

    def save(
        self,
        progress: Progress,
        parameters: Mapping[str, nn.Parameter],
        optimizer: torch.optim.Optimizer,
        *,
        write: bool = True,
    ) -> None:
        """Write the last checkpoint. The previous one stays intact if this fails or is killed.

        Sharded processes all call this, because each has a part of the tensors; one of them is to `write`.

        Raises:
            MachineError: the disk is full or cannot be written.
        """
        tensors = {"rng": torch.get_rng_state()}
        for name, parameter in parameters.items():
            state = optimizer.state.get(parameter, {})
            found = {"weight": parameter.detach(), **{key: state[key] for key in _STATES if key in state}}
            tensors |= {f"{key}/{name}": whole(value) for key, value in found.items()}
        if write:
            self._write(_LAST, tensors, {"progress": dataclasses.asdict(progress), "settings": self._settings})

    def save_best(self, parameters: Mapping[str, nn.Parameter], *, write: bool = True) -> None:
        """Write the weights of the best evaluation; see `save`.

        Raises:
            MachineError: the disk is full or cannot be written.
        """
        tensors = {name: whole(parameter.detach()) for name, parameter in parameters.items()}
        if write:
            self._write(_BEST, tensors, {})

    def load(self, parameters: Mapping[str, nn.Parameter], optimizer: torch.optim.Optimizer) -> Progress:
        """Restore the last checkpoint into the parameters and the optimizer.

        Raises:
            InputError: there is none, or it is damaged.
            ParameterError: the run was started with other settings.
        """
        if not self.exists:
            raise InputError(f"{self.folder.parent} has no checkpoint to resume: start without --resume")
        tensors, content = self._read(_LAST)
        self._check_settings(content["settings"])
        progress = Progress(**content["progress"])
        torch.set_rng_state(tensors["rng"])
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(distributed_like(tensors[f"weight/{name}"], parameter))
                found = {key: tensors[f"{key}/{name}"] for key in _STATES if f"{key}/{name}" in tensors}
                if found:
                    step = torch.tensor(float(progress.step), device=parameter.device)
                    states = {key: distributed_like(value, parameter) for key, value in found.items()}
                    optimizer.state[parameter] = {"step": step, **states}
        return progress

    def load_best(self, parameters: Mapping[str, nn.Parameter]) -> None:
        """Replace the parameters by those of the best evaluation."""
        tensors, _ = self._read(_BEST)
        with torch.no_grad():
            for name, parameter in parameters.items():
                parameter.copy_(distributed_like(tensors[name], parameter))

    def stored_settings(self) -> dict[str, Any]:
        """Return the settings of the interrupted run; empty if there is no checkpoint.

        Raises:
            InputError: the checkpoint is damaged.
        """
        return dict(self._read(_LAST, tensors=False)[1]["settings"]) if self.exists else {}

    def _check_settings(self, found: Mapping[str, Any]) -> None:
        for key, value in self._settings.items():
            if found.get(key) != value:
                name, values = f"--{key.replace('_', '-')}", f" ({found.get(key)}, now {value})"
                if key in _UNNAMED:
                    name, values = _UNNAMED[key], ""
                raise ParameterError(
                    f"--resume: {name} differs from the interrupted run{values}: use the same, or start anew "
                    "with --force"
                )

    def _write(self, name: str, tensors: Mapping[str, Tensor], content: Mapping[str, Any]) -> None:
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            on_cpu = {key: tensor.cpu().contiguous() for key, tensor in tensors.items()}
            write_tensors(self.folder / name, on_cpu, {"content": json.dumps(content)})

    def _read(self, name: str, *, tensors: bool = True) -> tuple[dict[str, Tensor], dict[str, Any]]:
        path = self.folder / name
        try:
            with safe_open(path, "pt") as file:
                found = {key: file.get_tensor(key) for key in (file.keys() if tensors else ())}
                content = json.loads(file.metadata()["content"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise InputError(f"{path}: damaged checkpoint: start anew with --force") from error
        return found, content


def remove_partial_files(folder: Path) -> None:
    """Remove files that a killed run left unfinished."""
    for path in folder.glob(".*.partial"):
        with contextlib.suppress(OSError):
            path.unlink()
