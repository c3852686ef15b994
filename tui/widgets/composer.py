"""Where questions are written: several lines, with a history of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message as Event
from textual.widgets import TextArea

from llm_edge.chat.text import printable

_PAGES = {"pageup": -1, "pagedown": 1}
_NEWLINE = ("ctrl+j", "shift+enter", "alt+enter")


class Composer(TextArea):
    """A text area that sends its text on Enter; Ctrl-J (or Shift-Enter, where the terminal tells) begins a new line.

    Up on the first line and down on the last one walk through what was asked before.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "send", "Send", priority=False, key_display="⏎")]

    class Sent(Event):
        """A text, maybe empty, was sent."""

        def __init__(self, text: str) -> None:
            super().__init__()
            self.text = text

    class Undo(Event):
        """Something is to be undone, and nothing is written."""

    class Scrolled(Event):
        """The conversation is to be scrolled by so many pages: nothing here is out of sight."""

        def __init__(self, pages: int) -> None:
            super().__init__()
            self.pages = pages

    def __init__(self) -> None:
        super().__init__(
            id="composer",
            soft_wrap=True,
            show_line_numbers=False,
            highlight_cursor_line=False,
            tab_behavior="focus",
            placeholder="Ask something. ⏎ sends, Ctrl-J begins a new line, F1 helps.",
        )
        self._history: list[str] = []
        self._place = 0
        self._draft = ""

    def remember(self, questions: Sequence[str]) -> None:
        """What was asked before, the latest one last."""
        self._history = [*dict.fromkeys(reversed(questions))][::-1]
        self._place = len(self._history)

    def action_send(self) -> None:
        """Send what is written."""
        text = self.text
        if text.strip():
            self.remember([*self._history, text])
        self._place, self._draft = len(self._history), ""
        self.load_text("")
        self.post_message(self.Sent(text))

    def action_undo(self) -> None:
        """What was written; where nothing was, it is for others to know what."""
        before = self.text
        super().action_undo()
        if not before and not self.text:
            self.post_message(self.Undo())

    def write(self, text: str) -> None:
        """Put a text here, the cursor behind it."""
        self.load_text(text)
        self.move_cursor(self.document.end)
        self.focus()

    async def _on_key(self, event: events.Key) -> None:
        row, _ = self.cursor_location
        if event.key == "enter":
            self.action_send()
        elif event.key in _NEWLINE:
            self.insert("\n")
        elif event.key == "up" and row == 0 and self._place > 0:
            self._walk(-1)
        elif event.key == "down" and row == self.document.line_count - 1 and self._place < len(self._history):
            self._walk(1)
        elif event.key in _PAGES and self.wrapped_document.height <= self.size.height:
            self.post_message(self.Scrolled(_PAGES[event.key]))
        else:
            return  # Textual calls the base class's handler next
        event.stop()
        event.prevent_default()

    async def _on_paste(self, event: events.Paste) -> None:
        event.text = printable(event.text.replace("\r\n", "\n").replace("\r", "\n"))  # the base class pastes it

    def _walk(self, step: int) -> None:
        if self._place == len(self._history):
            self._draft = self.text
        self._place += step
        past = self._place < len(self._history)
        self.load_text(self._history[self._place] if past else self._draft)
        self.move_cursor(self.document.end)
