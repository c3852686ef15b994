"""Files that a person names, to be written whole or not at all. Knows nothing of what is in them."""

from __future__ import annotations

import contextlib
import os
import secrets
from pathlib import Path

from llm_edge.chat.text import without_surrogates
from llm_edge.runtime.errors import InputError


def write_file(name: str, text: str, *, overwrite: bool = False) -> None:
    """Write a file, whole or not at all; a leading `~` is the user's home.

    Raises:
        InputError: the file is there already and `overwrite` was not said, or it cannot be written.
    """
    try:
        path = Path(name).expanduser()
        if overwrite:
            path = path.resolve()  # a link stays one
            if path.is_dir():
                raise InputError(f"{name} is a folder: choose another name")
        elif os.path.lexists(path):
            raise FileExistsError
        _write(path, without_surrogates(text), overwrite)
    except FileExistsError as e:
        raise InputError(f"{name} exists already: choose another name") from e
    except (OSError, ValueError, RuntimeError) as e:  # the last two: what no path can be
        why = e.strerror if isinstance(e, OSError) else e
        raise InputError(f"{name} cannot be written ({why}): choose another name") from e


def _write(path: Path, text: str, overwrite: bool) -> None:
    beside = path.with_name(f".{secrets.token_hex(8)}.part")
    try:
        with beside.open("x", encoding="utf-8", newline="\n") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        if overwrite:
            beside.replace(path)
            return
        try:
            path.hardlink_to(beside)  # unlike a rename, this leaves alone what came into being meanwhile
        except FileExistsError:
            raise
        except OSError:  # a file system without links
            with path.open("x", encoding="utf-8"):
                pass
            beside.replace(path)
    finally:
        with contextlib.suppress(OSError):
            beside.unlink()
