"""Copying in tmux, where the terminal's own way (OSC 52) does not work by default."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess

_TIMEOUT = 5.0  # seconds


def copy_to_tmux(text: str) -> None:
    """Load a text into tmux's buffer, and from there into the clipboard of the outer terminal; no-op outside tmux.

    With its default `set-clipboard external`, tmux ignores OSC 52 from the programs inside it.
    """
    if not os.environ.get("TMUX") or not text or (tmux := shutil.which("tmux")) is None:
        return
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # copying with OSC 52 may still have worked
        subprocess.run(  # noqa: S603 (no shell)
            [tmux, "load-buffer", "-w", "-"],
            input=text.encode("utf-8", "replace"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_TIMEOUT,
            check=False,
        )
