"""Keeps the calibration of an interrupted export in a hidden folder beside its target, for `--resume`."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from llm_edge.checkpoint.base import Checkpoint
from llm_edge.exporter.bundle.staging import folder_name
from llm_edge.exporter.progress import Progress
from llm_edge.exporter.quantization.journal import Journal
from llm_edge.exporter.quantization.recipes import Recipe
from llm_edge.exporter.texts import Texts
from llm_edge.runtime.errors import CheckpointError, InputError, ParityError
from llm_edge.runtime.file_lock import has_locks, locked
from llm_edge.runtime.installation import version
from llm_edge.runtime.safe_io import read_json, write_atomically

_IDENTITY = "export.json"


def folder_of(target: Path) -> Path:
    """Return the folder of an interrupted export's calibration."""
    return target.with_name(f".{folder_name(target.name)}.calibration")


def check_interrupted(target: Path, *, resume: bool, force: bool) -> None:
    """Raise InputError if there is an interrupted export and neither option is given, or none to resume."""
    folder = folder_of(target)
    interrupted = (folder / _IDENTITY).is_file() and bool(Journal(folder, kept=True).steps)
    if resume and not interrupted:
        raise InputError(f"{target} has no interrupted export to resume: start without --resume")
    if interrupted and not resume and not force:
        raise InputError(
            f"{target} has an interrupted export: continue it with the same command and --resume, start again with "
            "--force, or choose another folder with -o"
        )


def identity_of(checkpoint: Checkpoint, recipes: Sequence[Recipe], texts: Texts) -> dict[str, object]:
    """Return what a calibration depends on, in JSON's types, by a name for messages."""
    return {
        "version of llm-edge": version(),
        "version of torch": torch.__version__,
        "weights": [dataclasses.asdict(file) for file in checkpoint.source.files],
        "precisions": [[recipe.name, str(recipe), _digest(recipe.choices)] for recipe in recipes if recipe.calibrated],
        "options of the model": _digest(checkpoint.config),
        "tokenizer and texts": _digest((texts.calibration, texts.probes)),
    }


def _digest(value: object) -> str:
    return hashlib.sha256(repr(value).encode()).hexdigest()


@contextlib.contextmanager
def kept_journal(
    target: Path, identity: Mapping[str, object], *, resume: bool, progress: Progress
) -> Iterator[Journal]:
    """Yield a journal in a folder beside the target, which stays there if the block is interrupted.

    Args:
        target: of the export; its parent exists.
        identity: see `identity_of`.
        resume: continue the journal that is there; otherwise it is replaced.
        progress: told where the journal is if it stays.

    Raises:
        InputError: the identity of the interrupted export is another one, or it is still running.
    """
    folder = folder_of(target)
    folder.mkdir(exist_ok=True)
    with locked(folder) as free:
        if not free and has_locks():
            raise InputError(f"another export to {target} is running: choose another folder with -o")
        if resume:
            _check_identity(target, folder, identity)
        else:
            _clear(folder)
            write_atomically(folder / _IDENTITY, json.dumps(identity, indent=1).encode(), overwrite=True)
        journal = Journal(folder, kept=True)
        try:
            yield journal
        except (CheckpointError, ParityError):  # would be raised again
            shutil.rmtree(folder, ignore_errors=True)
            raise
        except BaseException:
            if journal.steps:
                progress(
                    "interrupted", None, f"{folder} keeps what is done: continue with the same command and --resume"
                )
            else:
                shutil.rmtree(folder, ignore_errors=True)
            raise


def remove_interrupted(target: Path) -> None:
    """Remove what is kept of an interrupted export, unless it is running."""
    folder = folder_of(target)
    with locked(folder) as free:
        if free:
            shutil.rmtree(folder, ignore_errors=True)


def _check_identity(target: Path, folder: Path, identity: Mapping[str, object]) -> None:
    before = read_json(folder / _IDENTITY, error=InputError)
    changed = [name for name, value in identity.items() if before.get(name) != value]
    if changed:
        raise InputError(
            f"{target}: --resume requires the {changed[0]} of the interrupted export: repeat its command, or start "
            "again with --force"
        )


def _clear(folder: Path) -> None:
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
