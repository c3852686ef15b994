"""Text as tokens, each shaded by its probability, with a cursor that moves from token to token."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from typing import ClassVar

from rich.cells import cell_len, chop_cells
from rich.segment import Segment
from rich.style import Style
from textual import events
from textual.binding import Binding, BindingType
from textual.color import Color
from textual.geometry import Region, Size
from textual.message import Message as Event
from textual.reactive import reactive
from textual.scroll_view import ScrollView
from textual.strip import Strip

from llm_edge.chat.text import printable

_SHADES = 10
_MAX_BLEND = 0.75  # share of the error color in the shade of the least probable token
_UNLIKELY_BELOW = 0.5  # the probability below which `n` stops at a token

Span = tuple[int, str, int]  # token index, visible text, start column


def visible(text: str) -> str:
    """A token's text on one line: symbols stand for line breaks, tabs and empty text."""
    return printable(text.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")) or "·"


class TokenText(ScrollView, can_focus=True):
    """Tokens shaded by their probability."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left,h", "move(-1)", "Previous token", show=False),
        Binding("right,l", "move(1)", "Next token", show=False),
        Binding("up,k", "line(-1)", "Line up", show=False),
        Binding("down,j", "line(1)", "Line down", show=False),
        Binding("pageup", "page(-1)", "Page up", show=False),
        Binding("pagedown", "page(1)", "Page down", show=False),
        Binding("home,g", "first", "First token", show=False),
        Binding("end,G", "last", "Last token", show=False),
        Binding("n", "unlikely(1)", "Next unlikely"),
        Binding("N,p", "unlikely(-1)", "Previous unlikely", show=False),
    ]
    cursor: reactive[int] = reactive(0)  # index of the current token

    class CursorMoved(Event):
        """The cursor is on another token."""

    def __init__(self) -> None:
        super().__init__(id="token-text")
        self._texts: list[str] = []
        self._probabilities: list[float] = []
        self._lines: list[list[Span]] = []
        self._layout_width = 0
        self._styles: list[Style] = []

    def show(self, texts: Sequence[str], logprobs: Sequence[float]) -> None:
        """Show tokens; the cursor stays where it is."""
        self._texts = [*texts]
        self._probabilities = [math.exp(min(value, 0.0)) for value in logprobs]
        self._layout_width = 0
        self._layout_tokens()

    def on_resize(self) -> None:
        self._layout_tokens()

    def notify_style_update(self) -> None:
        super().notify_style_update()
        self._styles = []

    def _layout_tokens(self) -> None:
        width = self.scrollable_content_region.width
        if width < 1 or width == self._layout_width:
            return
        self._layout_width = width
        lines: list[list[Span]] = [[]]
        column = 0
        for token, text in enumerate(self._texts):
            for part in text.splitlines(keepends=True) or [""]:
                shown = visible(part)
                for chunk in [shown] if cell_len(shown) <= width else chop_cells(shown, width):
                    if column and column + cell_len(chunk) > width:
                        lines.append([])
                        column = 0
                    lines[-1].append((token, chunk, column))
                    column += cell_len(chunk)
                if part.endswith("\n"):
                    lines.append([])
                    column = 0
        self._lines = lines
        self.virtual_size = Size(width, len(lines))
        self.refresh()

    # ---- drawing

    def render_line(self, y: int) -> Strip:
        number = y + self.scroll_offset.y
        base = self.rich_style
        if number >= len(self._lines):
            return Strip.blank(self.size.width, base)
        segments = []
        for token, text, _ in self._lines[number]:
            style = self._style(self._probabilities[token])
            if token == self.cursor:
                style += Style(reverse=True, bold=True, underline=True)
            segments.append(Segment(text, base + style))
        return Strip(segments).adjust_cell_length(self.size.width, base)

    def _style(self, probability: float) -> Style:
        if not self._styles:
            background = self.background_colors[1]
            error = Color.parse(self.app.theme_variables["error"])
            for number in range(_SHADES + 1):
                shade = background.blend(error, _MAX_BLEND * number / _SHADES)
                self._styles.append(Style(bgcolor=shade.rich_color, color=shade.get_contrast_text(0.9).rich_color))
        return self._styles[round((1 - min(max(probability, 0.0), 1.0)) * _SHADES)]

    def watch_cursor(self) -> None:
        """Scroll to the cursor."""
        self._scroll_to_cursor()
        self.refresh()
        self.post_message(self.CursorMoved())

    def validate_cursor(self, cursor: int) -> int:
        """Keep the cursor on a token."""
        return min(max(cursor, 0), max(len(self._texts) - 1, 0))

    def _scroll_to_cursor(self) -> None:
        if self._lines and self._layout_width:
            self.scroll_to_region(Region(0, self._line_of(self.cursor), 1, 1), animate=False, force=True)

    def _line_of(self, token: int) -> int:
        """The line on which a token starts."""
        firsts = [line[0][0] if line else len(self._texts) for line in self._lines]
        line = bisect_right(firsts, token) - 1
        while line > 0 and any(each[0] == token for each in self._lines[line - 1]):
            line -= 1
        return max(line, 0)

    # ---- moving the cursor

    def action_move(self, by: int) -> None:
        self.cursor += by

    def action_first(self) -> None:
        self.cursor = 0

    def action_last(self) -> None:
        self.cursor = len(self._texts) - 1

    def action_line(self, by: int) -> None:
        current = self._line_of(self.cursor)
        column = next((each[2] for each in self._lines[current] if each[0] == self.cursor), 0)
        target = current + by
        while 0 <= target < len(self._lines) and not self._lines[target]:
            target += 1 if by > 0 else -1
        self._move_to(column, min(max(target, 0), len(self._lines) - 1))

    def action_page(self, by: int) -> None:
        self.action_line(by * max(self.size.height - 1, 1))

    def action_unlikely(self, by: int) -> None:
        """Move to the next token with a probability below 50 %."""
        token = self.cursor + by
        while 0 <= token < len(self._probabilities):
            if self._probabilities[token] < _UNLIKELY_BELOW:
                self.cursor = token
                return
            token += by
        self.app.bell()

    def on_click(self, event: events.Click) -> None:
        offset = event.get_content_offset(self)
        if offset is not None:
            self._move_to(offset.x, offset.y + self.scroll_offset.y)

    def _move_to(self, column: int, line: int) -> None:
        if not 0 <= line < len(self._lines) or not self._lines[line]:
            return
        spans = self._lines[line]
        starts = [each[2] for each in spans]
        self.cursor = spans[max(bisect_right(starts, column) - 1, 0)][0]
