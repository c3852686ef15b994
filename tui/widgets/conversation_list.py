"""The list of conversations: how each entry looks, and the keys of the list."""

from __future__ import annotations

import re
import time
import unicodedata
from collections.abc import Sequence
from datetime import date
from typing import ClassVar

from rich.cells import cell_len
from textual import events
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.message import Message as Event
from textual.widgets import OptionList

from llm_edge.chat.history.search import Summary
from llm_edge.chat.text import one_line, printable, snippet

WIDTH = 37  # columns of a search result
_PREFETCH_LINES = 30  # when fewer remain below the visible ones, more conversations are fetched
_MAX_FILE_NAME = 60  # characters


class ConversationList(OptionList):
    """The list; actions on the highlighted conversation are requested with `ActionRequested`."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "select", "Open"),
        Binding("r,f2", "request('rename')", "Rename", key_display="r"),
        Binding("p", "request('pin')", "Pin"),
        Binding("d,delete", "request('delete')", "Delete", key_display="d"),
        Binding("u,ctrl+z", "request('undo')", "Undo", key_display="u"),
        Binding("e", "request('export')", "Export"),
        Binding("i", "request('import')", "Import"),
        Binding("slash,ctrl+f", "request('search')", "Search", key_display="/"),
    ]

    class NearEnd(Event):
        """The user has scrolled close to the end."""

    class ActionRequested(Event):
        """The user asked for an action, on the highlighted conversation if it concerns one."""

        def __init__(self, action: str) -> None:
            super().__init__()
            self.action = action

    def action_request(self, action: str) -> None:
        self.post_message(self.ActionRequested(action))

    def action_cursor_up(self) -> None:
        """Move up; from the first conversation, to the search field."""
        if self.highlighted is None or all(option.disabled for option in self.options[: self.highlighted]):
            self.post_message(self.ActionRequested("search"))
        else:
            super().action_cursor_up()

    def action_cursor_down(self) -> None:
        """Move down, without wrapping around."""
        if self.highlighted is None or self.highlighted < self.option_count - 1:
            super().action_cursor_down()

    async def _on_click(self, event: events.Click) -> None:
        """Highlight with the right button; with others, Textual's handler opens the conversation."""
        index = event.style.meta.get("option")
        if event.button == 3 and isinstance(index, int):
            event.prevent_default()
            self.focus()
            self.highlighted = index

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        """Ask for more conversations in time."""
        super().watch_scroll_y(old_value, new_value)
        self.prefetch()

    def prefetch(self) -> None:
        """Post `NearEnd` if the end is near."""
        if self.max_scroll_y - self.scroll_y < _PREFETCH_LINES:
            self.post_message(self.NearEnd())


def group_of(summary: Summary, now: float) -> str:
    """The heading that a conversation is listed under, by local date; `now` is in Unix seconds."""
    if summary.pinned:
        return "Pinned"
    days = _day(now) - _day(summary.updated)
    return "Today" if days <= 0 else "Yesterday" if days == 1 else "Earlier"


def heading(text: str) -> Content:
    """The heading of a group."""
    return Content.styled(printable(text), "bold $text-muted")


def entry_label(summary: Summary, now: float, *, shown: bool) -> Content:
    """Two lines: title; and time, model and, where it fits, length. `shown` marks the conversation on the screen."""
    title = Content.styled(_title(summary), "bold $text-accent" if shown else "")
    count = "1 message" if summary.count == 1 else f"{summary.count} messages"
    details = [each for each in (_when(summary.updated, now), printable(one_line(summary.model)), count) if each]
    if cell_len(" · ".join(details)) > WIDTH:
        details.remove(count)
    return Content("\n").join([title, Content.styled("  " + " · ".join(details), "dim")])


def result_label(summary: Summary, words: Sequence[str], now: float) -> Content:
    """The title, and up to two lines of text around the words that were found."""
    pattern = re.compile("|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)), re.IGNORECASE)
    lines = [_highlighted(_title(summary), pattern)]
    if summary.snippet:
        text = snippet(printable(summary.snippet).replace("\n", " "), words, 2 * WIDTH - 2)
        lines += Content(text).wrap(WIDTH)[:2]
        lines[1:] = [_highlighted(line.plain.strip(), pattern, "dim") for line in lines[1:]]
    else:
        lines.append(Content.styled("  " + _when(summary.updated, now), "dim"))
    return Content("\n").join(lines)


def file_name(title: str) -> str:
    """A file name for a conversation that is valid on every system."""
    plain = unicodedata.normalize("NFC", printable(title))
    words = re.sub(r"[^\w.]+", "-", plain).strip("-._")[:_MAX_FILE_NAME].strip("-._")
    return f"{words or 'conversation'}.md"


def _title(summary: Summary) -> str:
    return one_line(printable(summary.title)) or "(no title)"


def _highlighted(text: str, pattern: re.Pattern[str], style: str = "") -> Content:
    content = Content.styled(text, style) if style else Content(text)
    for match in pattern.finditer(text):
        content = content.stylize("bold $text-accent not dim", match.start(), match.end())
    return content


def _when(moment: float, now: float) -> str:
    there, here = time.localtime(moment), time.localtime(now)
    days = _day(now) - _day(moment)
    if days <= 1:
        return time.strftime("%H:%M", there)
    return time.strftime("%d %b" if there.tm_year == here.tm_year else "%d %b %Y", there)


def _day(moment: float) -> int:
    """The ordinal of the local date."""
    return date.fromtimestamp(moment).toordinal()
