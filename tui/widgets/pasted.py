"""`PastedTexts`: long texts of the composer, each shown as a short label so that typing next to it stays fast."""

from __future__ import annotations

import re

_MAX_CHARACTERS, _MAX_LINES = 4_000, 60  # of a text that is shown as it is
_MAX_TOTAL = 12_000  # characters that are shown as they are
_SHORT = 200  # characters; shorter texts never get a label
_LABEL = re.compile(r"\[Pasted text \d+: [^\]\n]*\]")


class PastedTexts:
    """Labels for long texts, and the texts that they stand for."""

    def __init__(self) -> None:
        self._texts: dict[str, str] = {}

    def shortened(self, text: str, beside: int = 0, *, always: bool = False) -> str:
        """A label for a long text; other texts unchanged.

        Args:
            text: the text.
            beside: number of characters that are shown already.
            always: use a label for a short text too.
        """
        lines = text.count("\n") + 1
        fits = len(text) <= _MAX_CHARACTERS and lines <= _MAX_LINES and len(text) + beside <= _MAX_TOTAL
        if not always and (fits or len(text) <= _SHORT):
            return text
        for label, known in self._texts.items():
            if known == text:
                return label
        size = f"{lines:,} lines" if lines > 1 else f"{len(text):,} characters"
        label = f"[Pasted text {len(self._texts) + 1}: {size}]"
        self._texts[label] = text
        return label

    def whole(self, shown: str) -> str:
        """The text with every label replaced by the text it stands for."""
        if not self._texts:
            return shown
        return _LABEL.sub(lambda label: self._texts.get(label[0], label[0]), shown)

    def label_at(self, line: str, column: int, *, before: bool) -> tuple[int, int] | None:
        """Start and end of the label in a line that ends (`before`) or starts at a column, or contains it."""
        for found in _LABEL.finditer(line):
            start, end = found.span()
            if found[0] in self._texts and (start < column <= end if before else start <= column < end):
                return start, end
        return None
