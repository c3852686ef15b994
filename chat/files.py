"""`write_file`: writes a text file that the user named."""

from __future__ import annotations

import os
from pathlib import Path

from llm_edge.chat.text import without_surrogates
from llm_edge.runtime.errors import InputError
from llm_edge.runtime.safe_io import write_atomically


def write_file(name: str, text: str, *, overwrite: bool = False) -> None:
    """Write a file completely or not at all; a leading `~` is the user's home folder.

    Raises:
        InputError: the file exists and is not to be overwritten, or cannot be written.
    """
    try:
        path = Path(name).expanduser()
        if overwrite:
            path = path.resolve()  # so that a link stays one
            if path.is_dir():
                raise InputError(f"{name} is a folder: choose another name")
        elif os.path.lexists(path):
            raise FileExistsError
        write_atomically(path, without_surrogates(text).encode(), overwrite=overwrite)
    except FileExistsError as e:
        raise InputError(f"{name} exists already: choose another name") from e
    except (OSError, ValueError, RuntimeError) as e:  # the last two: names that no file can have
        why = e.strerror if isinstance(e, OSError) else e
        raise InputError(f"{name} cannot be written ({why}): choose another name") from e
