"""The line of instruments: how full the context is, how fast tokens come, what goes on."""

from __future__ import annotations

from rich.style import Style
from rich.text import Text
from textual.app import ComposeResult
from textual.containers import Horizontal
from textual.reactive import reactive
from textual.widget import Widget
from textual.widgets import Sparkline, Static

from llm_edge.tui.terminal import printable


class ContextGauge(Widget):
    """The context as a bar: what the conversation takes, what is being written, what is left."""

    history = reactive(0)
    prompt = reactive(0)
    limit = reactive(0)

    def render(self) -> Text:
        """The bar, and its numbers."""
        if not self.limit:
            return Text("context: not known", style="dim")
        width = max(min(self.size.width - 30, 24), 8)
        left = max(self.limit - self.history - self.prompt, 0)
        taken = min(-(-width * self.history // self.limit), width)
        written = min(-(-width * self.prompt // self.limit), width - taken)
        variables = self.app.theme_variables
        text = Text("█" * taken, style=Style.parse(variables["primary"]))
        text.append("█" * written, style=Style.parse(variables["accent"]))
        text.append("░" * (width - taken - written), style="dim")
        shown = f" {self.history:,}" + (f" + {self.prompt:,}" if self.prompt else "") + f", {left:,} left"
        return text.append(shown)


class Instruments(Horizontal):
    """Gauge, sparkline of tokens per second, and a word on the state."""

    def __init__(self) -> None:
        super().__init__(id="instruments")

    def compose(self) -> ComposeResult:
        """Its three parts."""
        yield ContextGauge(id="gauge")
        yield Sparkline([0.0], id="speed")
        yield Static("", id="state", markup=False)

    def say(self, text: str) -> None:
        """A word on what goes on."""
        self.query_one("#state", Static).update(printable(text))

    def speed(self, rates: list[float]) -> None:
        """Tokens per second of late."""
        self.query_one("#speed", Sparkline).data = rates

    def context(self, history: int, prompt: int, limit: int | None) -> None:
        """Tokens of the conversation, of the question being written, and of the context."""
        gauge = self.query_one("#gauge", ContextGauge)
        gauge.history, gauge.prompt, gauge.limit = history, prompt, limit or 0
