"""Where a bundle is made: a temporary folder beside its place, which takes that place whole or not at all.

Knows nothing of what a bundle holds beyond its manifest.
"""

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

_NO_MEMORY = "DefaultCPUAllocator"  # in torch's RuntimeError
_INPUT_ERRORS = (errno.EEXIST, errno.ENOTDIR, errno.ENAMETOOLONG, errno.ELOOP)


def check_target(target: Path, force: bool) -> None:
    """Refuse a place that is taken; `force` allows a bundle there, and nothing else.

    Raises:
        InputError: it is taken.
    """
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise InputError(f"{target} exists and is not a folder: choose another one with -o")
    if not target.exists() or (force and not any(target.iterdir())):
        return
    strange = _strange(target)
    if strange is not None:
        raise InputError(
            f"{target} exists and holds {strange}, which is no part of a bundle: choose another folder with -o"
        )
    if not force:
        raise InputError(f"{target} exists: choose another folder with -o, or replace it with --force")


def _strange(folder: Path) -> str | None:
    """Something in a folder that its manifest does not list; all of it where there is no manifest of ours."""
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
    """A temporary sibling folder that becomes the target when the block ends well, and vanishes when not.

    Raises:
        InputError: the target cannot be made there, or was made by somebody else meanwhile.
        MachineError: disk or memory failed; nothing was left.
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
        if isinstance(error, RuntimeError) and _NO_MEMORY not in str(error):
            raise
        raise MachineError(f"not enough memory to export to {target}") from error
    except OSError as error:
        where = error.filename if error.filename is not None and error.errno != errno.ENOSPC else target.parent
        why = error.strerror or f"{error}; is the disk full?"  # a short write has a text alone
        if error.errno in _INPUT_ERRORS:
            raise InputError(f"{where}: no folder can be made there ({why}): choose another one with -o") from error
        raise MachineError(f"{where}: cannot write the bundle ({why}); nothing was left") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _move(folder: Path, target: Path, force: bool) -> None:
    """Give the folder its name; what is replaced stays until the new one is there."""
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
                f"{target} was made by somebody else meanwhile: choose another one with -o, or replace it with --force"
            ) from error
        raise


def make_room(folder: Path, needed: int) -> None:
    """Refuse before the work begins where the disk cannot hold so many bytes.

    Raises:
        MachineError: it cannot.
    """
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MachineError(
            f"{folder.parent}: the bundle needs about {needed / 1e6:,.1f} MB, {free / 1e6:,.1f} MB are free: make room"
        )


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
