"""All keys on one screen, by where they hold, and where the chat keeps its files. Knows nothing of what they do."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Final

from rich.table import Table
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Static

from llm_edge.chat.text import printable

if TYPE_CHECKING:
    from llm_edge.tui.app import ChatApp

_KEY = 18  # columns
KEYS: Final[Mapping[str, tuple[tuple[str, str], ...]]] = {
    "Everywhere": (
        ("F1", "these keys"),
        ("Ctrl-P", "all commands, themes among them; type to find one"),
        ("F2, Ctrl-T", "conversations: search, open, rename, pin, delete, export, import"),
        ("F3, Ctrl-O", "parameters: system prompt, temperature … also while an answer comes"),
        ("F4, Ctrl-L", "models: choose one, make one of a file or of Hugging Face, or connect"),
        ("F5", "questions to begin with"),
        ("F6", "the tokens of an answer, how probable each was, and what else could have come"),
        ("F7", "one question to two models, or with two settings"),
        ("Esc", "stop the answer; else back to writing"),
        ("Ctrl-C", "copy what is marked; else stop the answer"),
        ("Ctrl-Q", "leave; all is kept"),
    ),
    "Writing": (
        ("Enter", "ask; with nothing written: a new conversation"),
        ("Ctrl-J, Alt-Enter", "a new line (Shift-Enter too, where the terminal tells)"),
        ("↑ ↓", "on the first and the last line: what was asked before"),
        ("Ctrl-N", "a new conversation"),
        ("Ctrl-Z", "undo; with nothing written: back to the conversation before, or the latest one"),
        ("Ctrl-R", "another answer to the last question"),
        ("Ctrl-G", "go on with the last answer"),
        ("Shift-Tab", "to the messages"),
        ("PgUp PgDn", "scroll the conversation"),
    ),
    "On a message (Shift-Tab, or a click)": (
        ("↑ ↓, k j", "the one before, the next one"),
        ("y", "copy it"),
        ("c", "copy its code, the next block each time"),
        ("q", "quote it"),
        ("e", "edit the question: its answer becomes another version"),
        ("r", "another answer"),
        ("[ ], ← →", "walk between versions"),
        ("t", "its tokens"),
        ("Space", "show or hide its reasoning"),
    ),
    "Parameters (F3)": (
        ("↑ ↓, wheel", "turn; PgUp PgDn by five steps; or type a value and Enter"),
        ("Tab, Shift-Tab", "the next one, the one before"),
        ("Ctrl-Z", "all to the model's own values"),
        ("Ctrl-S", "keep the values under a name"),
        ("Esc", "close"),
    ),
    "Conversations (F2)": (
        ("Enter", "open"),
        ("↓", "from the search into the list; there:"),
        ("r  p  d  u", "rename, pin, delete, bring back"),
        ("e  i", "export to Markdown or JSON, import (ChatGPT's export, or a file of ours)"),
        ("/", "search all messages"),
    ),
}


class HelpScreen(ModalScreen[None]):
    """See the module.

    Args:
        places: what is kept where.
    """

    DEFAULT_CSS = """
    HelpScreen { align: center middle; background: $background 40%; }
    HelpScreen > VerticalScroll { width: 1fr; max-width: 100; height: auto; max-height: 100%; background: $surface;
        border: round $accent; margin: 0 1; padding: 0 1; scrollbar-size-vertical: 1; }
    HelpScreen .keys { margin: 0 0 1 0; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape,f1,q,enter", "close", "Close", key_display="esc")]

    def __init__(self, places: Mapping[str, Path]) -> None:
        super().__init__()
        self._places = places

    def compose(self) -> ComposeResult:
        """A section for each place where keys hold."""
        with VerticalScroll() as box:
            box.border_title = "Keys"
            box.border_subtitle = "↑ ↓ PgDn more · Esc closes"
            places = [(name, printable(str(path))) for name, path in self._places.items()]
            for section, rows in [*KEYS.items(), ("Where things are", places)]:
                yield Static(Content.styled(section, "bold $text-accent"), markup=False)
                yield Static(_table(rows), markup=False, classes="keys")

    def on_mount(self) -> None:
        """Arrows scroll."""
        self.query_one(VerticalScroll).focus()

    def action_close(self) -> None:
        """Back."""
        self.dismiss()


def _table(rows: Iterable[tuple[str, str]]) -> Table:
    """Keys and what they do, which wraps beside them."""
    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(width=_KEY, no_wrap=True)
    table.add_column(overflow="fold")
    for key, what in rows:
        table.add_row(Text(key, style="bold"), Text(what))
    return table


def show_help(app: ChatApp) -> None:
    """Open it over whatever is shown."""
    app.push_screen(HelpScreen({"conversations": app.session.store.path, "settings": app.settings.path}))
