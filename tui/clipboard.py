"""What is copied, where the terminal's own way (OSC 52) does not lead. Knows no widgets."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess

_PATIENCE = 5.0  # seconds


def to_tmux(text: str) -> None:
    """Put a text into tmux's buffer, if this runs in tmux, and by that into the clipboard of the terminal around it.

    With its usual `set-clipboard external` tmux does not take OSC 52 from the programs in it.
    """
    if not os.environ.get("TMUX") or not text or (tmux := shutil.which("tmux")) is None:
        return
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # as if there were no tmux
        subprocess.run(  # noqa: S603 (no shell)
            [tmux, "load-buffer", "-w", "-"],
            input=text.encode("utf-8", "replace"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_PATIENCE,
            check=False,
        )
