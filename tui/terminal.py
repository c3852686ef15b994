"""Text on its way to a terminal. Models and files are not trusted to speak to the terminal itself."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO

from llm_edge.chat.text import printable


class Aside:
    """What is said beside the answer, as reasoning: dim on a terminal that can, and set apart by an empty line.

    Args:
        stream: where it goes; None = nowhere.
        instead: written once in place of all that is written, if given.
    """

    def __init__(self, stream: TextIO | None, *, instead: str | None = None) -> None:
        self._stream = stream
        self._instead = instead
        self._last = ""

    def write(self, text: str) -> None:
        """Write a piece; every piece is dimmed by itself, so that no interruption leaves the terminal dim."""
        if self._stream is None or not text:
            return
        if self._instead is not None:
            text, self._instead = self._instead, ""
            if not text:
                return
        self._last = text[-1]
        if self._stream.isatty():
            text = printable(text)
            text = f"\x1b[2m{text}\x1b[0m" if _can_dim() else text
        self._stream.write(text)
        self._stream.flush()

    def end(self, *, apart: bool = True) -> None:
        """End its line, if anything was written, and leave an empty one if the answer follows."""
        if self._stream is not None and self._last:
            self._stream.write("\n" * ((self._last != "\n") + apart))
            self._stream.flush()
            self._last = ""


def _can_dim() -> bool:
    if sys.platform == "win32":
        return "WT_SESSION" in os.environ  # older consoles would show the commands
    return os.environ.get("TERM", "dumb") != "dumb"


@contextlib.contextmanager
def without_echo() -> Iterator[None]:
    """Keys pressed meanwhile do not show in what is written; they stay there for whoever reads next."""
    if sys.platform == "win32" or not sys.stdin.isatty():
        yield
        return
    import termios

    before = termios.tcgetattr(sys.stdin)
    local_modes = 3
    quiet = [*before]
    quiet[local_modes] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
