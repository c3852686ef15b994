"""The side panel of conversations: search, open, rename, pin, delete, export, import."""

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
from llm_edge.tui.notifications import notify
from llm_edge.tui.screens.dialogs import TextPrompt
from llm_edge.tui.widgets.conversation_files import export_conversation, import_conversations
from llm_edge.tui.widgets.conversation_list import ConversationList, entry_label, group_of, heading, result_label
from llm_edge.tui.widgets.inputs import SafeInput

PAGE = 100  # conversations that are fetched at once
_SEARCH_DELAY = 0.12  # seconds without a key press before a search starts


class HistoryPanel(Vertical):
    """The panel; hidden unless it has the class `open`."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "close", "Close")]

    class ConversationChanged(Event):
        """The session's conversation was replaced (`opened`) or renamed."""

        def __init__(self, opened: bool) -> None:
            super().__init__()
            self.opened = opened

    class Closed(Event):
        """The panel was closed, or left for the conversation."""

    class Fetched(Event):
        """Conversations from number `start` on that a thread read or, unless `text` is empty, searched for."""

        def __init__(self, text: str, start: int, found: list[Summary], more: bool) -> None:
            super().__init__()
            self.text, self.start, self.found, self.more = text, start, found, more

    def __init__(self, session: ChatSession) -> None:
        super().__init__(id="history")
        self._session = session
        # Has its own connection, so that a long search does not block the chat.
        self._reader: ConversationReader | None = None
        self._wanted = PAGE
        self._found: dict[int, Summary] = {}
        self._to_highlight: int | None = None  # conversation to highlight once it has been fetched
        self._group = ""  # heading above the last entry
        self._more = False
        self._search_timer: Timer | None = None
        self._deleted: list[tuple[Summary, bool]] = []  # and whether it was the conversation on the screen

    def compose(self) -> ComposeResult:
        with Horizontal(id="history-title"):
            yield Static("Conversations", markup=False)
            yield _button("✕", "close", "Close this panel")
        yield SafeInput(placeholder="Search all messages; ↓ for the list", id="history-search", compact=True)
        yield Static("", id="history-note", markup=False)
        yield ConversationList(markup=False)
        with Horizontal(id="history-buttons"):
            yield _button("Pin", "pin", "Pin to the top, or unpin")
            yield _button("Rename", "rename", "Change the title")
            yield _button("Delete", "delete", "Delete (u undoes)")
            yield _button("Export", "export", "Write to a file")
            yield _button("Import", "import", "Import a ChatGPT or llm-edge export")

    def on_unmount(self) -> None:
        if self._reader is not None:
            self._reader.close()

    # ---- shown and hidden

    def toggle(self) -> None:
        if self.has_class("open"):
            self.action_close()
            return
        self.add_class("open")
        field = self.query_one(SafeInput)
        with field.prevent(SafeInput.Changed):
            field.value = ""
        self._to_highlight = self._session.conversation.id or None
        self._wanted = PAGE
        self.refresh_list()
        field.focus()

    def action_close(self) -> None:
        self.remove_class("open")
        self.post_message(self.Closed())

    def refresh_list(self) -> None:
        """Read the list from the store again, if the panel is open."""
        if self.has_class("open"):
            self._more = False  # until it has been fetched
            self._fetch(self.query_one(SafeInput).value, 0, self._wanted)

    @work(thread=True, exclusive=True, group="history")
    def _fetch(self, text: str, start: int, wanted: int) -> None:
        worker = get_current_worker()
        try:
            if self._reader is None:
                self._reader = ConversationReader(self._session.store.path)
            if text.strip():
                found = self._reader.search(text, wanted + 1)[start:]
            else:
                found = self._reader.recent(wanted + 1 - start, start)
        except LlmEdgeError as error:
            if not worker.is_cancelled:
                self.app.call_from_thread(notify, self, str(error), "error")
        else:
            if not worker.is_cancelled:
                count = wanted - start
                self.post_message(self.Fetched(text, start, found[:count], len(found) > count))

    def on_history_panel_fetched(self, event: Fetched) -> None:
        entries = self.query_one(ConversationList)
        if event.text != self.query_one(SafeInput).value:
            return  # the search has changed meanwhile
        self._more = event.more
        if event.start:
            new = [summary for summary in event.found if summary.id not in self._found]
            entries.add_options(self._options(event.text, new))
            return
        wanted = self._to_highlight or self._highlighted_id()
        index, scroll_y = entries.highlighted, entries.scroll_y
        self._found, self._group = {}, ""
        with self.app.batch_update():
            entries.set_options(self._options(event.text, event.found))
            if self._to_highlight is None:
                entries.scroll_to(y=scroll_y, animate=False, immediate=True)
            if wanted in self._found:
                entries.highlighted = entries.get_option_index(str(wanted))
            elif self._found:
                entries.highlighted = min(index or 0, entries.option_count - 1)
                if entries.options[entries.highlighted].disabled:
                    entries.action_cursor_down()
        self._to_highlight = None
        entries.call_after_refresh(entries.prefetch)
        none = "No matches." if event.text.strip() else "No conversations yet. Press ↓, then i, to import some."
        self._note("" if self._found else none)

    def _options(self, text: str, summaries: list[Summary]) -> list[Option]:
        """List entries, with headings, to add below the present ones."""
        words, now, shown = text.split(), time.time(), self._session.conversation.id
        options = []
        for each in summaries:
            group = "Found" if words else group_of(each, now)
            if group != self._group:
                self._group = group
                options.append(Option(heading(group), disabled=True))
            label = result_label(each, words, now) if words else entry_label(each, now, shown=each.id == shown)
            options.append(Option(label, id=str(each.id)))
            self._found[each.id] = each
        return options

    def on_conversation_list_near_end(self) -> None:
        if self._more:
            self._more = False  # until it has been fetched
            start, self._wanted = self._wanted, self._wanted + PAGE
            self._fetch(self.query_one(SafeInput).value, start, self._wanted)

    def on_input_changed(self) -> None:
        """Search once the user pauses."""
        if self._search_timer is not None:
            self._search_timer.stop()
        self._wanted = PAGE
        self._search_timer = self.set_timer(_SEARCH_DELAY, self.refresh_list)

    # ---- keys and the mouse

    def on_key(self, event: events.Key) -> None:
        """Go from the search field to the list, or clear the search."""
        if self.query_one(SafeInput).has_focus and event.key in ("down", "pagedown"):
            event.stop()
            self.query_one(ConversationList).focus()
        elif self.query_one(SafeInput).has_focus and event.key == "escape" and self.query_one(SafeInput).value:
            event.stop()
            event.prevent_default()
            self.query_one(SafeInput).value = ""

    def on_input_submitted(self) -> None:
        self.query_one(ConversationList).action_select()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        event.stop()
        self._do(str(event.button.name))

    def on_conversation_list_action_requested(self, event: ConversationList.ActionRequested) -> None:
        self._do(event.action)

    @on(OptionList.OptionSelected)
    def _selected(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self.open(int(event.option.id or 0))

    def _do(self, action: str) -> None:
        summary = self._found.get(self._highlighted_id() or 0)
        if action == "close":
            self.action_close()
        elif action == "search":
            self.query_one(SafeInput).focus()
        elif action == "undo":
            self.undo()
        elif action == "import":
            self.import_conversations()
        elif summary is None:
            notify(self, "Choose a conversation first.")
        else:
            {"pin": self.pin, "rename": self.rename, "delete": self.delete, "export": self.export}[action](summary)

    def _highlighted_id(self) -> int | None:
        """The id of the highlighted conversation."""
        option = self.query_one(ConversationList).highlighted_option
        return int(option.id) if option is not None and option.id else None

    def _note(self, text: str) -> None:
        note = self.query_one("#history-note", Static)
        note.update(printable(text))
        note.display = bool(text)

    # ---- actions

    def open(self, id_: int) -> None:
        interrupted = self._session.answering is not None
        try:
            self._session.open(id_)
        except LlmEdgeError as error:
            notify(self, str(error), "error")
            self.refresh_list()
            return
        if interrupted:
            notify(self, "The answer in the other conversation was stopped. Press Ctrl-G there to continue it.")
        self.post_message(self.ConversationChanged(opened=True))
        if self.screen.has_class("narrow"):
            self.action_close()
        else:
            self.refresh_list()
            self.post_message(self.Closed())

    def pin(self, summary: Summary) -> None:
        self._change(lambda: self._session.pin(summary.id, not summary.pinned))

    @work
    async def rename(self, summary: Summary) -> None:
        """Ask for a new title."""
        title = await self.app.push_screen_wait(TextPrompt("Title", summary.title, accept="Rename"))
        renamed = title is not None and self._change(lambda: self._session.rename(summary.id, title))
        if renamed and summary.id == self._session.conversation.id:
            self.post_message(self.ConversationChanged(opened=False))

    def delete(self, summary: Summary) -> None:
        """Delete a conversation; `undo` restores it."""
        shown = summary.id == self._session.conversation.id
        if self._change(lambda: self._session.delete(summary.id)):
            self._deleted.append((summary, shown))
            notify(self, f"Deleted “{_short(summary.title)}”. Press u in the list to undo.")
            if shown:
                self.post_message(self.ConversationChanged(opened=True))

    def undo(self) -> None:
        """Restore the conversation that was deleted last."""
        if not self._deleted:
            notify(self, "Nothing to undo.")
            return
        summary, shown = self._deleted[-1]
        self._to_highlight = summary.id
        if self._change(lambda: self._session.store.restore(summary.id)):
            self._deleted.pop()
            notify(self, f"Restored “{_short(summary.title)}”.")
            if shown and not self._session.conversation.messages:
                self._session.open(summary.id)
                self.post_message(self.ConversationChanged(opened=True))

    def _change(self, change: Callable[[], object]) -> bool:
        try:
            change()
        except LlmEdgeError as error:
            notify(self, str(error), "error")
            return False
        finally:
            self.refresh_list()
        return True

    @work
    async def export(self, summary: Summary) -> None:
        await export_conversation(self.app, self._session.store, summary)

    @work(exclusive=True, group="history-import")
    async def import_conversations(self) -> None:
        await import_conversations(self.app, self._session.store, self._note)
        self._note("")
        self.refresh_list()


def _button(label: str, action: str, tooltip: str) -> Button:
    button = Button(label, name=action, tooltip=tooltip, compact=True)
    button.can_focus = False  # the list has keys for the same actions
    return button


def _short(title: str) -> str:
    return one_line(title, 40) or "(untitled)"
