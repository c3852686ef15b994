"""The panel of kept conversations: found, opened, renamed, pinned, deleted, exported, imported.

Knows the chat as a `ChatSession`, and tells the application only that another conversation is to be shown.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import ClassVar

from textual import events, on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.message import Message as Event
from textual.timer import Timer
from textual.widgets import Button, OptionList, Static
from textual.widgets.option_list import Option
from textual.worker import get_current_worker

from llm_edge.chat.history.search import ConversationReader, Summary
from llm_edge.chat.session import ChatSession
from llm_edge.chat.text import one_line, printable
from llm_edge.runtime.errors import LlmEdgeError
from llm_edge.tui.screens.dialogs import AskText, Line
from llm_edge.tui.widgets.history_files import export, import_conversations
from llm_edge.tui.widgets.history_list import Conversations, found_prompt, group_of, heading, prompt

PAGE = 100  # conversations that are fetched at once
_PATIENCE = 0.12  # seconds without a key before a search begins


class HistoryPanel(Vertical):
    """See the module.

    Args:
        session: the chat.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "close", "Close")]
    DEFAULT_CSS = """
    HistoryPanel {
        width: 45; height: 1fr; padding: 0 1; background: $surface; border-right: solid $panel; display: none;
        &.open { display: block; }
        #history-title { height: 1; margin: 0 0 1 0; }
        #history-title Static { width: 1fr; text-style: bold; }
        #history-search { margin: 0 0 1 0; }
        Conversations {
            height: 1fr; border: none; padding: 0; background: $surface; scrollbar-size-vertical: 1;
            text-wrap: nowrap; text-overflow: ellipsis;
        }
        Conversations:focus { border: none; background-tint: $foreground 0%; }
        #history-note { height: auto; max-height: 3; color: $text-muted; margin: 1 0 0 0; }
        #history-buttons { height: 1; margin: 1 0 0 0; }
        Button { width: auto; min-width: 0; margin: 0 1 0 0; }
    }
    """

    class Moved(Event):
        """Another conversation is that of now, or it is called otherwise."""

        def __init__(self, opened: bool) -> None:
            super().__init__()
            self.opened = opened

    class Closed(Event):
        """The panel has gone: somewhere else is written now."""

    class Fetched(Event):
        """What a thread found in the store: to a search's text or, where there is none, of all; `begin` were known."""

        def __init__(self, text: str, begin: int, found: list[Summary], more: bool) -> None:
            super().__init__()
            self.text, self.begin, self.found, self.more = text, begin, found, more

    def __init__(self, session: ChatSession) -> None:
        super().__init__(id="history")
        self._session = session
        self._reader: ConversationReader | None = (
            None  # a connection of its own: a long search must not hold up the chat
        )
        self._wanted = PAGE
        self._found: dict[int, Summary] = {}
        self._stand_on: int | None = None  # where the list goes once it has been fetched
        self._group = ""  # of the last line
        self._more = False
        self._typed: Timer | None = None
        self._deleted: list[tuple[Summary, bool]] = []  # and whether it was the conversation of then

    def compose(self) -> ComposeResult:
        """Search, list, and buttons for the mouse."""
        with Horizontal(id="history-title"):
            yield Static("Conversations", markup=False)
            yield _button("✕", "close", "Close this panel")
        yield Line(placeholder="Search all messages; ↓ to the list", id="history-search", compact=True)
        yield Conversations(markup=False)
        yield Static("", id="history-note", markup=False)
        with Horizontal(id="history-buttons"):
            yield _button("Pin", "pin", "Let it stand first, or no longer")
            yield _button("Rename", "rename", "Give it another title")
            yield _button("Delete", "delete", "Delete it; u brings it back")
            yield _button("Export", "export", "Write it to a file")
            yield _button("Import", "import", "Take in ChatGPT's export, or a file of ours")

    def on_unmount(self) -> None:
        """Close the file."""
        if self._reader is not None:
            self._reader.close()

    # ---- shown and hidden

    def toggle(self) -> None:
        """Show it, or hide it; nothing where another screen lies above."""
        if not self.screen.is_current:
            return
        if self.has_class("open"):
            self.action_close()
            return
        self.add_class("open")
        line = self.query_one(Line)
        with line.prevent(Line.Changed):
            line.value = ""
        self._stand_on = self._session.conversation.id or None
        self._wanted = PAGE
        self.refresh_list()
        line.focus()

    def action_close(self) -> None:
        """Hide it."""
        self.remove_class("open")
        self.post_message(self.Closed())

    def refresh_list(self) -> None:
        """Show what the store holds now, if anybody sees it."""
        if self.has_class("open"):
            self._more = False  # until it has come
            self._fetch(self.query_one(Line).value, 0, self._wanted)

    @work(thread=True, exclusive=True, group="history")
    def _fetch(self, text: str, begin: int, wanted: int) -> None:
        worker = get_current_worker()
        try:
            if self._reader is None:
                self._reader = ConversationReader(self._session.store.path)
            if text.strip():
                found = self._reader.search(text, wanted + 1)[begin:]
            else:
                found = self._reader.recent(wanted + 1 - begin, begin)
        except LlmEdgeError as error:
            if not worker.is_cancelled:
                self.app.call_from_thread(self._say, str(error), "error")
        else:
            if not worker.is_cancelled:
                count = wanted - begin
                self.post_message(self.Fetched(text, begin, found[:count], len(found) > count))

    def on_history_panel_fetched(self, event: Fetched) -> None:
        """Show it."""
        conversations = self.query_one(Conversations)
        if event.text != self.query_one(Line).value:
            return  # something else is searched for meanwhile
        self._more = event.more
        if event.begin:
            new = [summary for summary in event.found if summary.id not in self._found]
            conversations.add_options(self._options(event.text, new))
            return
        stood = self._stand_on or self._number()
        place, scroll = conversations.highlighted, conversations.scroll_y
        self._found, self._group = {}, ""
        with self.app.batch_update():
            conversations.set_options(self._options(event.text, event.found))
            if self._stand_on is None:
                conversations.scroll_to(y=scroll, animate=False, immediate=True)
            if stood in self._found:
                conversations.highlighted = conversations.get_option_index(str(stood))
            elif self._found:
                conversations.highlighted = min(place or 0, conversations.option_count - 1)
                if conversations.options[conversations.highlighted].disabled:
                    conversations.action_cursor_down()
        self._stand_on = None
        conversations.call_after_refresh(conversations.look_ahead)
        found = self._found or event.text.strip()
        self._note("Nothing is kept yet. ↓, then i, imports." if not found else "" if self._found else "Nothing found.")

    def _options(self, text: str, summaries: list[Summary]) -> list[Option]:
        """Lines for these, which stand below those that are there."""
        words, now, shown = text.split(), time.time(), self._session.conversation.id
        options = []
        for each in summaries:
            group = "Found" if words else group_of(each, now)
            if group != self._group:
                self._group = group
                options.append(Option(heading(group), disabled=True))
            line = found_prompt(each, words, now) if words else prompt(each, now, shown=each.id == shown)
            options.append(Option(line, id=str(each.id)))
            self._found[each.id] = each
        return options

    def on_conversations_near_end(self) -> None:
        """Fetch more."""
        if self._more:
            self._more = False  # until it has come
            begin, self._wanted = self._wanted, self._wanted + PAGE
            self._fetch(self.query_one(Line).value, begin, self._wanted)

    def on_input_changed(self) -> None:
        """Search, a moment after the last key."""
        if self._typed is not None:
            self._typed.stop()
        self._wanted = PAGE
        self._typed = self.set_timer(_PATIENCE, self.refresh_list)

    # ---- keys and the mouse

    def on_key(self, event: events.Key) -> None:
        """From the search into the list."""
        if self.query_one(Line).has_focus and event.key in ("down", "pagedown"):
            event.stop()
            self.query_one(Conversations).focus()
        elif self.query_one(Line).has_focus and event.key == "escape" and self.query_one(Line).value:
            event.stop()
            event.prevent_default()
            self.query_one(Line).value = ""

    def on_input_submitted(self) -> None:
        """The first one found."""
        self.query_one(Conversations).action_select()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """What a key does, too."""
        event.stop()
        self._do(str(event.button.name))

    def on_conversations_wished(self, event: Conversations.Wished) -> None:
        """As above."""
        self._do(event.what)

    @on(OptionList.OptionSelected)
    def _selected(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self.open(int(event.option.id or 0))

    def _do(self, what: str) -> None:
        summary = self._found.get(self._number() or 0)
        if what == "close":
            self.action_close()
        elif what == "search":
            self.query_one(Line).focus()
        elif what == "undo":
            self.undo()
        elif what == "import":
            self.import_conversations()
        elif summary is None:
            self._say("Choose a conversation first.")
        else:
            {"pin": self.pin, "rename": self.rename, "delete": self.delete, "export": self.export}[what](summary)

    def _number(self) -> int | None:
        """The conversation that the list stands on."""
        option = self.query_one(Conversations).highlighted_option
        return int(option.id) if option is not None and option.id else None

    def _say(self, text: str, severity: str = "information") -> None:
        self.app.notify(printable(text), severity=severity, markup=False)  # type: ignore[arg-type]

    def _note(self, text: str) -> None:
        note = self.query_one("#history-note", Static)
        note.update(printable(text))
        note.display = bool(text)

    # ---- what can be done

    def open(self, number: int) -> None:
        """Go to a conversation."""
        cut = self._session.answering is not None
        try:
            self._session.open(number)
        except LlmEdgeError as error:
            self._say(str(error), "error")
            self.refresh_list()
            return
        if cut:
            self._say("The answer there was stopped; Ctrl-G continues it.")
        self.post_message(self.Moved(opened=True))
        if self.screen.has_class("narrow"):
            self.action_close()
        else:
            self.refresh_list()
            self.post_message(self.Closed())

    def pin(self, summary: Summary) -> None:
        """Let it stand first, or no longer."""
        self._change(lambda: self._session.pin(summary.id, not summary.pinned))

    @work
    async def rename(self, summary: Summary) -> None:
        """Ask for another title."""
        title = await self.app.push_screen_wait(AskText("Title", summary.title, accept="Rename"))
        if title is not None and self._change(lambda: self._session.rename(summary.id, title)):
            self._moved(summary.id)

    def delete(self, summary: Summary) -> None:
        """Delete it, until it is undone."""
        shown = summary.id == self._session.conversation.id
        if self._change(lambda: self._session.delete(summary.id)):
            self._deleted.append((summary, shown))
            self._say(f"Deleted “{_short(summary.title)}”. In this list, u brings it back.")
            if shown:
                self.post_message(self.Moved(opened=True))

    def undo(self) -> None:
        """Bring the last one back that was deleted."""
        if not self._deleted:
            self._say("Nothing was deleted.")
            return
        summary, shown = self._deleted[-1]
        self._stand_on = summary.id
        if self._change(lambda: self._session.store.restore(summary.id)):
            self._deleted.pop()
            self._say(f"“{_short(summary.title)}” is back.")
            if shown and not self._session.conversation.messages:
                self._session.open(summary.id)
                self.post_message(self.Moved(opened=True))

    def _change(self, change: Callable[[], object]) -> bool:
        try:
            change()
        except LlmEdgeError as error:
            self._say(str(error), "error")
            return False
        finally:
            self.refresh_list()
        return True

    @work
    async def export(self, summary: Summary) -> None:
        """Write a conversation to a file whose name is asked for."""
        await export(self.app, self._session.store, summary)

    @work(exclusive=True, group="history-import")
    async def import_conversations(self) -> None:
        """Take in conversations from a file whose name is asked for."""
        await import_conversations(self.app, self._session.store, self._note)
        self._note("")
        self.refresh_list()

    def _moved(self, number: int) -> None:
        if number == self._session.conversation.id:
            self.post_message(self.Moved(opened=False))


def _button(label: str, what: str, tooltip: str) -> Button:
    button = Button(label, name=what, tooltip=tooltip, compact=True)
    button.can_focus = False  # keys do the same
    return button


def _short(title: str) -> str:
    return one_line(title, 40) or "an untitled one"
