"""One question, two answers beside each other: of two models, or of one with two settings."""

from __future__ import annotations

import threading
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal
from textual.screen import ModalScreen
from textual.widgets import Button, Footer, Static

from llm_edge.chat.choice import is_of
from llm_edge.chat.comparison import Comparison, ComparisonSide
from llm_edge.chat.history.conversation import Message
from llm_edge.chat.parameters import ChatParameters
from llm_edge.chat.presets import Presets
from llm_edge.chat.responder import Responder
from llm_edge.chat.text import printable
from llm_edge.runtime.errors import LlmEdgeError
from llm_edge.runtime.sampling.presets import PRESET_PARAMETERS
from llm_edge.tui.screens.models import ModelsScreen, loading
from llm_edge.tui.screens.tokens import TokensScreen
from llm_edge.tui.widgets.compare_column import NAMES, Column
from llm_edge.tui.widgets.composer import Composer
from llm_edge.tui.widgets.message_view import MessageView
from llm_edge.tui.widgets.parameter_panel import ParameterChanged, ParameterPanel, apply_change

if TYPE_CHECKING:
    from llm_edge.tui.app import ChatApp

Loader = Callable[[], Responder]
"""Gives who answers; takes its time."""

_LOOK = 1 / 12  # seconds between two looks at what grows
_TO_COMPARE = ("greedy", "balanced")  # presets; one of them differs from whatever a model's own way is


@dataclass(frozen=True, slots=True)
class Kept:
    """Answers that are to join the conversation, behind a question; the last one is that which shows."""

    question: str
    sides: tuple[ComparisonSide, ...]


class CompareScreen(ModalScreen[Kept | None]):
    """See the module; dismissed with what is to be kept.

    Args:
        responder: of the chat, and
        parameters: its parameters: the left side begins with them.
        history: of the conversation.
        presets: see `ParameterPanel`.
        question: what stands there to be asked.
        choose: asks for another model for the right side; None = there are none to choose.
    """

    DEFAULT_CSS = """
    CompareScreen { layout: vertical; background: $background; }
    CompareScreen #compare-title { height: 1; padding: 0 1; background: $panel; text-style: bold; }
    CompareScreen #compare { height: 1fr; layers: below above; }
    CompareScreen .side { width: 1fr; height: 1fr; padding: 0 1; }
    CompareScreen #right { border-left: solid $panel-lighten-2; }
    CompareScreen .side-who { height: 1; text-style: bold; text-wrap: nowrap; text-overflow: ellipsis; }
    CompareScreen .side-how { height: auto; max-height: 2; color: $text-muted; }
    CompareScreen .side-answer { height: 1fr; margin: 1 0; scrollbar-size-vertical: 1; }
    CompareScreen .side-buttons { height: 1; }
    CompareScreen .side-buttons Button { width: auto; min-width: 8; margin: 0 2 0 0; }
    CompareScreen .side-state { width: 1fr; color: $text-muted; text-wrap: nowrap; text-overflow: ellipsis; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f2", "controls(0)", "Left parameters"),
        Binding("f3", "controls(1)", "Right parameters"),
        Binding("f4,ctrl+l", "model", "Right model", key_display="F4"),
        Binding("1", "keep(0)", "Keep left", show=False),
        Binding("2", "keep(1)", "Keep right", show=False),
        Binding("3", "keep_both", "Keep both", show=False),
        Binding("f8", "in_turn", "One by one"),
        Binding("escape", "leave", "Stop, close", key_display="esc"),
        Binding("f7", "close", "Close", show=False, priority=True),
        Binding("f1", "app.help", "Help", show=False),
        Binding("ctrl+c", "app.copy_or_stop", "Copy", show=False, priority=True),
        Binding("ctrl+q", "app.quit", "Quit", show=False, priority=True),
    ]

    def __init__(
        self,
        responder: Responder,
        parameters: ChatParameters,
        history: Sequence[Message] = (),
        presets: Presets | None = None,
        question: str = "",
        choose: Callable[[], Awaitable[Loader | None]] | None = None,
    ) -> None:
        super().__init__()
        left = ChatParameters(responder.default_params, parameters.changed)
        right = _other_settings(left)
        self._chat = responder
        self._presets, self._question, self._choose = presets, question, choose
        self._comparison = Comparison(ComparisonSide(responder, left), ComparisonSide(responder, right), history)
        self._asked = ""
        self._turning = 1
        self._given_up = False

    @property
    def sides(self) -> list[ComparisonSide]:
        """Both."""
        return self._comparison.sides

    def compose(self) -> ComposeResult:
        """The two beside each other, and the question below."""
        yield Static("Compare: one question, two answers", id="compare-title", markup=False)
        with Horizontal(id="compare"):
            yield Column(0)
            yield Column(1)
            yield ParameterPanel(self.sides[1].session.parameters, self._presets, self.sides[1].responder.name)
        yield Composer()
        yield Footer(compact=True, show_command_palette=False)

    def on_mount(self) -> None:
        """Begin with the question."""
        composer = self.query_one(Composer)
        composer.placeholder = "A question for both. ⏎ asks"
        composer.write(self._question)
        self._show()
        self.set_interval(_LOOK, self._look)
        self.set_interval(0.5, self._sample)

    def _columns(self) -> list[Column]:
        return [self.query_one(f"#{name}", Column) for name in NAMES]

    def _show(self) -> None:
        for column, side in zip(self._columns(), self.sides, strict=True):
            column.show(side)
            column.state(side)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:  # noqa: ARG002 (Textual's)
        """Another model only where there is a choice."""
        return action != "model" or self._choose is not None

    # ---- asking

    async def on_composer_sent(self, event: Composer.Sent) -> None:
        """Ask both."""
        event.stop()
        text = event.text
        if not text.strip():
            return
        try:
            self._comparison.ask(text)
        except LlmEdgeError as error:
            self._say(str(error))
            self.query_one(Composer).write(text)
            return
        self._asked = text
        for column, side in zip(self._columns(), self.sides, strict=True):
            await column.begin(side)

    def on_composer_undo(self, event: Composer.Undo) -> None:
        """Nothing here is undone."""
        event.stop()

    async def _look(self) -> None:
        if self._given_up or not self._comparison.busy or len(self.query(Column)) < len(NAMES):
            return
        before = [side.answer for side in self.sides]
        news = self._comparison.poll()
        for number, (column, side) in enumerate(zip(self._columns(), self.sides, strict=True)):
            if side.answer is not before[number]:
                await column.begin(side)
            if news[number] is not None:
                column.look(side)
            else:
                column.state(side)
        composer = self.query_one(Composer)
        if not self._comparison.busy and self.focused is composer and not composer.text:
            self.query_one("#keep-0", Button).focus()

    def _sample(self) -> None:
        for side in self.sides:
            if side.session.answering is not None:
                side.session.sample_rate()

    # ---- the sides

    def action_controls(self, number: int) -> None:
        """Show the parameters of a side, or hide them."""
        controls, side = self.query_one(ParameterPanel), self.sides[number]
        if controls.has_class("open") and self._turning == number:
            controls.remove_class("open")
            self.query_one(Composer).focus()
            return
        self._turning = number
        controls.use(side.session.parameters, side.responder.name)
        controls.query_one(".panel-title", Static).update(f"Parameters, {NAMES[number]}")
        controls.add_class("open")
        self.query_one("#value-temperature").focus()

    def on_turned(self, event: ParameterChanged) -> None:
        """A parameter of a side was turned."""
        event.stop()
        apply_change(event, self.query_one(ParameterPanel), self.sides[self._turning].session.apply_change)
        self._show()

    @work
    async def action_model(self) -> None:
        """Let somebody else answer on the right."""
        loader = await self._choose() if self._choose is not None else None
        if loader is not None:
            self._say("loading the model …", "information")
            self._load(loader)

    @work(thread=True, exclusive=True, group="compare-load")
    def _load(self, loader: Loader) -> None:
        try:
            responder = loader()
        except LlmEdgeError as error:
            self.app.call_from_thread(self._say, str(error), "error")
        else:
            self.app.call_from_thread(self.call_later, self._use, responder)

    async def _use(self, responder: Responder) -> None:
        if not self.is_attached:
            responder.close()
            return
        before = self._comparison.replace(responder)
        if before is not self._chat:
            before.close()
        await self._columns()[1].begin(self.sides[1])
        controls, side = self.query_one(ParameterPanel), self.sides[1]
        if self._turning == 1:
            controls.use(side.session.parameters, responder.name)
        self._show()

    def action_in_turn(self) -> None:
        """Whether the right side begins when the left one has ended."""
        self._comparison.in_turn = not self._comparison.in_turn
        how = "one after the other, each with the whole machine" if self._comparison.in_turn else "both at once"
        self._say(f"They answer {how}.", "information")

    async def on_message_view_asked(self, event: MessageView.Asked) -> None:
        """Copying is done by the chat; tokens show here; the rest is for kept answers."""
        if event.what in ("copy", "copy_code"):
            return
        event.stop()
        side = next((each for each in self.sides if each.answer is event.view.message), None)
        if event.what == "tokens" and side is not None and side.answer is not None:
            session = side.session
            records = session.record_of(side.answer)
            why_not = "" if records else "There is no record: turn 'Token view' on (F2, F3) and ask again."
            await self.app.push_screen(
                TokensScreen(side.answer, records, session.parameters, session.apply_change, why_not)
            )

    # ---- leaving

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Keep one."""
        event.stop()
        self.action_keep(int(event.button.id == "keep-1"))

    def action_keep(self, number: int) -> None:
        """Take an answer into the conversation."""
        self._keep(self.sides[number])

    def action_keep_both(self) -> None:
        """Take both, as versions; the left one shows."""
        self._keep(self.sides[1], self.sides[0])

    def _keep(self, *sides: ComparisonSide) -> None:
        if self._comparison.busy or any(side.answer is None or not side.answer.content for side in sides):
            self._say("There is nothing to keep yet.")
        else:
            self._close(Kept(self._asked, sides))

    def action_leave(self) -> None:
        """Stop; with nothing on its way, return to the chat."""
        if self._comparison.busy:
            self._comparison.stop()
        elif self.query_one(ParameterPanel).has_class("open"):
            self.action_controls(self._turning)
        else:
            self._close(None)

    def action_close(self) -> None:
        """Return to the chat."""
        self._close(None)

    def _close(self, kept: Kept | None) -> None:
        comparison, chat = self._comparison, self._chat
        other = self.sides[1].responder

        def close() -> None:  # a step that is being computed ends first
            comparison.close()
            if other is not chat:
                other.close()

        self._given_up = True  # from here on the thread looks after them
        comparison.stop()
        threading.Thread(target=close, name="llm-chat-compared", daemon=True).start()
        self.dismiss(kept)

    def on_unmount(self) -> None:
        """The application ends."""
        if not self._given_up:
            self._comparison.stop()

    def _say(self, text: str, severity: str = "warning") -> None:
        self.notify(printable(text), severity=severity, markup=False)  # type: ignore[arg-type]


def _other_settings(parameters: ChatParameters) -> ChatParameters:
    """Something to compare with: the model's own way to draw, or where that is what it is, another one."""
    kept = {name: value for name, value in parameters.changed.items() if name not in PRESET_PARAMETERS}
    other = ChatParameters(parameters.defaults, kept)
    for preset in _TO_COMPARE:
        if other.changed != parameters.changed:
            break
        other.load(parameters.with_preset(preset))
    return other


def show_compare(app: ChatApp) -> None:
    """Open the comparison over the chat, and keep what was chosen there.

    What stands in the composer is asked, or else the last question once more.
    """

    async def choose() -> Loader | None:
        chat = app.session.responder
        choice = await app.push_screen_wait(ModelsScreen(app.settings, chat))
        if choice is None:
            return None
        if chat is not None and is_of(choice, chat):
            return lambda: chat  # once is enough
        return loading(app, choice)

    session, composer = app.session, app.composer
    if session.responder is None:
        app.say("The model is not there yet.")
        return
    if session.answering is not None:
        app.say("An answer is on its way: stop it first (Esc).", "warning")
        return
    path, again = session.conversation.path(), None
    question = composer.text.strip()
    if not question:
        again = next((each for each in reversed(path) if each.role == "user"), None)
        question = again.content if again is not None else ""
    history = path[: path.index(again)] if again is not None else path

    async def done(kept: Kept | None) -> None:
        if kept is None:
            return
        asked = again if again is not None and again.content == kept.question else None
        if asked is None and again is None and composer.text.strip() == kept.question.strip():
            composer.load_text("")
        try:
            for side in kept.sides:
                assert side.answer is not None
                behind = history[-1].id if history else None
                records = side.session.record_of(side.answer)
                asked, _ = session.add_answer(side.answer, asked or kept.question, behind, records)
        except LlmEdgeError as error:
            app.say(str(error), "error")
        await app.show()

    screen = CompareScreen(session.responder, session.parameters, history, Presets(app.settings), question, choose)
    app.push_screen(screen, done)
