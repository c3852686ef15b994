"""Reads untrusted files within limits, shows untrusted values in messages, and writes files atomically."""

from __future__ import annotations

import contextlib
import json
import os
import reprlib
import secrets
import stat
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

from llm_edge.runtime.errors import BundleError, LlmEdgeError

MIB = 1 << 20


def read_bytes(path: Path, limit: int, *, error: type[LlmEdgeError] = BundleError) -> bytes:
    """The content of a regular file of at most `limit` bytes; anything else raises `error`."""
    # Opened without blocking and checked before reading, so that a pipe does not hang.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        with open(os.open(path, flags), "rb") as file:  # noqa: PTH123 (a descriptor, not a path)
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise error(f"{path}: not a regular file")
            data = file.read(limit + 1)
    except FileNotFoundError as e:
        raise error(f"{path}: no such file") from e
    except IsADirectoryError as e:
        raise error(f"{path}: is a folder, not a file") from e
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        raise error(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}") from e
    if len(data) > limit:
        raise error(f"{path}: larger than the limit of {limit:,} bytes")
    return data


def read_text(path: Path, limit: int, *, error: type[LlmEdgeError] = BundleError) -> str:
    """The UTF-8 text of a regular file, with line ends unchanged; anything else raises `error`."""
    data = read_bytes(path, limit, error=error)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise error(f"{path}: not UTF-8 text (byte {e.start})") from e


def read_json(path: Path, limit: int = 16 * MIB, *, error: type[LlmEdgeError] = BundleError) -> dict[str, Any]:
    """The JSON object in a file; anything else raises `error`."""
    text = read_text(path, limit, error=error)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as e:
        raise error(f"{path}: not JSON: {e.msg} (line {e.lineno}, column {e.colno})") from e
    except RecursionError as e:
        raise error(f"{path}: JSON nested too deeply") from e
    except ValueError as e:  # an integer of thousands of digits
        raise error(f"{path}: unusable JSON: {e}") from e
    if not isinstance(value, dict):
        raise error(f"{path}: expected a JSON object, not {_KINDS.get(type(value), 'a number')}")
    return value


_KINDS: dict[type, str] = {list: "an array", str: "a string", bool: "true or false", type(None): "null"}


def inside(folder: Path, name: str, *, error: type[LlmEdgeError] = BundleError) -> Path:
    """`folder / name`; a name that leaves the folder, also through a symbolic link, raises `error`."""
    parts = name.split("/")
    if not name or "\0" in name or "\\" in name or ":" in name or ".." in parts or "" in parts:
        raise error(f"{folder}: {name!r} is not a plain path inside this folder")
    path = folder / name
    try:
        leaves = not path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError) as e:  # a loop of links, or a name that no file system allows
        raise error(f"{path}: cannot be followed: {e}") from e
    if leaves:
        raise error(f"{path}: a link to outside of {folder}")
    return path


def write_atomically(
    path: Path, content: bytes | Callable[[IO[bytes]], object], *, overwrite: bool = True, private: bool = False
) -> None:
    """Write a file completely or not at all.

    Args:
        path: the file; its folder exists.
        content: the bytes, or a function that writes them to a binary file.
        overwrite: replace an existing file.
        private: only the user may read and write the file.

    Raises:
        FileExistsError: the file exists and is not to be overwritten.
        OSError, ValueError: it cannot be written; ValueError for a name that no file can have.
    """
    temporary = path.with_name(f".{secrets.token_hex(8)}.partial")
    try:
        temporary.touch(0o600 if private else 0o666, exist_ok=False)
        with temporary.open("wb") as file:
            content(file) if callable(content) else file.write(content)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            temporary.replace(path)
        else:
            _rename_to_new(temporary, path)
    finally:
        with contextlib.suppress(OSError, ValueError):
            temporary.unlink()


def _rename_to_new(source: Path, path: Path) -> None:
    try:
        path.hardlink_to(source)  # unlike a rename, this never replaces a file that was created meanwhile
    except FileExistsError:
        raise
    except OSError:  # a file system without links
        path.open("x").close()
        source.replace(path)


_REPR_LIMIT = 80

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _REPR_LIMIT


def short_repr(value: object) -> str:
    """A value from an untrusted file as one short line of ASCII, for messages."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"an integer of {value.bit_length()} bits"
    shown = repr(value[:_REPR_LIMIT]) if isinstance(value, str | bytes) else _repr.repr(value)
    shown = shown.encode("ascii", "backslashreplace").decode()
    return shown if len(shown) <= _REPR_LIMIT + 20 else shown[:_REPR_LIMIT] + "..."
