"""One column of the comparison: the model, its parameters and its answer."""

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

SIDES = ("left", "right")


class CompareColumn(Vertical):
    """One side of the comparison: 0 for left, 1 for right."""

    def __init__(self, number: int) -> None:
        super().__init__(id=SIDES[number], classes="side")
        self._number = number
        self._mounting = asyncio.Lock()

    def compose(self) -> ComposeResult:
        yield Static("", classes="side-model", markup=False)
        yield Static("", classes="side-parameters", markup=False)
        yield VerticalScroll(classes="side-answer", can_focus=False)
        with Horizontal(classes="side-buttons"):
            yield Button(f"Keep this ({self._number + 1})", id=f"keep-{self._number}", compact=True, disabled=True)
            yield Static("", classes="side-state", markup=False)

    def show(self, side: ComparisonSide) -> None:
        """Show the model, its parameters and the state."""
        self.query_one(".side-model", Static).update(printable(f"{side.responder.name} · {side.responder.detail}"))
        parameters = summarize(side.session.parameters.changed) or MODEL_DEFAULTS
        self.query_one(".side-parameters", Static).update(printable(parameters))
        self.show_state(side)

    async def show_answer(self, side: ComparisonSide) -> None:
        """Replace the answer by the side's current one; may be called twice for the same answer."""
        scroll = self.query_one(VerticalScroll)
        async with self._mounting:
            shown = [view.message for view in self.query(MessageView)]
            if side.answer is None or side.answer not in shown:
                await scroll.remove_children()
                if side.answer is not None:
                    view = MessageView(side.answer)
                    view.live, view.in_conversation, view.known_params = True, False, side.answer.params
                    await scroll.mount(view)
        self.show_state(side)

    def update_answer(self, side: ComparisonSide) -> None:
        """Show what was added to the answer; keeps scrolling only if the end is visible."""
        scroll = self.query_one(VerticalScroll)
        at_end = scroll.scroll_y >= scroll.max_scroll_y - 1
        for view in self.query(MessageView):
            view.live = side.session.answering is not None
            view.changed()
        if at_end:
            scroll.scroll_end(animate=False)
        self.show_state(side)

    def show_state(self, side: ComparisonSide) -> None:
        """Show the speed or that the side is waiting, and whether its answer can be kept."""
        text = ""
        if side.waiting:
            text = "Waiting for the other answer"
        elif side.session.answering is not None:
            text = f"{side.session.rates[-1]:.0f} tok/s" if side.session.rates[-1] else "Answering …"
        self.query_one(".side-state", Static).update(text)
        self.query_one(Button).disabled = side.answer is None or not side.answer.content or side.busy
