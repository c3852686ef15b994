"""The list of kept conversations: how each looks, and which keys it takes. Knows nothing of what they do."""

from __future__ import annotations

import re
import time
import unicodedata
from collections.abc import Sequence
from datetime import date
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.content import Content
from textual.message import Message as Event
from textual.widgets import OptionList

from llm_edge.chat.history.search import Summary
from llm_edge.chat.text import one_line, printable, snippet

WIDTH = 37  # columns of a line of what a search found
_NEAR = 30  # lines before the end of what was fetched, from where on more is
_LONGEST_NAME = 60  # characters of a file's name


class Conversations(OptionList):
    """The list; what is to be done with the conversation it stands on, the panel does."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "select", "Open"),
        Binding("r,f2", "panel('rename')", "Rename", key_display="r"),
        Binding("p", "panel('pin')", "Pin"),
        Binding("d,delete", "panel('delete')", "Delete", key_display="d"),
        Binding("u,ctrl+z", "panel('undo')", "Undo", key_display="u"),
        Binding("e", "panel('export')", "Export"),
        Binding("i", "panel('import')", "Import"),
        Binding("slash,ctrl+f", "panel('search')", "Search", key_display="/"),
    ]

    class NearEnd(Event):
        """What is beyond the end may soon be looked at."""

    class Wished(Event):
        """Something is to be done with the conversation that the list stands on."""

        def __init__(self, what: str) -> None:
            super().__init__()
            self.what = what

    def action_panel(self, what: str) -> None:
        """Pass a wish on."""
        self.post_message(self.Wished(what))

    def action_cursor_up(self) -> None:
        """Above the first one is the search."""
        if self.highlighted is None or all(option.disabled for option in self.options[: self.highlighted]):
            self.post_message(self.Wished("search"))
        else:
            super().action_cursor_up()

    def action_cursor_down(self) -> None:
        """The last one is the last."""
        if self.highlighted is None or self.highlighted < self.option_count - 1:
            super().action_cursor_down()

    async def _on_click(self, event: events.Click) -> None:
        """The right button only goes there; Textual's own way, which opens, follows else."""
        place = event.style.meta.get("option")
        if event.button == 3 and isinstance(place, int):
            event.prevent_default()
            self.focus()
            self.highlighted = place

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        """Tell in time."""
        super().watch_scroll_y(old_value, new_value)
        self.look_ahead()

    def look_ahead(self) -> None:
        """Tell where the end is near."""
        if self.max_scroll_y - self.scroll_y < _NEAR:
            self.post_message(self.NearEnd())


def group_of(summary: Summary, now: float) -> str:
    """Under which heading it stands, by the calendar of this machine; times are unix seconds."""
    if summary.pinned:
        return "Pinned"
    days = _day(now) - _day(summary.updated)
    return "Today" if days <= 0 else "Yesterday" if days == 1 else "Earlier"


def heading(text: str) -> Content:
    """A line above a group."""
    return Content.styled(printable(text), "bold $text-muted")


def prompt(summary: Summary, now: float, *, shown: bool) -> Content:
    """Two lines: its title, and when and by whom it was held. `shown`: it is the conversation of now."""
    title = Content.styled(_title(summary), "bold $text-accent" if shown else "")
    count = "1 message" if summary.count == 1 else f"{summary.count} messages"
    facts = [_when(summary.updated, now), count, printable(one_line(summary.model))]
    return Content("\n").join([title, Content.styled("  " + " · ".join(filter(None, facts)), "dim")])


def found_prompt(summary: Summary, words: Sequence[str], now: float) -> Content:
    """Its title, and up to two lines around the words where they were found."""
    mark = re.compile("|".join(re.escape(word) for word in sorted(words, key=len, reverse=True)), re.IGNORECASE)
    lines = [_marked(_title(summary), mark)]
    if summary.snippet:
        text = snippet(printable(summary.snippet).replace("\n", " "), words, 2 * WIDTH - 2)
        lines += Content(text).wrap(WIDTH)[:2]
        lines[1:] = [_marked(line.plain.strip(), mark, "dim") for line in lines[1:]]
    else:
        lines.append(Content.styled("  " + _when(summary.updated, now), "dim"))
    return Content("\n").join(lines)


def file_name(title: str) -> str:
    """A name for a conversation's file that every system takes."""
    plain = unicodedata.normalize("NFC", printable(title))
    words = re.sub(r"[^\w.]+", "-", plain).strip("-._")[:_LONGEST_NAME].strip("-._")
    return f"{words or 'conversation'}.md"


def _title(summary: Summary) -> str:
    return one_line(printable(summary.title)) or "(no title)"


def _marked(text: str, mark: re.Pattern[str], style: str = "") -> Content:
    content = Content.styled(text, style) if style else Content(text)
    for match in mark.finditer(text):
        content = content.stylize("bold $text-accent not dim", match.start(), match.end())
    return content


def _when(moment: float, now: float) -> str:
    there, here = time.localtime(moment), time.localtime(now)
    days = _day(now) - _day(moment)
    if days <= 1:
        return time.strftime("%H:%M", there)
    return time.strftime("%d %b" if there.tm_year == here.tm_year else "%d %b %Y", there)


def _day(moment: float) -> int:
    """The day's number in the calendar of this machine."""
    return date.fromtimestamp(moment).toordinal()
