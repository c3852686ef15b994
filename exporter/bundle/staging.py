"""Writes a bundle atomically: in a temporary sibling folder that replaces the target when it is complete."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from llm_edge.exporter.bundle.exchange import exchange
from llm_edge.runtime.bundle import MANIFEST
from llm_edge.runtime.errors import InputError, MachineError
from llm_edge.runtime.file_lock import locked

_OUT_OF_MEMORY = "DefaultCPUAllocator"  # part of torch's RuntimeError
_SHORTENED = "~"  # in the name of a hidden folder, before a digest of a target's name that is too long
_MAX_STEM = 255 - len("..partial-12345678")  # bytes
_HIDDEN = re.compile(r"^\.(.+)\.(partial|old)-[0-9a-f]{8}$", re.DOTALL)
# In a bundle, complete or not.
_OURS = re.compile(r"^(onnx|torchscript|calibration|logits|chat_template\.jinja|\w+\.json)$")
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


def recover(target: Path) -> list[str]:
    """Tidy up after exports next to `target` that were killed; returns what was done, as lines for the user.

    Their temporary folders are removed, and a bundle that was moved aside to be replaced gets its name back.
    """
    done: list[str] = []
    try:
        names = [path.name for path in target.parent.iterdir()]
    except OSError:  # there is no such folder yet, or `staging` reports why not
        return done
    in_use: set[str] = set()
    # Partial folders first: an old one may belong to the process that has locked a partial one.
    for match in sorted(filter(None, map(_HIDDEN.match, names)), key=lambda match: match[2], reverse=True):
        folder, stem = target.with_name(match[0]), match[1]
        name = target.name if stem == folder_name(target.name) else None if _SHORTENED in stem else stem
        with contextlib.suppress(OSError), locked(folder) as abandoned:
            if not abandoned or not _is_ours(folder):
                in_use.add(stem)
            elif match[2] == "partial":
                shutil.rmtree(folder)
                done.append(f"removed {folder}, left by an interrupted export")
            elif name is not None and stem not in in_use:
                done.append(_restore(folder, target.with_name(name)))
    return done


def _is_ours(folder: Path) -> bool:
    """Whether a folder contains only what a bundle can contain, complete or not."""
    return not folder.is_symlink() and all(_OURS.match(path.name) for path in folder.iterdir())


def _restore(old: Path, target: Path) -> str:
    """Give a bundle that was moved aside its name back, unless its replacement has it; returns what was done."""
    if target.exists():
        shutil.rmtree(old)
        return f"removed {old}, left by an interrupted export"
    old.rename(target)
    return f"restored {target}, which an interrupted export had moved aside"


def folder_name(name: str) -> str:
    """The part of a hidden folder's name that stands for the target; names may have up to 255 bytes."""
    encoded = os.fsencode(name)
    if len(encoded) <= _MAX_STEM:
        return name
    digest = hashlib.sha256(encoded).hexdigest()[:12]
    return encoded[: _MAX_STEM - len(_SHORTENED) - len(digest)].decode("utf-8", "ignore") + _SHORTENED + digest


def _hidden(target: Path, kind: str) -> Path:
    return target.with_name(f".{folder_name(target.name)}.{kind}-{secrets.token_hex(4)}")


@contextlib.contextmanager
def _temporary(target: Path) -> Iterator[Path]:
    """A new folder beside the target, locked by this process and removed at the end."""
    target.exists()  # raises OSError for a name that is too long
    target.parent.mkdir(parents=True, exist_ok=True)
    folder = _hidden(target, "partial")
    folder.mkdir()
    try:
        with locked(folder):
            yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextlib.contextmanager
def staging(target: Path, force: bool) -> Iterator[Path]:
    """Yield a temporary sibling folder, which becomes the target on success and is removed on failure.

    Raises:
        InputError: the target cannot be created there, or another process created it in the meantime.
        MachineError: disk or memory is full, or writing failed.
    """
    try:
        with _temporary(target) as folder:
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


def _move(folder: Path, target: Path, force: bool) -> None:
    """Rename the folder to the target; an old bundle is under the folder's name afterwards, or removed."""
    if force and target.exists():
        if exchange(folder, target):
            return
        old = _hidden(target, "old")
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
    """Flush a file or a folder to disk; nothing for folders where they cannot be opened (Windows)."""
    is_folder = path.is_dir()
    try:  # Windows flushes only files that are open for writing
        descriptor = os.open(path, os.O_RDONLY if is_folder else os.O_RDWR | getattr(os, "O_BINARY", 0))
    except OSError:
        if is_folder:
            return
        raise
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not is_folder or error.errno not in (errno.EINVAL, errno.EBADF):  # a file system that cannot flush folders
            raise
    finally:
        os.close(descriptor)
