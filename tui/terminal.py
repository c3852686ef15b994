"""Text on its way to a terminal. Models and files are not trusted to speak to the terminal itself."""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterator

# Control characters but line feed and tab (ESC and the C1 range begin terminal commands), the marks that reorder
# text (Unicode bidirectional controls, which can make it read as something else), and halves of surrogate pairs,
# which no terminal's encoding holds.
_FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text without anything that a terminal would obey."""
    return _FORBIDDEN.sub("", text)


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
