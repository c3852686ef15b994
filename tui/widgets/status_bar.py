"""The status bar: how full the context is, the generation speed, and the chat's state."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from rich.style import Style
from rich.text import Text
from textual import events, work
from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.message import Message as Event
from textual.reactive import reactive
from textual.timer import Timer
from textual.widget import Widget
from textual.widgets import Sparkline, Static

from llm_edge.chat.responder import tokens_of_question
from llm_edge.chat.session import ChatSession
from llm_edge.chat.text import printable
from llm_edge.tui.themes import theme_style

_SAMPLE_INTERVAL = 0.5  # seconds between two points of the speed
_MIN_BAR, _MAX_BAR = 6, 24  # columns
_PHONE_BELOW = 60  # columns
_EIGHTHS = " ▏▎▍▌▋▊▉"
_COUNT_DELAY = 0.3  # seconds without a key press before the typed text is counted


class ContextGauge(Widget):
    """A bar of the context: tokens of the conversation, of the typed question, and free ones, in true proportion."""

    used = reactive(0)
    typed = reactive(0)
    limit = reactive(0)  # the context length; 0 if unknown

    def render(self) -> Text:
        if not self.limit:
            return Text(f"Context {self.used:,} tokens" if self.used else "Context size unknown", style="dim")
        typed = f" + {self.typed:,} typed" if self.typed else ""
        label = f" {self.used:,}{typed} of {self.limit:,} tokens"
        if len("Context ") + _MIN_BAR + len(label) > self.size.width:
            label = f" {self.used + self.typed:,} of {self.limit:,}"
        title = "Context " if len("Context ") + _MIN_BAR + len(label) <= self.size.width else ""
        width = max(min(self.size.width - len(title) - len(label), _MAX_BAR), 0)
        return Text(title, style="dim").append_text(self._bar(width)).append(label)

    def _bar(self, width: int) -> Text:
        """The bar, with a resolution of an eighth of a column; anything used shows as at least one eighth."""
        variables, total = self.app.theme_variables, 8 * width
        used = min(max(round(total * self.used / self.limit), int(self.used > 0)), total)
        both = min(max(round(total * (self.used + self.typed) / self.limit), used + int(self.typed > 0)), total)
        used_color = theme_style(variables, "primary").color
        typed_color = theme_style(variables, "accent").color
        free_color = theme_style(variables, "panel").color
        bar = Text()
        for column in range(0, total, 8):
            at_used, at_both = min(max(used - column, 0), 8), min(max(both - column, 0), 8)
            if 0 < at_used < 8:
                beyond = typed_color if at_both > at_used else free_color
                bar.append(_EIGHTHS[at_used], Style(color=used_color, bgcolor=beyond))
            elif 0 < at_both < 8 and not at_used:
                bar.append(_EIGHTHS[at_both], Style(color=typed_color, bgcolor=free_color))
            else:
                bar.append(" ", Style(bgcolor=used_color if at_used else typed_color if at_both else free_color))
        return bar


class StopButton(Static):
    """Stops the answer when clicked; visible while there is one."""

    def __init__(self) -> None:
        super().__init__("■ Stop", id="stop", markup=False)
        self.display = False

    async def on_click(self) -> None:
        await self.screen.run_action("stop")


class StatusBar(Horizontal):
    """Context gauge, tokens per second, state, and a button that stops the answer.

    `idle_state` returns the state to show while there is no answer in progress.
    """

    def __init__(self, session: ChatSession, idle_state: Callable[[], str]) -> None:
        super().__init__(id="status-bar")
        self.sampling: Timer | None = None
        self._session, self._idle_state = session, idle_state
        self._gauge = ContextGauge(id="gauge")
        self._speed = Sparkline([0.0, 0.0], id="speed")
        self._state = Static("", id="state", markup=False)
        self._stop = StopButton()
        self._shown_state = ""

    def compose(self) -> ComposeResult:
        yield self._gauge
        yield self._speed
        yield Static("tok/s", id="speed-unit", markup=False)
        yield self._state
        yield self._stop

    def on_mount(self) -> None:
        self.sampling = self.set_interval(_SAMPLE_INTERVAL, self._sample)

    def on_resize(self, event: events.Resize) -> None:
        self.set_class(event.size.width < _PHONE_BELOW, "phone")

    def show_state(self, text: str) -> None:
        """Show a state until the next one."""
        self._stop.display = self._session.answering is not None
        if text != self._shown_state:
            self._shown_state = text
            self._state.update(printable(text), layout=False)

    def show_speed(self, rates: list[float]) -> None:
        """Show tokens per second over time."""
        if rates != self._speed.data:
            self._speed.data = rates

    def refresh_state(self) -> None:
        """Update the gauge and, while there is no answer in progress, the state."""
        responder = self._session.responder
        self._gauge.used = self._session.used()
        self._gauge.limit = responder.context_length or 0 if responder else 0
        if self._session.answering is None:
            self.show_state(self._idle_state())

    @work(exclusive=True, group="count")
    async def count_typed(self, text: str) -> None:
        """Show the tokens of the typed text once the user pauses; of empty text, at once."""
        count = 0
        if text:
            await asyncio.sleep(_COUNT_DELAY)
            first = not self._session.conversation.messages
            count = await asyncio.to_thread(tokens_of_question, self._session.responder, text, first=first)
        self._gauge.typed = count

    class TitleChanged(Event):
        """The model gave the conversation a title."""

    def _sample(self) -> None:
        if self._session.poll_title():
            self.post_message(self.TitleChanged())
        rate = self._session.sample_rate()
        self.show_speed(list(self._session.rates))
        self.refresh_state()
        if self._session.answering is not None and rate:
            hint = "" if self.has_class("phone") else " · Esc to stop"  # where there is hardly a keyboard
            self.show_state(f"{rate:.0f} tok/s{hint}")
