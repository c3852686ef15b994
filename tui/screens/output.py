"""A screen with the output of a command, which can be scrolled and selected."""

from __future__ import annotations

from typing import ClassVar

from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Static

from llm_edge.chat.text import printable


class OutputScreen(ModalScreen[None]):
    """Shows lines of text under a title."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,q,enter", "dismiss", "Close", key_display="esc")]

    def __init__(self, title: str, text: str) -> None:
        super().__init__()
        self._box_title, self._text = title, text

    def compose(self) -> ComposeResult:
        with VerticalScroll() as box:
            box.border_title = printable(self._box_title)
            box.border_subtitle = "Esc to close"
            yield Static(printable(self._text), markup=False)

    def on_mount(self) -> None:
        """Focus the box, so that arrow keys scroll it."""
        self.query_one(VerticalScroll).focus()
