"""The terminal chat: what is on the screen, and which key does what. What is done stands in `session.py`."""

from __future__ import annotations

import asyncio
import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from textual import on, work
from textual.app import App, ComposeResult, SystemCommand
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import Screen
from textual.timer import Timer
from textual.widgets import Footer, Static, TextArea
from textual.worker import get_current_worker

from llm_edge.chat.history.conversation import Message
from llm_edge.chat.history.store import Store
from llm_edge.chat.parameters import ChatParameters
from llm_edge.chat.presets import Presets
from llm_edge.chat.responder import Responder, tokens_of_question
from llm_edge.chat.session import ChatSession
from llm_edge.chat.settings import Settings
from llm_edge.chat.text import printable
from llm_edge.runtime.errors import LlmEdgeError
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.tui import clipboard, message_actions
from llm_edge.tui.background_export import Exports
from llm_edge.tui.commands import commands
from llm_edge.tui.refresh import FASTEST, RefreshThrottle
from llm_edge.tui.screens.compare import show_compare
from llm_edge.tui.screens.help import show_help
from llm_edge.tui.screens.models import export_ended, show_models
from llm_edge.tui.screens.questions import show_questions
from llm_edge.tui.screens.tokens import show_tokens
from llm_edge.tui.themes import begin_theme
from llm_edge.tui.widgets.chat_view import ChatView
from llm_edge.tui.widgets.composer import Composer
from llm_edge.tui.widgets.history_panel import HistoryPanel
from llm_edge.tui.widgets.message_view import MessageView
from llm_edge.tui.widgets.parameter_panel import ParameterChanged, ParameterPanel, apply_change
from llm_edge.tui.widgets.status_bar import Instruments

_SAMPLES = 0.5  # seconds between two points of the speed's picture
_PATIENCE = 0.3  # seconds without a key before what is written is counted
_NARROW = 110  # columns below which panels lie over the conversation


class ChatApp(App[None]):
    """See the module.

    Args:
        store: of conversations.
        load: gives who answers; called on a thread, for it may take its time.
        settings: of the person; None = those in the usual place.
        changed: what is not the first model's own of the parameters; see `ChatParameters`.

    Attributes:
        session: the chat.
        exports: the one that makes a bundle, also in the background.
        loading: whether somebody to answer is being loaded.
        editing: the message that the composer's text will take the place of.
        history, chat, composer, controls, instruments: the parts of the screen.
        sampling: draws the speed's picture, once there is a screen.
    """

    TITLE = "llm-edge"
    CSS_PATH = "app.tcss"
    HORIZONTAL_BREAKPOINTS = [(0, "narrow"), (_NARROW, "wide")]  # noqa: RUF012 (Textual's)
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f1", "help", "Help"),
        Binding("f2,ctrl+t", "history", "Chats", key_display="F2"),
        Binding("f3,ctrl+o", "controls", "Parameters", key_display="F3"),
        Binding("f4,ctrl+l", "models", "Models", key_display="F4"),
        Binding("f5", "questions", "Questions"),
        Binding("f6", "tokens", "Token view", show=False, priority=True),
        Binding("f7", "compare", "Compare", show=False, priority=True),
        Binding("ctrl+n", "new", "New"),
        Binding("ctrl+r", "regenerate", "Again"),
        Binding("ctrl+g", "go_on", "Go on"),
        Binding("escape", "stop", "Stop", show=False),
        Binding("ctrl+c", "copy_or_stop", "Copy, or stop", show=False, priority=True),
        Binding("shift+tab", "messages", "To the messages", show=False, priority=True),
    ]

    def __init__(
        self,
        store: Store,
        load: Callable[[], Responder],
        settings: Settings | None = None,
        changed: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings or Settings()
        self.session = ChatSession(store, ChatParameters(SamplingParams()))
        self.exports = Exports(self, self.settings, functools.partial(export_ended, self))
        self.editing: Message | None = None
        self.history = HistoryPanel(self.session)
        self.chat = ChatView()
        self.composer = Composer()
        self.controls = ParameterPanel(self.session.parameters, Presets(self.settings))
        self.instruments = Instruments()
        self._heading = Static("llm-edge", id="title", markup=False)
        self._load = load
        self._changed = dict(changed or {})
        self.loading = True
        self._draft = ""  # what was being written when a message was taken up to be edited
        self._waiting: str | None = None  # a question from before there was somebody to answer it
        self._ticks: Timer | None = None
        self.sampling: Timer | None = None
        self._pace = RefreshThrottle()
        self._written = 0  # tokens of what stands in the composer

    # ---- the screen

    def compose(self) -> ComposeResult:
        """Title, conversation and panels, composer, instruments."""
        yield self._heading
        with Horizontal(id="middle"):
            yield self.history
            with Vertical(id="talk"):
                yield self.chat
                yield self.composer
            yield self.controls
        yield self.instruments
        yield Footer(compact=True)

    async def on_mount(self) -> None:
        """Show what there is, and load the model beside."""
        begin_theme(self, self.settings, self.chat.use_code_theme, functools.partial(self.say, severity="warning"))
        self.composer.focus()
        try:
            self.composer.remember(self.session.store.questions())
        except LlmEdgeError as error:
            self.say(str(error), "error")
        await self.show()
        if self.settings.trouble:
            self.say(self.settings.trouble, "warning")
        self.load_responder(self._load)
        self._ticks = self.set_interval(FASTEST, self._look, pause=True)
        self.sampling = self.set_interval(_SAMPLES, self._sample)

    @property
    def home(self) -> Screen[Any]:
        """The screen with the conversation, also while another one lies over it."""
        return self.screen_stack[0]

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Keys of the conversation do nothing while another screen lies over it."""
        ours = f"action_{action}" in type(self).__dict__ and action not in ("help", "copy_or_stop")
        return False if ours and len(self.screen_stack) > 1 else super().check_action(action, parameters)

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        """What the palette offers."""
        return commands(self, screen)

    def get_key_display(self, binding: Binding) -> str:
        """Function keys as they stand on the keyboard."""
        shown = super().get_key_display(binding)
        return shown.upper() if shown[0] == "f" and shown[1:].isdigit() else shown

    async def show(self) -> None:
        """All of the conversation, as it is now."""
        session = self.session
        await self.chat.show(session.conversation)
        title = session.conversation.title or "New conversation"
        who = f"{session.responder.name} · {session.responder.detail}" if session.responder else "no model"
        self._heading.update(printable(f"{title}  —  {who}"))
        for view in self.chat.views:
            view.set_live(view.message is session.answering)
        self.history.refresh_list()
        self._show_state()

    def _show_state(self) -> None:
        instruments, responder = self.instruments, self.session.responder
        instruments.context(self.session.used(), self._written, responder.context_length if responder else None)
        if self.session.answering is None:
            at_work = self.exports.at_work
            state = "loading the model …" if self.loading else "ready" if responder else "no model: F4"
            instruments.say(f"export: {at_work.doing}" if at_work is not None and not self.loading else state)

    def say(self, text: str, severity: str = "information") -> None:
        """Say something in a corner of the screen."""
        self.notify(printable(text), severity=severity, markup=False)  # type: ignore[arg-type]

    def copy_to_clipboard(self, text: str) -> None:
        """Hand a text to the terminal, and to tmux, which by itself takes none from programs."""
        super().copy_to_clipboard(text)
        if not self.is_web:
            self.run_worker(functools.partial(clipboard.to_tmux, text), thread=True, group="clipboard")

    # ---- who answers

    @work(thread=True, exclusive=True, group="load")
    def load_responder(self, load: Callable[[], Responder]) -> None:
        """Let somebody else answer, once they are there; until then it is who it was."""
        self.loading, worker = True, get_current_worker()
        try:
            responder = load()
        except LlmEdgeError as error:
            if not worker.is_cancelled:
                self.call_from_thread(self._failed_to_load, error)
            return
        if worker.is_cancelled:  # somebody else was chosen meanwhile
            responder.close()
        else:
            self.call_from_thread(self.call_later, self._loaded, responder)

    def _failed_to_load(self, error: LlmEdgeError) -> None:
        self.loading = False
        self._show_state()
        if self.session.responder is None and len(self.screen_stack) == 1:
            show_models(self, str(error))
        else:
            self.say(str(error), "error")

    async def _loaded(self, responder: Responder) -> None:
        self.loading = False
        before = self.session.responder
        self.session.set_responder(responder)
        changed, self._changed = self._changed, {}
        try:
            for name, value in changed.items():
                self.session.parameters.set(name, value)
        except LlmEdgeError as error:
            self.say(str(error), "error")
        if before is not None and before is not responder:
            before.close()
        self.controls.use(self.session.parameters, responder.name)
        await self.show()
        if self._waiting is not None:
            question, self._waiting = self._waiting, None
            await self.ask(question)

    # ---- an answer that grows

    def _look(self) -> None:
        """Show what has come of an answer; looks more rarely where the screen takes long, here and in drawing it."""
        if not self._pace.due or not self.chat.is_attached or (news := self.session.poll()) is None:
            return
        self._pace.look()
        view = self.chat.view(news.message)
        if view is not None:
            view.live = not news.ended
            view.changed()
        if news.ended:
            self._ended(news.message)
            self._show_state()

    def _ended(self, message: Message) -> None:
        if self._ticks is not None:
            self._ticks.pause()
        if "error" in message.figures:
            self.say(str(message.figures["error"]), "error")

    def _sample(self) -> None:
        rate = self.session.sample_rate()
        if not self.instruments.is_attached:
            return
        self.instruments.speed(list(self.session.rates))
        self._show_state()
        if self.session.answering is not None and rate:
            self.instruments.say(f"{rate:.0f} tok/s · Esc stops")

    async def answering(self, begin: Callable[[ChatSession], Message]) -> bool:
        """Begin an answer and show it; False where that was refused, which is told."""
        try:
            begin(self.session)
        except LlmEdgeError as error:
            self.say(str(error), "warning")
            return False
        if self.home.has_class("narrow"):
            self.history.remove_class("open")
        await self.show()
        self.instruments.say("reading the prompt …")
        self._pace = RefreshThrottle()
        if self._ticks is not None:
            self._ticks.resume()
        return True

    # ---- what a person does

    async def on_composer_sent(self, event: Composer.Sent) -> None:
        """A question, or another wording of one; nothing is a new conversation."""
        self._written = 0
        if not event.text.strip():
            await self.action_new()
        elif self.editing is not None:
            message, text = self.editing, event.text
            if await self._begin(text, lambda session, tokens: session.edit(message, text, tokens)):
                self.edit(None)
                self.composer.write(self._draft)
        elif self.session.responder is None and self.loading:
            self._waiting = event.text
            self.say("The model is still loading; this is asked as soon as it is there.")
        else:
            await self.ask(event.text)

    async def ask(self, text: str) -> None:
        """Ask; a question that is refused returns to where it was written."""
        await self._begin(text, lambda session, tokens: session.ask(text, tokens))

    async def _begin(self, text: str, begin: Callable[[ChatSession, int], Message]) -> bool:
        """Begin the answer to a question, which is told its tokens; False where that was refused."""
        responder, first = self.session.responder, not self.session.conversation.messages
        tokens = await asyncio.to_thread(tokens_of_question, responder, text, first=first)
        if responder is not None and responder.context_length is not None and tokens >= responder.context_length:
            limit = f"{tokens:,} tokens, and the model's context holds {responder.context_length:,}"
            self.say(f"The question has {limit}: shorten it.", "warning")
        elif await self.answering(lambda session: begin(session, tokens)):
            return True
        self.composer.write(text)
        return False

    def edit(self, message: Message | None) -> None:
        """Let the composer's text take the place of a message, or (None) be a question of its own again."""
        composer = self.composer
        if self.editing is None:
            self._draft = composer.text
        self.editing = message
        composer.border_title = "another wording · Esc leaves it as it was" if message is not None else ""
        if message is not None:
            composer.write(message.content)

    @on(TextArea.Changed, "#composer")
    @work(exclusive=True, group="count")
    async def _count_written(self) -> None:
        """How much of the context a question will take, once nobody has typed for a moment."""
        await asyncio.sleep(_PATIENCE)
        first = not self.session.conversation.messages
        count = functools.partial(tokens_of_question, self.session.responder, self.composer.text, first=first)
        self._written = await asyncio.to_thread(count)
        if self.instruments.is_attached:
            self._show_state()

    def on_composer_scrolled(self, event: Composer.Scrolled) -> None:
        """By pages."""
        (self.chat.scroll_page_up if event.pages < 0 else self.chat.scroll_page_down)()

    async def on_composer_undo(self) -> None:
        """There is nothing written to undo: the new conversation, then."""
        try:
            undone = self.session.undo_new()
        except LlmEdgeError as error:
            self.say(str(error), "error")
            return
        if undone:
            await self.show()
        else:
            self.say("There is nothing to undo.")

    async def on_message_view_asked(self, event: MessageView.Asked) -> None:
        """Something is to be done with a message."""
        await message_actions.do(self, event.view, event.what)

    async def action_new(self) -> None:
        """A new conversation."""
        if self.session.conversation.messages:
            self.session.new()
            self.say("A new conversation. Ctrl-Z returns to the one before.")
        self.edit(None)
        await self.show()
        self.composer.focus()

    async def action_regenerate(self) -> None:
        """Another answer to the last question."""
        if path := self.session.conversation.path():
            await self.answering(lambda session: session.regenerate(path[-1]))

    async def action_go_on(self) -> None:
        """More of the last answer."""
        if path := self.session.conversation.path():
            await self.answering(lambda session: session.continue_answer(path[-1]))

    def action_stop(self) -> None:
        """Stop the answer; with none on its way, write the next question."""
        if self.session.answering is not None:
            self.session.stop()
            return
        if self.editing is not None:
            self.edit(None)
            self.composer.write(self._draft)
        self.composer.focus()

    def action_copy_or_stop(self) -> None:
        """Copy what is marked, as terminals do; with nothing marked, stop the answer."""
        if marked := message_actions.marked(self.screen):
            self.copy_to_clipboard(marked)
        elif self.session.answering is not None:
            self.session.stop()
        else:
            self.say("Ctrl-Q leaves.")

    def action_messages(self) -> None:
        """To the last message, from where one is writing; else to what comes before."""
        views = self.chat.views
        if isinstance(self.screen.focused, Composer) and views:
            views[-1].focus()
        else:
            self.screen.focus_previous()

    def action_help(self) -> None:
        """Show all keys."""
        show_help(self)

    def action_history(self) -> None:
        """Show the conversations that are kept, or hide them."""
        if self.home.has_class("narrow"):
            self.controls.remove_class("open")
        self.history.toggle()

    async def on_history_panel_moved(self, event: HistoryPanel.Moved) -> None:
        """Another conversation, or another title of this one."""
        if event.opened:
            self.edit(None)
        await self.show()
        self.controls.show()

    def on_history_panel_closed(self) -> None:
        """On with what was being written."""
        self.composer.focus()

    def action_controls(self) -> None:
        """Show the parameters, or hide them."""
        controls = self.controls
        controls.toggle_class("open")
        if controls.has_class("open"):
            if self.home.has_class("narrow"):
                self.history.remove_class("open")
            self.home.query_one("#value-temperature").focus()
        else:
            self.composer.focus()

    def action_models(self) -> None:
        """Choose who answers."""
        show_models(self)

    def action_questions(self) -> None:
        """Offer questions that are ready-made."""
        show_questions(self)

    def action_tokens(self) -> None:
        """Show how probable the tokens of an answer were."""
        if self.screen is self.home:
            show_tokens(self)

    def action_compare(self) -> None:
        """Ask one question twice: two models, or one with two settings."""
        if self.screen is self.home:
            show_compare(self)

    def on_turned(self, event: ParameterChanged) -> None:
        """A parameter was turned."""
        apply_change(event, self.controls, self.session.apply_change)

    def on_unmount(self) -> None:
        """Keep what came of an answer; end an export."""
        self.exports.close()
        self.session.close()
