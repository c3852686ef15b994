"""Writes a bundle atomically: in a temporary sibling folder that replaces the target when it is complete."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from llm_edge.runtime.bundle import MANIFEST
from llm_edge.runtime.errors import InputError, MachineError

_OUT_OF_MEMORY = "DefaultCPUAllocator"  # part of torch's RuntimeError
_INPUT_ERRORS = (errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


def check_target(target: Path, force: bool) -> None:
    """Raise InputError unless the target can be created or, with `force`, is a bundle that can be replaced."""
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise InputError(f"{target} exists and is not a folder: choose another one with -o")
    if not target.exists() or (force and not any(target.iterdir())):
        return
    foreign = _foreign_file(target)
    if foreign is not None:
        raise InputError(
            f"{target} exists and contains {foreign}, which is not part of a bundle: choose another folder with -o"
        )
    if not force:
        raise InputError(f"{target} exists: choose another folder with -o, or replace it with --force")


def _foreign_file(folder: Path) -> str | None:
    """Return a file or folder that the manifest in `folder` does not list; without a valid manifest, any of them."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        known = {MANIFEST, *manifest["files"]} if "precisions" in manifest and "format_version" in manifest else set()
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        known = set()
    parents = {str(parent) for name in known for parent in Path(name).parents}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if name not in known and not (name in parents and path.is_dir() and not path.is_symlink()):
            return name
    return None


@contextlib.contextmanager
def staging(target: Path, force: bool) -> Iterator[Path]:
    """Yield a temporary sibling folder, which becomes the target on success and is removed on failure.

    Raises:
        InputError: the target cannot be created there, or another process created it in the meantime.
        MachineError: disk or memory is full, or writing failed.
    """
    folder = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        yield folder
        for path in folder.rglob("*"):
            _fsync(path)
        _fsync(folder)
        _move(folder, target, force)
        _fsync(target.parent)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and _OUT_OF_MEMORY not in str(error):
            raise
        raise MachineError(f"not enough memory to export to {target}") from error
    except OSError as error:
        where = error.filename if error.filename is not None and error.errno != errno.ENOSPC else target.parent
        why = error.strerror or f"{error}; is the disk full?"  # a short write has no errno
        if error.errno in _INPUT_ERRORS:
            raise InputError(f"{where}: cannot create a folder there ({why}): choose another one with -o") from error
        raise MachineError(
            f"{where}: cannot write the bundle ({why}): free disk space or choose another folder with -o"
        ) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move(folder: Path, target: Path, force: bool) -> None:
    """Rename the folder to the target; an old bundle is removed after the new one is in place."""
    if force and target.exists():
        old = target.with_name(f".{target.name}.old-{secrets.token_hex(4)}")
        target.rename(old)
        try:
            folder.rename(target)
        except BaseException:
            old.rename(target)
            raise
        shutil.rmtree(old, ignore_errors=True)
        return
    try:
        folder.rename(target)
    except OSError as error:
        if error.errno in (errno.ENOTEMPTY, errno.EEXIST):
            raise InputError(
                f"{target} was created by another process: choose another folder with -o, or replace it with --force"
            ) from error
        raise


def check_disk_space(folder: Path, needed: int) -> None:
    """Raise MachineError if a number of bytes does not fit on the disk of a folder."""
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MachineError(
            f"{folder.parent}: the bundle needs about {needed / 1e6:,.1f} MB, but only {free / 1e6:,.1f} MB are free: "
            "free disk space or choose another folder with -o"
        )


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
