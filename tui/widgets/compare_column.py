"""One of the two columns of a comparison: who answers, how, and what. Knows nothing of the other one."""

from __future__ import annotations

import asyncio

from textual.app import ComposeResult
from textual.containers import Horizontal, Vertical, VerticalScroll
from textual.widgets import Button, Static

from llm_edge.chat.comparison import ComparisonSide
from llm_edge.chat.parameters import summarize
from llm_edge.chat.presets import MODEL_DEFAULTS
from llm_edge.chat.text import printable
from llm_edge.tui.widgets.message_view import MessageView

NAMES = ("left", "right")


class Column(Vertical):
    """One side: who, how, what.

    Args:
        number: 0 or 1.
    """

    def __init__(self, number: int) -> None:
        super().__init__(id=NAMES[number], classes="side")
        self._number = number
        self._beginning = asyncio.Lock()

    def compose(self) -> ComposeResult:
        """From above."""
        yield Static("", classes="side-who", markup=False)
        yield Static("", classes="side-how", markup=False)
        yield VerticalScroll(Static("", classes="side-none", markup=False), classes="side-answer", can_focus=False)
        with Horizontal(classes="side-buttons"):
            yield Button(f"Keep this ({self._number + 1})", id=f"keep-{self._number}", compact=True, disabled=True)
            yield Static("", classes="side-state", markup=False)

    def show(self, side: ComparisonSide) -> None:
        """Who answers, and how."""
        self.query_one(".side-who", Static).update(printable(f"{side.responder.name} · {side.responder.detail}"))
        how = summarize(side.session.parameters.changed) or MODEL_DEFAULTS
        self.query_one(".side-how", Static).update(printable(how))

    async def begin(self, side: ComparisonSide) -> None:
        """A question was asked; who asked and who looks may both find out."""
        scroll = self.query_one(VerticalScroll)
        async with self._beginning:
            shown = [view.message for view in self.query(MessageView)]
            if side.answer is None or side.answer not in shown:
                await scroll.remove_children()
                if side.answer is not None:
                    view = MessageView(side.answer)
                    view.live, view.kept = True, False
                    await scroll.mount(view)
        self.state(side)

    def look(self, side: ComparisonSide) -> None:
        """The answer has grown; who reads its end goes on doing so."""
        scroll = self.query_one(VerticalScroll)
        at_end = scroll.scroll_y >= scroll.max_scroll_y - 1
        for view in self.query(MessageView):
            view.live = side.session.answering is not None
            view.changed()
        if at_end:
            scroll.scroll_end(animate=False)
        self.state(side)

    def state(self, side: ComparisonSide) -> None:
        """A word on what goes on."""
        answer, text = side.answer, ""
        if side.waiting:
            text = "waits for the other one"
        elif side.session.answering is not None:
            text = f"{side.session.rates[-1]:.0f} tok/s" if side.session.rates[-1] else "answers …"
        self.query_one(".side-state", Static).update(text)
        there = answer is not None and bool(answer.content) and not side.busy
        self.query_one(Button).disabled = not there
