"""Finds stop strings and tags in text that arrives in chunks, and holds back what may still become one."""

from __future__ import annotations

from collections.abc import Iterable


class HeldText:
    """Text that is held back until it is known whether it becomes a marker; `text` is what is held back now."""

    def __init__(self) -> None:
        self.text = ""

    def release(self, markers: Iterable[str], at_least: int = 0) -> str:
        """Release the text except its longest end that a marker starts with.

        Args:
            markers: strings that may follow, none of which the text contains.
            at_least: number of characters to hold back in any case.
        """
        held = max((overlap(self.text, marker) for marker in markers), default=0)
        end = len(self.text) - max(held, at_least)
        text, self.text = self.text[:end], self.text[end:]
        return text

    def flush(self) -> str:
        """Release everything, because no more text follows."""
        text, self.text = self.text, ""
        return text


class StopStrings(HeldText):
    """Ends a text at the first of some strings to be complete in it, however the text is divided into chunks.

    Attributes:
        found: the string that ended it; None = none has.
    """

    def __init__(self, stops: Iterable[str]) -> None:
        super().__init__()
        self.found: str | None = None
        self.change(stops)

    def change(self, stops: Iterable[str]) -> None:
        """Use other strings from here on, also in text that is held back."""
        self._stops = tuple(dict.fromkeys(filter(None, stops)))

    def push(self, text: str) -> tuple[str, bool]:
        """Add text; returns what is final now, and whether the text has ended."""
        if self.found is not None:
            return "", True
        self.text += text
        found = [(start + len(stop), start, stop) for stop in self._stops if (start := self.text.find(stop)) >= 0]
        if found:
            _, start, self.found = min(found)
            return self.flush()[:start], True
        return self.release(self._stops), False


class TagSplitter(HeldText):
    """Splits text at the tags around reasoning.

    The start tag opens reasoning only if nothing but white space precedes it in its section: later on, an answer may
    quote both tags. A repeated start tag is dropped.

    Args:
        start, end: the tags.
        inside: the text starts within reasoning.
        blank: nothing but white space precedes the text in its section.

    Attributes:
        inside: the text to come is reasoning, as far as is known.
    """

    def __init__(self, start: str, end: str, *, inside: bool = False, blank: bool = True) -> None:
        super().__init__()
        self.inside = inside
        self._start, self._end = start, end
        self._blank = blank

    def push(self, text: str) -> list[str]:
        """Add text; returns what is final now, split at the tags in it: sections alternate, starting with this one."""
        text = self.flush() + text
        parts = [""]
        while True:
            lead = text.lstrip() if self._blank else ""
            if lead.startswith(self._start):
                tag, at = self._start, len(text) - len(lead)
            elif self.inside and self._end in text:
                tag, at = self._end, text.find(self._end)
            else:
                break
            parts[-1] += text[:at]
            text = text[at + len(tag) :]
            if self.inside == (tag == self._end):
                self.inside = not self.inside
                parts.append("")
            self._blank = True
        self.text = text
        final = self.release([self._end] if self.inside else [], len(lead) if self._start.startswith(lead) else 0)
        parts[-1] += final
        self._blank = self._blank and not final.strip()
        return parts


def overlap(text: str, marker: str) -> int:
    """Length of the longest end of a text that a marker starts with, without being complete."""
    return next((n for n in range(min(len(text), len(marker) - 1), 0, -1) if text.endswith(marker[:n])), 0)
