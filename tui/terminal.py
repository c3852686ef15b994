"""Output to a terminal. Text of models and files is cleaned first: it must not control the terminal."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO

from llm_edge.chat.text import printable


class ReasoningOutput:
    """Writes the reasoning of one answer: dim on terminals that support it, and separated by an empty line.

    Args:
        stream: receives it; None = nothing is written.
        instead: written once in place of the reasoning.
    """

    def __init__(self, stream: TextIO | None, *, instead: str | None = None) -> None:
        self._stream = stream
        self._instead = instead
        self._last = ""

    def write(self, text: str) -> None:
        """Write some reasoning; each call resets the style, so that an interruption does not leave the terminal dim."""
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

    def end(self, *, gap: bool = True) -> None:
        """End the line if anything was written, and add an empty line if `gap`."""
        if self._stream is not None and self._last:
            self._stream.write("\n" * ((self._last != "\n") + gap))
            self._stream.flush()
            self._last = ""


def _can_dim() -> bool:
    if sys.platform == "win32":
        return "WT_SESSION" in os.environ  # older consoles print the escape codes
    return os.environ.get("TERM", "dumb") != "dumb"


@contextlib.contextmanager
def without_echo() -> Iterator[None]:
    """Turn echo off: keys pressed meanwhile are not shown, and can be read afterwards."""
    try:
        import termios
    except ImportError:  # Windows
        termios = None  # type: ignore[assignment]
    if termios is None or sys.platform == "win32" or not sys.stdin.isatty():
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    local_modes = 3
    quiet = [*before]
    quiet[local_modes] &= ~termios.ECHO
    termios.tcsetattr(sys.stdin, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(sys.stdin, termios.TCSADRAIN, before)
