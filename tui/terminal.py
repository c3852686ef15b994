"""Text on its way to a terminal. Models and files are not trusted to speak to the terminal itself."""

from __future__ import annotations

import re

# Control characters but line feed and tab (ESC and the C1 range begin terminal commands), and the marks that
# reorder text (Unicode bidirectional controls, which can make it read as something else).
_FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def printable(text: str) -> str:
    """The text without anything that a terminal would obey."""
    return _FORBIDDEN.sub("", text)
