"""The help screen: all keys, and where the chat stores its files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar, Final

from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

from llm_edge.chat.commands import help_lines
from llm_edge.chat.text import printable

_KEY_WIDTH = 25  # columns
KEYS: Final[Mapping[str, tuple[tuple[str, str], ...]]] = {
    "Everywhere": (
        ("F1", "Show this help"),
        ("Ctrl-P", "Command palette and themes; type to filter"),
        ("F2, Ctrl-T", "Conversations: search, open, rename, pin, delete, export, import"),
        ("F3, Ctrl-O", "Parameters: system prompt, temperature …, even while it is answering"),
        ("F4, Ctrl-L", "Models: choose one, export one, or connect to an endpoint"),
        ("F5", "Sample questions"),
        ("F6", "Token view: how probable each token was, and the alternatives"),
        ("F7", "Compare the answers of two models, or of one with two settings"),
        ("Esc", "Stop the answer; otherwise return to the composer"),
        ("Ctrl-C", "Copy the selection; without one, stop the answer"),
        ("Ctrl-Q", "Quit (everything is saved)"),
    ),
    "Composer": (
        ("Enter", "Ask; while it is answering, queue; with no text, start a new conversation"),
        ("Ctrl-J, Alt-Enter", "New line (also Shift-Enter, if your terminal supports it)"),
        ("↑ ↓", "On the first or last line: earlier questions"),
        ("@path", "Attach a text file (also: drop it here, or /file PATH)"),
        ("F9", "Write the question in $EDITOR"),
        ("/help", "Slash commands: /model, /set, /save …"),
        ("Ctrl-N", "New conversation"),
        ("Ctrl-Z", "Undo; with no text, return to the previous conversation"),
        ("Ctrl-R", "Regenerate the last answer"),
        ("Ctrl-G", "Continue the last answer"),
        ("Shift-Tab", "Go to the messages"),
        ("PgUp PgDn", "Scroll the conversation"),
    ),
    "Message (Shift-Tab, or click)": (
        ("↑ ↓, k j", "Previous or next message"),
        ("y", "Copy"),
        ("c", "Copy code; again for the next block"),
        ("q", "Quote"),
        ("e", "Edit the question; its answer stays as another version"),
        ("r", "Regenerate the answer"),
        ("[ ], ← →", "Previous or next version"),
        ("t", "Token view"),
        ("Space", "Show or hide the reasoning, or attached files"),
    ),
    "Parameters (F3)": (
        ("↑ ↓", "Next or previous parameter; its help is shown below the list"),
        ("← →, wheel", "Change the value, with Shift by 5 steps; or type a number and press Enter"),
        ("Ctrl-Z", "Undo the latest change"),
        ("Ctrl-S", "Save the values as a preset"),
        ("Esc", "Close"),
    ),
    "Conversations (F2)": (
        ("Enter", "Open"),
        ("↓", "From the search field to the list, where these keys apply:"),
        ("r  p  d  u", "Rename, pin, delete, undo delete"),
        ("e  i", "Export to Markdown or JSON; import from ChatGPT or an llm-edge export"),
        ("/", "Search all messages"),
    ),
}


class HelpScreen(ModalScreen[None]):
    """The help screen; `paths` are the places of files, by what they hold."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,f1,q,enter", "dismiss", "Close", key_display="esc")]

    def __init__(self, paths: Mapping[str, Path]) -> None:
        super().__init__()
        self._paths = paths

    def compose(self) -> ComposeResult:
        with VerticalScroll() as box:
            box.border_title = "Keys"
            box.border_subtitle = "↑ ↓ PgDn to scroll · Esc to close"
            paths = [(name, printable(str(path))) for name, path in self._paths.items()]
            for section, rows in [*KEYS.items(), ("Slash commands", help_lines()), ("Files", paths)]:
                yield Static(Content.styled(section, "bold $text-accent"), markup=False)
                yield Static(_table(rows), markup=False, classes="keys")

    def on_mount(self) -> None:
        """Focus the box, so that arrow keys scroll it."""
        self.query_one(VerticalScroll).focus()


def _table(rows: Iterable[tuple[str, str]]) -> Table:
    """Keys and what they do, which wraps within its column."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=_KEY_WIDTH, no_wrap=True)
    table.add_column(overflow="fold")
    for key, help_text in rows:
        table.add_row(Text(key, style="bold"), Text(help_text))
    return table
