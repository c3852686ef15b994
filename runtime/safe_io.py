"""Handling what nobody vouches for: files are read, and values are built, within bounds.

Knows nothing of what the files mean, nor in which language the program is written that builds the values.
"""

from __future__ import annotations

import json
import os
import stat
from pathlib import Path
from typing import Any

from llm_edge.runtime.errors import BundleError, LlmEdgeError

MIB = 1 << 20


def read_bytes(path: Path, limit: int, *, error: type[LlmEdgeError] = BundleError) -> bytes:
    """Return the content of a regular file of at most `limit` bytes; whatever else it is raises `error`."""
    # Not to hang on a pipe, the file is opened without waiting and looked at before it is read.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_CLOEXEC", 0)
    try:
        with open(os.open(path, flags), "rb") as file:  # noqa: PTH123 (a descriptor, not a path)
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise error(f"{path}: not a regular file")
            data = file.read(limit + 1)
    except FileNotFoundError as e:
        raise error(f"{path}: no such file") from e
    except IsADirectoryError as e:
        raise error(f"{path}: a folder, not a file") from e
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        raise error(f"{path}: cannot be read: {getattr(e, 'strerror', None) or e}") from e
    if len(data) > limit:
        raise error(f"{path}: larger than the {limit:,} bytes allowed for it")
    return data


def read_text(path: Path, limit: int, *, error: type[LlmEdgeError] = BundleError) -> str:
    """Return the UTF-8 text of a regular file, line ends untouched; anything else raises `error`."""
    data = read_bytes(path, limit, error=error)
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as e:
        raise error(f"{path}: not UTF-8 text (byte {e.start})") from e


def read_json(path: Path, limit: int = 16 * MIB, *, error: type[LlmEdgeError] = BundleError) -> dict[str, Any]:
    """Return the JSON object in a file; whatever else it is raises `error`."""
    text = read_text(path, limit, error=error)
    try:
        value = json.loads(text)
    except json.JSONDecodeError as e:
        raise error(f"{path}: not JSON: {e.msg} (line {e.lineno}, column {e.colno})") from e
    except RecursionError as e:
        raise error(f"{path}: JSON nested too deep") from e
    except ValueError as e:  # an integer of thousands of digits
        raise error(f"{path}: not JSON that can be used: {e}") from e
    if not isinstance(value, dict):
        raise error(f"{path}: a JSON object was expected, not {_KINDS.get(type(value), 'a number')}")
    return value


_KINDS: dict[type, str] = {list: "an array", str: "a string", bool: "true or false", type(None): "null"}


def inside(folder: Path, name: str, *, error: type[LlmEdgeError] = BundleError) -> Path:
    """Return `folder / name`; a name that leaves the folder, also by a symbolic link, raises `error`."""
    parts = name.split("/")
    if not name or "\0" in name or "\\" in name or ":" in name or ".." in parts or "" in parts:
        raise error(f"{folder}: the file name {name!r} is not a plain path inside this folder")
    path = folder / name
    try:
        leaves = not path.resolve().is_relative_to(folder.resolve())
    except (OSError, RuntimeError, ValueError) as e:  # a loop of links, a name no file system can hold
        raise error(f"{path}: cannot be followed: {e}") from e
    if leaves:
        raise error(f"{path}: a link that leaves {folder}")
    return path
