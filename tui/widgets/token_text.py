"""Text as tokens, each shaded by its probability, with a cursor that walks them. Knows no model."""

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
_STRONGEST = 0.75  # how much of the warning colour the least probable token has
_UNLIKELY = 0.5  # tokens less probable are what `n` looks for

Place = tuple[int, str, int]  # token, what shows of it, the column where that begins


def visible(text: str) -> str:
    """A token's text on one line: line ends and tabs show as signs, and nothing shows as a sign too."""
    return printable(text.replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍")) or "·"


class TokenText(ScrollView, can_focus=True):
    """See the module."""

    DEFAULT_CSS = "TokenText { height: 1fr; scrollbar-size-vertical: 1; }"
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left,h", "walk(-1)", "Token before", show=False),
        Binding("right,l", "walk(1)", "Next token", show=False),
        Binding("up,k", "line(-1)", "Line up", show=False),
        Binding("down,j", "line(1)", "Line down", show=False),
        Binding("pageup", "page(-1)", "Page up", show=False),
        Binding("pagedown", "page(1)", "Page down", show=False),
        Binding("home,g", "first", "First token", show=False),
        Binding("end,G", "last", "Last token", show=False),
        Binding("n", "unlikely(1)", "Next unlikely"),
        Binding("N,p", "unlikely(-1)", "Unlikely before", show=False),
    ]
    cursor: reactive[int] = reactive(0)

    class Moved(Event):
        """The cursor stands on another token."""

    def __init__(self) -> None:
        super().__init__(id="token-text")
        self._texts: list[str] = []
        self._chances: list[float] = []
        self._lines: list[list[Place]] = []
        self._made_for = 0
        self._styles: list[Style] = []

    def put(self, texts: Sequence[str], logprobs: Sequence[float]) -> None:
        """Show these tokens; the cursor stays where it is."""
        self._texts = [*texts]
        self._chances = [math.exp(min(value, 0.0)) for value in logprobs]
        self._made_for = 0
        self._make()

    def on_resize(self) -> None:
        """Other lines."""
        self._make()

    def notify_style_update(self) -> None:
        """Other colours."""
        super().notify_style_update()
        self._styles = []

    def _make(self) -> None:
        width = self.scrollable_content_region.width
        if width < 1 or width == self._made_for:
            return
        self._made_for = width
        lines: list[list[Place]] = [[]]
        column = 0
        for token, text in enumerate(self._texts):
            for part in text.splitlines(keepends=True) or [""]:
                shown = visible(part)
                whole = cell_len(shown) <= width
                for piece in [shown] if whole else chop_cells(shown, width):
                    if column and column + cell_len(piece) > width:
                        lines.append([])
                        column = 0
                    lines[-1].append((token, piece, column))
                    column += cell_len(piece)
                if part.endswith("\n"):
                    lines.append([])
                    column = 0
        self._lines = lines
        self.virtual_size = Size(width, len(lines))
        self.refresh()

    # ---- drawing

    def render_line(self, y: int) -> Strip:
        """One line of tokens."""
        number = y + self.scroll_offset.y
        base = self.rich_style
        if number >= len(self._lines):
            return Strip.blank(self.size.width, base)
        segments = []
        for token, text, _ in self._lines[number]:
            style = self._style(self._chances[token])
            if token == self.cursor:
                style += Style(reverse=True, bold=True, underline=True)
            segments.append(Segment(text, base + style))
        return Strip(segments).adjust_cell_length(self.size.width, base)

    def _style(self, chance: float) -> Style:
        if not self._styles:
            ground = self.background_colors[1]
            warning = Color.parse(self.app.theme_variables["error"])
            for number in range(_SHADES + 1):
                shade = ground.blend(warning, _STRONGEST * number / _SHADES)
                self._styles.append(Style(bgcolor=shade.rich_color, color=shade.get_contrast_text(0.9).rich_color))
        return self._styles[round((1 - min(max(chance, 0.0), 1.0)) * _SHADES)]

    def watch_cursor(self) -> None:
        """Bring it into sight."""
        self._into_sight()
        self.refresh()
        self.post_message(self.Moved())

    def validate_cursor(self, cursor: int) -> int:
        """It stays on the tokens there are."""
        return min(max(cursor, 0), max(len(self._texts) - 1, 0))

    def _into_sight(self) -> None:
        if self._lines and self._made_for:
            self.scroll_to_region(Region(0, self._line_of(self.cursor), 1, 1), animate=False, force=True)

    def _line_of(self, token: int) -> int:
        """The line on which a token begins."""
        firsts = [line[0][0] if line else len(self._texts) for line in self._lines]
        place = bisect_right(firsts, token) - 1
        while place > 0 and any(each[0] == token for each in self._lines[place - 1]):
            place -= 1
        return max(place, 0)

    # ---- walking

    def action_walk(self, by: int) -> None:
        """To a token before or behind."""
        self.cursor += by

    def action_first(self) -> None:
        """To the first one."""
        self.cursor = 0

    def action_last(self) -> None:
        """To the last one."""
        self.cursor = len(self._texts) - 1

    def action_line(self, by: int) -> None:
        """To the token above or below."""
        here = self._line_of(self.cursor)
        column = next((each[2] for each in self._lines[here] if each[0] == self.cursor), 0)
        wanted = here + by
        while 0 <= wanted < len(self._lines) and not self._lines[wanted]:
            wanted += 1 if by > 0 else -1
        self._to(column, min(max(wanted, 0), len(self._lines) - 1))

    def action_page(self, by: int) -> None:
        """A page up or down."""
        self.action_line(by * max(self.size.height - 1, 1))

    def action_unlikely(self, by: int) -> None:
        """To the next token that was less probable than not."""
        token = self.cursor + by
        while 0 <= token < len(self._chances):
            if self._chances[token] < _UNLIKELY:
                self.cursor = token
                return
            token += by
        self.app.bell()

    def on_click(self, event: events.Click) -> None:
        """To the token under the mouse."""
        offset = event.get_content_offset(self)
        if offset is not None:
            self._to(offset.x, offset.y + self.scroll_offset.y)

    def _to(self, column: int, line: int) -> None:
        if not 0 <= line < len(self._lines) or not self._lines[line]:
            return
        places = self._lines[line]
        starts = [each[2] for each in places]
        self.cursor = places[max(bisect_right(starts, column) - 1, 0)][0]
