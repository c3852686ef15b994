"""The line of instruments: how full the context is, how fast tokens come, what goes on."""

from __future__ import annotations

from rich.text import Text
from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.reactive import reactive
from textual.widget import Widget
from textual.widgets import Sparkline, Static

from llm_edge.chat.text import printable
from llm_edge.tui.themes import coloured


class ContextGauge(Widget):
    """The context as a bar: what the conversation takes, what is being written, what is left."""

    history = reactive(0)
    prompt = reactive(0)
    limit = reactive(0)

    def render(self) -> Text:
        """The bar, and its numbers."""
        if not self.limit:
            return Text("context: not known", style="dim")
        left = max(self.limit - self.history - self.prompt, 0)
        shown = f" {self.history:,}" + (f" + {self.prompt:,}" if self.prompt else "") + f" used, {left:,} left"
        width = max(min(self.size.width - max(len(shown), 34), 24), 4)
        taken = min(-(-width * self.history // self.limit), width)
        written = min(-(-width * self.prompt // self.limit), width - taken)
        variables = self.app.theme_variables
        text = Text("█" * taken, style=coloured(variables, "primary"))
        text.append("█" * written, style=coloured(variables, "accent"))
        text.append("░" * (width - taken - written), style="dim")
        return text.append(shown)


class Instruments(Horizontal):
    """Gauge, sparkline of tokens per second, and a word on the state."""

    def __init__(self) -> None:
        super().__init__(id="instruments")
        self._gauge = ContextGauge(id="gauge")
        self._speed = Sparkline([0.0, 0.0], id="speed")
        self._state = Static("", id="state", markup=False)
        self._said = ""

    def compose(self) -> ComposeResult:
        """Its three parts."""
        yield self._gauge
        yield self._speed
        yield self._state

    def say(self, text: str) -> None:
        """A word on what goes on."""
        if text != self._said:
            self._said = text
            self._state.update(printable(text), layout=False)

    def speed(self, rates: list[float]) -> None:
        """Tokens per second of late."""
        if rates != self._speed.data:
            self._speed.data = rates

    def context(self, history: int, prompt: int, limit: int | None) -> None:
        """Tokens of the conversation, of the question being written, and of the context."""
        self._gauge.history, self._gauge.prompt, self._gauge.limit = history, prompt, limit or 0
