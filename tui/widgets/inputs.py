"""Text fields that strip control characters from pasted text."""

from __future__ import annotations

from textual import events
from textual.widgets import Input, TextArea

from llm_edge.chat.text import printable

NEWLINE_KEYS = ("ctrl+j", "shift+enter", "alt+enter")


class SafeInput(Input):
    """A single-line field."""

    def _on_paste(self, event: events.Paste) -> None:
        event.text = printable(event.text)  # Textual calls the handler of Input next, with this text


class SafeTextArea(TextArea):
    """A multi-line field."""

    async def _on_paste(self, event: events.Paste) -> None:
        event.text = printable(event.text.replace("\r\n", "\n").replace("\r", "\n"))  # TextArea's handler runs next
