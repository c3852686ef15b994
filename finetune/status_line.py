"""`StatusLine`: progress on stderr, in one line that is updated."""

from __future__ import annotations

import sys
import time
from typing import TextIO

_LINE_SECONDS = 10.0  # between lines where output is no terminal
_UPDATE_SECONDS = 0.1  # between updates in a terminal


class StatusLine:
    """One line that is updated in a terminal; otherwise a line every ten seconds."""

    def __init__(self, stream: TextIO | None = None) -> None:
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._printed = time.monotonic()

    def update(self, text: str, *, at_once: bool = False) -> None:
        """Show a text in place of the last one, now or if enough time has passed since then."""
        now = time.monotonic()
        if not at_once and now - self._printed < (_UPDATE_SECONDS if self._terminal else _LINE_SECONDS):
            return
        self._printed = now
        self._stream.write(f"\r\x1b[K{text}" if self._terminal else f"{text}\n")
        self._stream.flush()

    def clear(self) -> None:
        """Remove the updated line of a terminal."""
        if self._terminal:
            self._stream.write("\r\x1b[K")
            self._stream.flush()

    def message(self, text: str) -> None:
        """Print a line that stays."""
        self.clear()
        self._stream.write(f"{text}\n")
        self._stream.flush()
