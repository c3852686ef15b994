"""One message of a conversation as a single widget, which renders its lines once and draws them one by one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

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

from llm_edge.chat.attachments import split_attachments
from llm_edge.chat.figures import figures_line
from llm_edge.chat.history.conversation import Message
from llm_edge.chat.text import printable
from llm_edge.tui.notifications import notify
from llm_edge.tui.widgets.markdown import Line, MarkdownLines, code_blocks

_LIVE_REASONING_LINES = 6  # of a reasoning in progress
_DIM = Style(dim=True)
_REASONING = Style(dim=True, italic=True)


class MessageView(Widget, can_focus=True):
    """A message: who wrote it, its reasoning (folded once complete), its text, and a line of figures.

    Args:
        message: the message; call `changed` after its text has grown.
        version: its number among the versions of the message, from 1, and how many there are.
        code_theme: a Pygments style.

    Attributes:
        live: whether the message is still growing.
        in_conversation: whether it is part of the conversation, so that it can be quoted, edited or regenerated.
        known_params: parameters that need not be shown below it, because the answer before has the same.
    """

    ALLOW_SELECT = True
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("space", "fold", "Unfold"),
        Binding("y", "copy", "Copy"),
        Binding("c", "copy_code", "Copy code"),
        Binding("q", "request('quote')", "Quote"),
        Binding("e", "request('edit')", "Edit"),
        Binding("r", "request('regenerate')", "Regenerate"),
        Binding("left_square_bracket,left", "request('previous')", "Version", key_display="["),
        Binding("right_square_bracket,right", "request('next')", "Version", show=False),
        Binding("t", "request('tokens')", "Tokens"),
        Binding("up,k", "app.focus_previous", "Up", show=False),
        Binding("down,j", "app.focus_next", "Down", show=False),
    ]

    class ActionRequested(Event):
        """The user asked to quote, edit or regenerate the message, or for its tokens or another version of it."""

        def __init__(self, view: MessageView, action: str) -> None:
            super().__init__()
            self.view, self.action = view, action

    def __init__(self, message: Message, version: tuple[int, int] = (1, 1), code_theme: str = "monokai") -> None:
        super().__init__(classes=message.role)
        self.message = message
        self.live = False
        self.in_conversation = True
        self.known_params: Mapping[str, Any] | None = None
        self._folded = True
        self._next_code_block = 0  # to copy
        self._version = version
        self._markdown = MarkdownLines(code_theme)
        self._rendered: tuple[int, list[Line]] | None = None  # width, lines
        self._reasoning_line = -1

    @property
    def version(self) -> tuple[int, int]:
        """Number among the versions of the message, and their count."""
        return self._version

    @version.setter
    def version(self, version: tuple[int, int]) -> None:
        if version != self._version:
            self._version = version
            self.changed()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        if action == "fold":
            return bool(self.message.reasoning) or self._has_files
        return action != "request" or self.in_conversation or parameters[0] == "tokens"

    def use_code_theme(self, name: str) -> None:
        """Use a Pygments style for code."""
        if name != self._markdown.code_theme:
            self._markdown = MarkdownLines(name)
            self.changed()

    def set_live(self, live: bool) -> None:
        """Set whether the message is still growing."""
        if live != self.live:
            self.live = live
            self.changed()

    def changed(self) -> None:
        """Render the message again."""
        height = len(self._rendered[1]) if self._rendered is not None else -1
        width = self._rendered[0] if self._rendered is not None else 0
        self._rendered = None
        if width:
            self.refresh(layout=len(self._lines(width)) != height)
        else:
            self.refresh(layout=True)

    @property
    def _has_files(self) -> bool:
        return self.message.role == "user" and bool(split_attachments(self.message.content)[0])

    # ---- drawing

    def get_content_width(self, container: Size, viewport: Size) -> int:  # noqa: ARG002 (Textual's interface)
        return container.width

    def get_content_height(self, container: Size, viewport: Size, width: int) -> int:  # noqa: ARG002 (see above)
        return len(self._lines(width)) if width else 0

    def render_line(self, y: int) -> Strip:
        width, base = self.size.width, self.rich_style
        lines = self._lines(width)
        if y >= len(lines):
            return Strip.blank(width, base)
        strip = Strip(lines[y]).apply_style(base).adjust_cell_length(width, base)
        selection = self.text_selection
        span = selection.get_span(y) if selection is not None else None
        if span is not None:
            start, end = span
            style = self.screen.get_component_rich_style("screen--selection")
            end = width if end == -1 else end
            selected = Segment.apply_style(strip.crop(start, end), post_style=style)
            strip = Strip.join([strip.crop(0, start), Strip(selected), strip.crop(end, width)])
        return strip.apply_offsets(0, y)

    def get_selection(self, selection: Selection) -> tuple[str, str] | None:
        """The text that is selected with the mouse."""
        lines = self._lines(self.size.width)
        return selection.extract("\n".join("".join(each.text for each in line).rstrip() for line in lines)), "\n"

    def notify_style_update(self) -> None:
        """Render again with the colors of another theme."""
        super().notify_style_update()
        self._rendered = None

    def _lines(self, width: int) -> list[Line]:
        if self._rendered is None or self._rendered[0] != width:
            self._rendered = (width, self._render_lines(width))
        return self._rendered[1]

    def _render_lines(self, width: int) -> list[Line]:
        message = self.message
        lines = [self._heading()]
        if message.reasoning:
            self._reasoning_line = len(lines)
            lines += self._reasoning(width)
        if message.role == "assistant":
            lines += self._markdown.lines(message.content, width)
            if self.live and not message.content and not message.reasoning:
                lines.append([Segment("…", _DIM)])
            params = {} if message.params == self.known_params else message.params
            figures = figures_line(message.figures, params)
            if figures and not self.live:
                lines += _wrapped(figures, width, _DIM)
        else:
            lines += self._question(width)
        return lines

    def _question(self, width: int) -> list[Line]:
        """A question after its files, each of which is one line unless it is unfolded."""
        attachments, text = split_attachments(self.message.content)
        lines: list[Line] = []
        for each in attachments:
            lines.append([Segment(f"{'▸' if self._folded else '▾'} File {printable(each.label)}", _DIM)])
            if not self._folded:
                lines += [[Segment("│ ", _DIM), *line] for line in _wrapped(each.text, width - 2, _DIM)]
        return lines + (_wrapped(text, width) if text.strip() or not attachments else [])

    def _heading(self) -> Line:
        message = self.message
        name = "You" if message.role == "user" else printable(message.model) or "Assistant"
        line = [Segment(name, Style(bold=True))]
        number, count = self._version
        if count > 1:
            line.append(Segment(f"  {number} of {count}", _DIM))
        if message.role == "assistant" and not message.finished and not self.live:
            line.append(Segment("  unfinished", _DIM))
        return line

    def _reasoning(self, width: int) -> list[Line]:
        message = self.message
        count = message.figures.get("reasoning_tokens")
        size = f" · {count} tokens" if count else ""
        in_progress = self.live and not message.content
        if self._folded and not in_progress:
            return [[Segment(f"▸ Reasoning{size}", _DIM)]]
        lines: list[Line] = [
            [Segment("│ ", _DIM), *line] for line in _wrapped(message.reasoning, width - 2, _REASONING)
        ]
        if in_progress:
            return [[Segment("▾ Thinking …", _DIM)], *lines[-_LIVE_REASONING_LINES:]]
        return [[Segment(f"▾ Reasoning{size}", _DIM)], *lines, []]

    # ---- actions

    def action_fold(self) -> None:
        self._folded = not self._folded
        self.changed()

    def action_copy(self) -> None:
        self.app.copy_to_clipboard(self.message.content)
        notify(self, "Copied.")

    def action_copy_code(self) -> None:
        """Copy the first code block; when repeated, the next one."""
        blocks = code_blocks(self.message.content)
        if not blocks:
            notify(self, "This message has no code.")
            return
        number = self._next_code_block % len(blocks)
        self._next_code_block = number + 1
        self.app.copy_to_clipboard(blocks[number])
        notify(self, f"Copied code block {number + 1} of {len(blocks)}." if len(blocks) > 1 else "Copied code.")

    def action_request(self, action: str) -> None:
        self.post_message(self.ActionRequested(self, action))

    def on_click(self, event: events.Click) -> None:
        """Fold or unfold the reasoning or the files by clicking the heading."""
        line = event.get_content_offset_capture(self).y
        if (self.message.reasoning and line == self._reasoning_line) or (line == 1 and self._has_files):
            self.action_fold()


def _wrapped(text: str, width: int, style: Style | None = None) -> list[Line]:
    """Plain text as lines of a width."""
    from rich.console import Console

    console = Console(width=max(width, 8), color_system="truecolor", force_terminal=True)
    whole = Text(printable(text).expandtabs(4), style=style or "")
    return [[Segment(line.plain, style)] for line in whole.wrap(console, max(width, 8))]
