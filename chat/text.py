"""Text made fit to be shown or stored: one line, a snippet, no control characters."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

LONGEST_TITLE = 200  # characters of any title


def one_line(text: str, limit: int = LONGEST_TITLE) -> str:
    """The text with its white space made single spaces, cut to `limit` characters at a sensible place."""
    text = " ".join(text[: 20 * limit].split())
    if len(text) <= limit:
        return text
    end = limit - 1
    spaced = text.rfind(" ", limit // 2, limit)
    if spaced > 0:
        end = spaced
    else:  # no words, as in Chinese; what belongs to the character before stays with it
        while end > 1 and _joins(text[end - 1], text[end]):
            end -= 1
    return text[:end].rstrip(" ,;:-\u2013\u2014") + "…"


def snippet(text: str, words: Iterable[str], width: int = 100) -> str:
    """One line of the text, about `width` characters long, around the first of these words that it holds."""
    places = (re.search(re.escape(word), text, re.IGNORECASE) for word in words)
    found = min((place.start() for place in places if place), default=0)
    start = max(0, found - width // 3)
    if start > 0:
        space = text.find(" ", start, found)
        start = space + 1 if space >= 0 else start
    shown = one_line(text[start : start + 4 * width], width)
    return f"…{shown}" if start > 0 else shown


def without_surrogates(text: str) -> str:
    """The text with halves of surrogate pairs, which no encoding holds, joined or else replaced by U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


# Control characters but line feed and tab (ESC and the C1 range begin terminal commands), the marks that reorder
# text (Unicode bidirectional controls, which can make it read as something else), and halves of surrogate pairs,
# which no terminal's encoding holds.
_FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text without anything that a terminal would obey."""
    return _FORBIDDEN.sub("", text)


def _joins(before: str, after: str) -> bool:
    """Whether a cut between these characters would tear one apart."""
    return unicodedata.category(after) in ("Mn", "Mc", "Me", "Cf", "Sk") or before == "\u200d"
