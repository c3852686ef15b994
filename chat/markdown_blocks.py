"""`MarkdownBlocks`: renders a Markdown text that grows, block by block.

Appended text can change at most the last two blocks of a Markdown text: a line that starts a block may turn out to
continue the one before. All other blocks are rendered only once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, TypeVar

from markdown_it import MarkdownIt

# Parsing inline Markdown takes time quadratic in its length; longer blocks and paragraphs are shown as plain text.
MAX_BLOCK, MAX_PARAGRAPH = 40_000, 4_000  # characters
MAX_CODE_LINE = 1_000  # characters of a line of code that is highlighted

T = TypeVar("T")


class MarkdownBlocks(Generic[T]):
    """Renders the top-level blocks of a text; the result does not depend on how the text has grown.

    Args:
        render: renders the text of one block.
    """

    def __init__(self, render: Callable[[str], T]) -> None:
        self._render = render
        self._parser = parser()
        self._parser.core.ruler.enableOnly(["normalize", "block"])  # only the starts of blocks are needed
        self._text = ""
        self._blocks: list[tuple[str, T]] = []  # all but the last two are final

    def update(self, text: str) -> list[T]:
        """The rendered blocks of a text; if it continues the previous one, only its last blocks are rendered."""
        if not text.startswith(self._text):
            self._text, self._blocks = "", []
        if text != self._text:
            stable, unstable = self._blocks[:-2], self._blocks[-2:]
            tail = "".join(block for block, _ in unstable) + text[len(self._text) :]
            known = dict(unstable)
            self._blocks = stable + [
                (block, known[block] if block in known else self._render(block)) for block in self._split(tail)
            ]
            self._text = text
        return [rendered for _, rendered in self._blocks]

    def _split(self, text: str) -> list[str]:
        """The text's blocks; joined, they give the text."""
        starts = [token.map[0] for token in self._parser.parse(text) if token.level == 0 and token.map is not None]
        lines = text.splitlines(keepends=True)
        ends = [*sorted({start for start in starts if start}), len(lines)]
        blocks, before = [], 0
        for end in ends:
            blocks.append("".join(lines[before:end]))
            before = end
        return blocks


def parser() -> MarkdownIt:
    """A parser of CommonMark with tables and strikethrough."""
    return MarkdownIt().enable("table").enable("strikethrough")
