"""Cleans text for display and storage: single lines, snippets, no control characters."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable

LONGEST_TITLE = 200  # characters of any title


def one_line(text: str, limit: int = LONGEST_TITLE) -> str:
    """The text with white space collapsed to single spaces, shortened to `limit` characters between words."""
    text = " ".join(text[: 20 * limit].split())
    if len(text) <= limit:
        return text
    end = limit - 1
    spaced = text.rfind(" ", limit // 2, limit)
    if spaced > 0:
        end = spaced
    else:  # no spaces, as in Chinese; combining characters stay with theirs
        while end > 1 and _joins(text[end - 1], text[end]):
            end -= 1
    return text[:end].rstrip(" ,;:-\u2013\u2014") + "…"


def snippet(text: str, words: Iterable[str], width: int = 100) -> str:
    """About `width` characters of the text on one line, around the first of these words that occurs in it."""
    places = (re.search(re.escape(word), text, re.IGNORECASE) for word in words)
    found = min((place.start() for place in places if place), default=0)
    start = max(0, found - width // 3)
    if start > 0:
        space = text.find(" ", start, found)
        start = space + 1 if space >= 0 else start
    shown = one_line(text[start : start + 4 * width], width)
    return f"…{shown}" if start > 0 else shown


def without_surrogates(text: str) -> str:
    """The text with surrogate pairs joined, and single surrogates, which cannot be encoded, replaced by U+FFFD."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


# Control characters except line feed and tab (ESC and C1 characters start terminal commands), bidirectional controls,
# which can make text read as something else, and surrogates, which cannot be encoded.
_FORBIDDEN = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text: str) -> str:
    """The text without characters that control a terminal."""
    return _FORBIDDEN.sub("", text)


def _joins(before: str, after: str) -> bool:
    """Whether two code points belong to one visible character."""
    return unicodedata.category(after) in ("Mn", "Mc", "Me", "Cf", "Sk") or before == "\u200d"
