"""`Journal`: the completed steps of a calibration, on disk, so that an interrupted one can be continued."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_edge.runtime.errors import InputError

_FILE = "journal.jsonl"


class Journal:
    """Completed steps and their results. A step counts as completed once its line is in the file `journal.jsonl`.

    Args:
        folder: of all files of the calibration; empty, or that of an interrupted one.
        kept: whether to write to disk what is needed to continue.

    Attributes:
        folder: see above.
        steps: the results of the steps that were completed, by name, in order.

    Raises:
        InputError: a file of the interrupted calibration is damaged.
    """

    def __init__(self, folder: Path, *, kept: bool = False) -> None:
        self.folder = folder
        self.steps: dict[str, Any] = {}
        self._kept = kept
        if kept:
            self._read()

    @property
    def size(self) -> int:
        """Bytes of all files in the folder."""
        return sum(path.stat().st_size for path in self.folder.rglob("*"))

    def complete(self, step: str, result: object, files: Iterable[Path] = ()) -> None:
        """Add a step, of which `files` are results too; the result consists of JSON's types."""
        if not self._kept:
            return
        for path in files:
            with path.open("rb+") as file:
                os.fsync(file.fileno())
        self.steps[step] = result
        with (self.folder / _FILE).open("a", encoding="utf-8") as journal:
            journal.write(json.dumps([step, result]) + "\n")
            journal.flush()
            os.fsync(journal.fileno())

    def save(self, name: str, tensors: Sequence[Tensor], *, always: bool = False) -> None:
        """Write tensors for a resumed calibration, or `always`: this one loads them too."""
        if self._kept or always:
            with (self.folder / name).open("wb") as file:
                torch.save(list(tensors), file)
                if self._kept:
                    file.flush()
                    os.fsync(file.fileno())

    def load(self, name: str) -> list[Tensor]:
        """Return tensors that were saved."""
        try:
            tensors: list[Tensor] = torch.load(self.folder / name, weights_only=True)
        except Exception as error:
            raise self._damaged(name) from error
        return tensors

    def discard(self, name: str) -> None:
        """Delete tensors that no step needs any more."""
        if self._kept:
            (self.folder / name).unlink(missing_ok=True)

    def _read(self) -> None:
        path = self.folder / _FILE
        content = path.read_bytes() if path.exists() else b""
        complete = content[: content.rfind(b"\n") + 1]
        if complete != content:  # the process was killed while it wrote the last line
            path.write_bytes(complete)
        try:
            self.steps = dict(json.loads(line) for line in complete.splitlines())
        except ValueError as error:
            raise self._damaged(_FILE) from error

    def _damaged(self, name: str) -> InputError:
        return InputError(f"{self.folder / name} is damaged: start the export again with --force")
