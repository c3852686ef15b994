"""The status bar: how full the context is, the generation speed, and the chat's state."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from rich.text import Text
from textual import work
from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.reactive import reactive
from textual.timer import Timer
from textual.widget import Widget
from textual.widgets import Sparkline, Static

from llm_edge.chat.responder import tokens_of_question
from llm_edge.chat.session import ChatSession
from llm_edge.chat.text import printable
from llm_edge.tui.themes import theme_style

_SAMPLE_INTERVAL = 0.5  # seconds between two points of the speed
_COUNT_DELAY = 0.3  # seconds without a key press before the typed text is counted


class ContextGauge(Widget):
    """A bar of the context: tokens of the conversation, of the typed question, and free ones."""

    used = reactive(0)
    typed = reactive(0)
    limit = reactive(0)  # the context length; 0 if unknown

    def render(self) -> Text:
        if not self.limit:
            return Text("Context size unknown", style="dim")
        left = max(self.limit - self.used - self.typed, 0)
        label = f" {self.used:,}" + (f" + {self.typed:,}" if self.typed else "") + f" used, {left:,} left"
        width = max(min(self.size.width - max(len(label), 34), 24), 4)
        used = min(-(-width * self.used // self.limit), width)
        typed = min(-(-width * self.typed // self.limit), width - used)
        variables = self.app.theme_variables
        text = Text("█" * used, style=theme_style(variables, "primary"))
        text.append("█" * typed, style=theme_style(variables, "accent"))
        text.append("░" * (width - used - typed), style="dim")
        return text.append(label)


class StatusBar(Horizontal):
    """Context gauge, sparkline of tokens per second, and state.

    `idle_state` returns the state to show while there is no answer in progress.
    """

    def __init__(self, session: ChatSession, idle_state: Callable[[], str]) -> None:
        super().__init__(id="status-bar")
        self.sampling: Timer | None = None
        self._session, self._idle_state = session, idle_state
        self._gauge = ContextGauge(id="gauge")
        self._speed = Sparkline([0.0, 0.0], id="speed")
        self._state = Static("", id="state", markup=False)
        self._shown_state = ""

    def compose(self) -> ComposeResult:
        yield self._gauge
        yield self._speed
        yield self._state

    def on_mount(self) -> None:
        self.sampling = self.set_interval(_SAMPLE_INTERVAL, self._sample)

    def show_state(self, text: str) -> None:
        """Show a state until the next one."""
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

    def _sample(self) -> None:
        rate = self._session.sample_rate()
        self.show_speed(list(self._session.rates))
        self.refresh_state()
        if self._session.answering is not None and rate:
            self.show_state(f"{rate:.0f} tok/s · Esc to stop")
