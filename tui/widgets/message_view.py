"""One message of a conversation as one light widget: its lines are made once and drawn line by line."""

from __future__ import annotations

from typing import ClassVar

from rich.segment import Segment
from rich.style import Style
from rich.text import Text
from textual import events
from textual.binding import Binding, BindingType
from textual.geometry import Size
from textual.message import Message as Event
from textual.selection import Selection
from textual.strip import Strip
from textual.widget import Widget

from llm_edge.chat.figures import figures_line
from llm_edge.chat.history.conversation import Message
from llm_edge.chat.text import printable
from llm_edge.tui.widgets.markdown import Line, MarkdownLines

_LIVE_REASONING = 6  # lines that show of a reasoning while it grows
_DIM = Style(dim=True)
_THOUGHT = Style(dim=True, italic=True)


class MessageView(Widget, can_focus=True):
    """A message: who says it, its reasoning (folded, unless it grows), its text, and a line of figures.

    Args:
        message: whose text may grow; call `changed` then.
        branch: its place among the versions of it, from 1 on, and how many there are.
        code_theme: see `MarkdownLines`.
    """

    ALLOW_SELECT = True
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "fold", "Reasoning"),
        Binding("y", "ask('copy')", "Copy"),
        Binding("c", "ask('copy_code')", "Copy code"),
        Binding("q", "ask('quote')", "Quote"),
        Binding("e", "ask('edit')", "Edit"),
        Binding("r", "ask('regenerate')", "Regenerate"),
        Binding("left_square_bracket,left", "ask('previous')", "Version", key_display="["),
        Binding("right_square_bracket,right", "ask('next')", "Version", show=False),
        Binding("t", "ask('tokens')", "Tokens"),
        Binding("up,k", "app.focus_previous", "Up", show=False),
        Binding("down,j", "app.focus_next", "Down", show=False),
    ]

    class Asked(Event):
        """Something is to be done with this message."""

        def __init__(self, view: MessageView, what: str) -> None:
            super().__init__()
            self.view, self.what = view, what

    def __init__(self, message: Message, branch: tuple[int, int] = (1, 1), code_theme: str = "monokai") -> None:
        super().__init__(classes=message.role)
        self.message = message
        self.live = False
        self.folded = True
        self.copied_block = 0  # of the code; the next one to copy
        self.kept = True  # in a conversation: it can be quoted, edited, made again
        self._branch = branch
        self._markdown = MarkdownLines(code_theme)
        self._made: tuple[int, list[Line]] | None = None  # width, lines
        self._reasoning_line = -1

    @property
    def branch(self) -> tuple[int, int]:
        """Its place among the versions of it."""
        return self._branch

    @branch.setter
    def branch(self, branch: tuple[int, int]) -> None:
        if branch != self._branch:
            self._branch = branch
            self.changed()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Only what can be done with this message."""
        if action == "fold":
            return bool(self.message.reasoning)
        if action == "ask" and not self.kept:
            return parameters[0] in ("copy", "copy_code", "tokens")
        return True

    def use_code_theme(self, name: str) -> None:
        """Another theme for code."""
        if name != self._markdown.code_theme:
            self._markdown = MarkdownLines(name)
            self.changed()

    def set_live(self, live: bool) -> None:
        """Whether the message grows."""
        if live != self.live:
            self.live = live
            self.changed()

    def changed(self) -> None:
        """The message is not what it was."""
        before = len(self._made[1]) if self._made is not None else -1
        width = self._made[0] if self._made is not None else 0
        self._made = None
        if width:
            self.refresh(layout=len(self._lines(width)) != before)
        else:
            self.refresh(layout=True)

    # ---- drawing

    def get_content_width(self, container: Size, viewport: Size) -> int:  # noqa: ARG002 (Textual's)
        """All there is."""
        return container.width

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:  # noqa: ARG002 (Textual's)
        """As many lines as there are."""
        return len(self._lines(width)) if width else 0

    def render_line(self, y: int) -> Strip:
        """One line of it."""
        width, base = self.size.width, self.rich_style
        lines = self._lines(width)
        if y >= len(lines):
            return Strip.blank(width, base)
        strip = Strip(lines[y]).apply_style(base).adjust_cell_length(width, base)
        selection = self.text_selection
        span = selection.get_span(y) if selection is not None else None
        if span is not None:
            start, end = span
            chosen = self.screen.get_component_rich_style("screen--selection")
            end = width if end == -1 else end
            middle = Segment.apply_style(strip.crop(start, end), post_style=chosen)
            strip = Strip.join([strip.crop(0, start), Strip(middle), strip.crop(end, width)])
        return strip.apply_offsets(0, y)

    def get_selection(self, selection: Selection) -> tuple[str, str] | None:
        """The text that was marked with the mouse."""
        lines = self._lines(self.size.width)
        return selection.extract("\n".join("".join(each.text for each in line).rstrip() for line in lines)), "\n"

    def notify_style_update(self) -> None:
        """Themes change what is drawn."""
        super().notify_style_update()
        self._made = None

    def _lines(self, width: int) -> list[Line]:
        if self._made is None or self._made[0] != width:
            self._made = (width, self._make(width))
        return self._made[1]

    def _make(self, width: int) -> list[Line]:
        message = self.message
        lines = [self._title()]
        if message.reasoning:
            self._reasoning_line = len(lines)
            lines += self._reasoning(width)
        if message.role == "assistant":
            lines += self._markdown.lines(message.content, width)
            if self.live and not message.content and not message.reasoning:
                lines.append([Segment("…", _DIM)])
            figures = figures_line(message.figures, message.params)
            if figures and not self.live:
                lines += _wrapped(figures, width, _DIM)
        else:
            lines += _wrapped(message.content, width)
        return lines

    def _title(self) -> Line:
        message = self.message
        name = "You" if message.role == "user" else printable(message.model) or "Assistant"
        line = [Segment(name, Style(bold=True))]
        place, count = self._branch
        if count > 1:
            line.append(Segment(f"  {place} of {count}", _DIM))
        if message.role == "assistant" and not message.finished and not self.live:
            line.append(Segment("  unfinished", _DIM))
        return line

    def _reasoning(self, width: int) -> list[Line]:
        message = self.message
        growing = self.live and not message.content
        count = message.figures.get("reasoning_tokens")
        size = f" · {count} tokens" if count else ""
        if growing:
            lines = _wrapped(message.reasoning, width - 2, _THOUGHT)[-_LIVE_REASONING:]
            return [[Segment("▾ thinking …", _DIM)], *([Segment("│ ", _DIM), *line] for line in lines)]
        if self.folded:
            return [[Segment(f"▸ reasoning{size}", _DIM)]]
        lines = _wrapped(message.reasoning, width - 2, _THOUGHT)
        return [[Segment(f"▾ reasoning{size}", _DIM)], *([Segment("│ ", _DIM), *line] for line in lines), []]

    # ---- what a person does

    def action_fold(self) -> None:
        """Show the reasoning, or hide it."""
        self.folded = not self.folded
        self.changed()

    def action_ask(self, what: str) -> None:
        """Pass a wish on."""
        self.post_message(self.Asked(self, what))

    def on_click(self, event: events.Click) -> None:
        """A click on the reasoning's line folds it."""
        if self.message.reasoning and event.get_content_offset_capture(self).y == self._reasoning_line:
            self.action_fold()


def _wrapped(text: str, width: int, style: Style | None = None) -> list[Line]:
    """Plain text in lines of a width."""
    from rich.console import Console

    console = Console(width=max(width, 8), color_system="truecolor", force_terminal=True)
    whole = Text(printable(text).expandtabs(4), style=style or "")
    return [[Segment(line.plain, style)] for line in whole.wrap(console, max(width, 8))]
