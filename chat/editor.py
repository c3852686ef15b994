"""`edit_text`: a text in the editor that the user's environment names."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from llm_edge.chat.attachments import MAX_SIZE, text_of
from llm_edge.chat.text import printable
from llm_edge.runtime.errors import InputError

_EDITORS = ("nano", "vim", "vi")


def editor_command() -> list[str]:
    """The editor: $VISUAL, else $EDITOR, else one that is usually installed.

    Raises:
        InputError: there is none.
    """
    for variable in ("VISUAL", "EDITOR"):
        if value := os.environ.get(variable, "").strip():
            try:
                command = shlex.split(value, posix=sys.platform != "win32")
            except ValueError:
                command = []
            if not command or shutil.which(command[0]) is None:
                raise InputError(f"{variable}={value}: no such program: set it to your editor")
            return command
    candidates = ("notepad",) if sys.platform == "win32" else _EDITORS
    for name in candidates:
        if (found := shutil.which(name)) is not None:
            return [found]
    raise InputError("no editor found: set EDITOR to one")


def edit_text(text: str) -> str:
    """Let the user edit a text; returns it as it was saved.

    Raises:
        InputError: there is no editor, it failed, or what it saved is not text.
    """
    command = editor_command()
    with tempfile.TemporaryDirectory(prefix="llm-edge-") as folder:  # readable by this user alone
        file = Path(folder) / "question.md"
        file.write_text(text, encoding="utf-8")
        try:
            words = [*command, str(file)]
            code = subprocess.run(words, stderr=_real_stderr(), check=False).returncode  # noqa: S603 (the user's choice)
            if code != 0:
                raise InputError(f"{command[0]} ended with exit code {code}: the question is unchanged")
            with file.open("rb") as saved:
                return printable(text_of(saved.read(MAX_SIZE + 1), "the edited question")).rstrip("\n")
        except OSError as error:
            raise InputError(f"{command[0]}: {error.strerror or error}: set EDITOR to your editor") from error


def _real_stderr() -> int | None:
    """The descriptor of `sys.stderr`: commands hide file descriptor 2. None = inherit that."""
    try:
        return sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):  # None, or no file
        return None
