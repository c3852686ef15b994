"""The comparison screen: one question, and the answers of two models, or of one with two settings, side by side."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable
from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.screen import ModalScreen
from textual.widgets import Button, Static

from llm_edge.chat.attachments import split_attachments
from llm_edge.chat.comparison import Comparison, ComparisonSide
from llm_edge.chat.history.conversation import Message
from llm_edge.chat.parameters import ChatParameters
from llm_edge.chat.presets import Presets
from llm_edge.chat.responder import Responder
from llm_edge.chat.session import ChatSession
from llm_edge.chat.text import one_line, printable
from llm_edge.runtime.errors import LlmEdgeError
from llm_edge.runtime.sampling.presets import PRESET_PARAMETERS
from llm_edge.tui.notifications import notify
from llm_edge.tui.screens.tokens import TokensScreen
from llm_edge.tui.widgets.compare_column import SIDES, CompareColumn
from llm_edge.tui.widgets.composer import Composer
from llm_edge.tui.widgets.footer import KeyFooter
from llm_edge.tui.widgets.message_view import MessageView
from llm_edge.tui.widgets.parameter_fields import ParameterChanged
from llm_edge.tui.widgets.parameter_panel import ParameterPanel

_POLL_INTERVAL = 1 / 12  # seconds
_SAMPLE_INTERVAL = 0.5  # seconds between two measurements of the speed
_CONTRASTING_PRESETS = ("greedy", "balanced")  # at least one of them differs from any model's defaults


class CompareScreen(ModalScreen[str | None]):
    """The comparison screen; dismissed with the question if an answer was added to the conversation.

    Args:
        session: the chat; both sides start with its model, and the left side with its parameters.
        presets: presets of the parameter panel.
        text: the question to start with.
        question: a question of the conversation to ask again instead; kept answers become versions of its answer.
        choose_model: lets the user choose a model, and returns a function that opens it; None if there is no choice.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f3,ctrl+o", "parameters", "Parameters", key_display="F3"),
        Binding("f4,ctrl+l", "choose_model", "Models", key_display="F4"),
        Binding("1", "keep(0)", "Keep left", show=False),
        Binding("2", "keep(1)", "Keep right", show=False),
        Binding("3", "keep_both", "Keep both", show=False),
        Binding("f8", "one_at_a_time", "One at a time"),
        Binding("escape", "stop_or_close", "Stop, close", key_display="esc"),
        Binding("f7", "close", "Close", show=False, priority=True),
        Binding("f1", "app.help", "Help", show=False),
        Binding("ctrl+c", "app.copy_or_stop", "Copy", show=False, priority=True),
        Binding("ctrl+q", "app.quit", "Quit", show=False, priority=True),
    ]

    def __init__(
        self,
        session: ChatSession,
        presets: Presets | None = None,
        text: str = "",
        question: Message | None = None,
        choose_model: Callable[[], Awaitable[Callable[[], Responder] | None]] | None = None,
    ) -> None:
        super().__init__()
        responder = session.responder
        assert responder is not None
        left = ChatParameters(responder.default_params, session.parameters.changed)
        right = _contrasting(left)
        path = session.conversation.path()
        self._history = path[: path.index(question)] if question is not None else path
        self._comparison = Comparison(ComparisonSide(responder, left), ComparisonSide(responder, right), self._history)
        self._session, self._presets, self._choose_model = session, presets, choose_model
        self._chat_responder = responder
        self._question, self._text = question, question.content if question is not None else text
        self._asked = ""
        self._panel_side = 1  # whose parameters the panel shows
        self._dismissed = False

    @property
    def sides(self) -> list[ComparisonSide]:
        """Left and right."""
        return self._comparison.sides

    def compose(self) -> ComposeResult:
        yield Static("Compare two answers", id="compare-title", markup=False)
        with Horizontal(id="compare"):
            yield CompareColumn(0)
            yield CompareColumn(1)
            yield ParameterPanel(self.sides[1].session.parameters, self._presets, self.sides[1].responder.name)
        yield Composer("Ask both. ⏎ to send")
        yield KeyFooter()

    def on_mount(self) -> None:
        composer = self.query_one(Composer)
        composer.write(self._text)
        composer.select_all()  # so that typing replaces the question
        self._show_question(self._text)
        self._show()
        self.set_interval(_POLL_INTERVAL, self._poll)
        self.set_interval(_SAMPLE_INTERVAL, self._sample)

    def _show_question(self, text: str) -> None:
        question = split_attachments(text)[1].strip()
        title = f"Compare: {one_line(question)}" if question else "Compare two answers"
        self.query_one("#compare-title", Static).update(printable(title))

    def _columns(self) -> list[CompareColumn]:
        return [self.query_one(f"#{name}", CompareColumn) for name in SIDES]

    def _show(self) -> None:
        for column, side in zip(self._columns(), self.sides, strict=True):
            column.show(side)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:  # noqa: ARG002 (Textual's)
        return action != "choose_model" or self._choose_model is not None

    # ---- asking

    async def on_composer_submitted(self, event: Composer.Submitted) -> None:
        event.stop()
        text = event.text
        if not text.strip():
            return
        try:
            self._comparison.ask(text)
        except LlmEdgeError as error:
            notify(self, str(error), "warning")
            self.query_one(Composer).write(text)
            return
        self._asked = text
        self._show_question(text)
        for column, side in zip(self._columns(), self.sides, strict=True):
            await column.show_answer(side)

    async def _poll(self) -> None:
        if self._dismissed or not self._comparison.busy or len(self.query(CompareColumn)) < len(SIDES):
            return
        before = [side.answer for side in self.sides]
        updates = self._comparison.poll()
        for number, (column, side) in enumerate(zip(self._columns(), self.sides, strict=True)):
            if side.answer is not before[number]:
                await column.show_answer(side)
            if updates[number] is not None:
                column.update_answer(side)
            else:
                column.show_state(side)
        composer = self.query_one(Composer)
        if not self._comparison.busy and self.focused is composer and not composer.text:
            self.query_one("#keep-0", Button).focus()

    def _sample(self) -> None:
        for side in self.sides:
            if side.session.answering is not None:
                side.session.sample_rate()

    # ---- parameters and model of a side

    async def action_parameters(self) -> None:
        """Show the parameters of the right side, then those of the left one, then none."""
        panel = self.query_one(ParameterPanel)
        if panel.has_class("open") and self._panel_side == 0:
            self._hide_panel()
            return
        self._panel_side = 0 if panel.has_class("open") else 1
        side = self.sides[self._panel_side]
        panel.use(side.session.parameters, side.responder.name, side.responder.unsupported)
        other = "F3: left" if self._panel_side else "F3 closes"
        panel.query_one(".panel-title", Static).update(f"Parameters, {SIDES[self._panel_side]} · {other}")
        await panel.open()

    def _hide_panel(self) -> None:
        self.query_one(ParameterPanel).remove_class("open")
        self.query_one(Composer).focus()

    def on_parameter_panel_close_requested(self) -> None:
        """Treat Esc in the panel like everywhere else."""
        self.action_stop_or_close()

    def on_parameter_changed(self, event: ParameterChanged) -> None:
        event.stop()
        self.query_one(ParameterPanel).apply(event, self.sides[self._panel_side].session.apply_change)
        self._show()

    @work
    async def action_choose_model(self) -> None:
        load = await self._choose_model() if self._choose_model is not None else None
        if load is not None:
            notify(self, "Loading model …")
            self._load(load)

    @work(thread=True, exclusive=True, group="compare-load")
    def _load(self, load: Callable[[], Responder]) -> None:
        try:
            responder = load()
        except LlmEdgeError as error:
            self.app.call_from_thread(notify, self, str(error), "error")
        else:
            self.app.call_from_thread(self.call_later, self._use, responder)

    async def _use(self, responder: Responder) -> None:
        if not self.is_attached:
            responder.close()
            return
        previous = self._comparison.replace(responder)
        if previous is not self._chat_responder:
            previous.close()
        await self._columns()[1].show_answer(self.sides[1])
        if self._panel_side == 1:
            parameters = self.sides[1].session.parameters
            self.query_one(ParameterPanel).use(parameters, responder.name, responder.unsupported)
        self._show()

    def action_one_at_a_time(self) -> None:
        """Toggle whether the right side waits for the left one."""
        self._comparison.in_turn = not self._comparison.in_turn
        how = "one at a time, each with all CPU cores" if self._comparison.in_turn else "at the same time"
        notify(self, f"The models answer {how}.")

    async def on_message_view_action_requested(self, event: MessageView.ActionRequested) -> None:
        event.stop()
        side = next((each for each in self.sides if each.answer is event.view.message), None)
        if event.action == "tokens" and side is not None and side.answer is not None:
            await self.app.push_screen(TokensScreen(side.session, side.answer, can_regenerate=False))

    # ---- keeping answers, closing

    def on_button_pressed(self, event: Button.Pressed) -> None:
        event.stop()
        self.action_keep(int(event.button.id == "keep-1"))

    def action_keep(self, number: int) -> None:
        self._keep(self.sides[number])

    def action_keep_both(self) -> None:
        """Add both answers as versions; the left one is shown."""
        self._keep(self.sides[1], self.sides[0])

    def _keep(self, *sides: ComparisonSide) -> None:
        if self._comparison.busy or any(side.answer is None or not side.answer.content for side in sides):
            notify(self, "There is no complete answer to keep yet.", "warning")
            return
        again = self._question is not None and self._question.content == self._asked
        question = self._question if again else None
        parent = self._history[-1].id if self._history else None
        try:
            for side in sides:
                assert side.answer is not None
                records = side.session.record_of(side.answer)
                question, _ = self._session.add_answer(side.answer, question or self._asked, parent, records)
        except LlmEdgeError as error:
            notify(self, str(error), "error")
        self._close(self._asked)

    def action_stop_or_close(self) -> None:
        """Stop the answers; if there are none, close the panel or the screen."""
        if self._comparison.busy:
            self._comparison.stop()
        elif self.query_one(ParameterPanel).has_class("open"):
            self._hide_panel()
        else:
            self._close(None)

    def action_close(self) -> None:
        self._close(None)

    def _close(self, asked: str | None) -> None:
        comparison, chat_responder = self._comparison, self._chat_responder
        other = self.sides[1].responder

        def close() -> None:  # waits for the step that is being computed
            comparison.close()
            if other is not chat_responder:
                other.close()

        self._dismissed = True  # from here on, only the thread uses the comparison
        comparison.stop()
        threading.Thread(target=close, name="llm-chat-compare", daemon=True).start()
        self.dismiss(asked)

    def on_unmount(self) -> None:
        """Stop the answers when the application ends."""
        if not self._dismissed:
            self._comparison.stop()


def _contrasting(parameters: ChatParameters) -> ChatParameters:
    """Parameters to compare with: the model's defaults or, if these are in use, another preset."""
    kept = {name: value for name, value in parameters.changed.items() if name not in PRESET_PARAMETERS}
    other = ChatParameters(parameters.defaults, kept)
    for preset in _CONTRASTING_PRESETS:
        if other.changed != parameters.changed:
            break
        other.load(parameters.with_preset(preset))
    return other
