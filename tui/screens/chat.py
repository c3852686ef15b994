"""The main screen: the conversation, the composer, the side panels and the status bar."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import Screen
from textual.widgets import Static, TextArea

from llm_edge.chat.choice import Choice, is_of
from llm_edge.chat.history.conversation import ASSISTANT, Message
from llm_edge.chat.presets import Presets
from llm_edge.chat.questions import Questions
from llm_edge.chat.responder import Responder, tokens_of_question
from llm_edge.chat.session import ChatSession
from llm_edge.chat.settings import Settings
from llm_edge.chat.text import printable
from llm_edge.runtime.errors import LlmEdgeError
from llm_edge.tui.export_manager import ExportManager
from llm_edge.tui.model_loader import ModelLoader
from llm_edge.tui.notifications import notify
from llm_edge.tui.screens.compare import CompareScreen
from llm_edge.tui.screens.models import ModelsScreen
from llm_edge.tui.screens.questions import ChosenQuestion, QuestionsScreen
from llm_edge.tui.screens.tokens import TokensScreen
from llm_edge.tui.widgets.composer import Composer
from llm_edge.tui.widgets.conversation_view import ConversationView
from llm_edge.tui.widgets.footer import KeyFooter
from llm_edge.tui.widgets.history_panel import HistoryPanel
from llm_edge.tui.widgets.message_view import MessageView
from llm_edge.tui.widgets.parameter_fields import ParameterChanged
from llm_edge.tui.widgets.parameter_panel import ParameterPanel
from llm_edge.tui.widgets.status_bar import StatusBar


class ChatScreen(Screen[None]):
    """The main screen.

    Args:
        load: returns the first model; called on a worker thread.
        changed: values that replace the first model's defaults, by parameter name.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f1", "app.help", "Help"),
        Binding("f2,ctrl+t", "history", "Chats", key_display="F2"),
        Binding("f3,ctrl+o", "parameters", "Parameters", key_display="F3"),
        Binding("f4,ctrl+l", "models", "Models", key_display="F4"),
        Binding("f5", "questions", "Questions"),
        Binding("f6", "tokens", "Token view", show=False, priority=True),
        Binding("f7", "compare", "Compare", show=False, priority=True),
        Binding("ctrl+n", "new", "New"),
        Binding("ctrl+r", "regenerate", "Regenerate"),
        Binding("ctrl+g", "continue", "Continue"),
        Binding("escape", "stop", "Stop", show=False),
        Binding("shift+tab", "messages", "Messages", show=False, priority=True),
    ]

    def __init__(
        self,
        session: ChatSession,
        settings: Settings,
        exports: ExportManager,
        load: Callable[[], Responder],
        changed: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self._session, self._settings, self._exports = session, settings, exports
        self._load, self._changed = load, dict(changed)
        self.loader = ModelLoader(self, session, settings)
        self.history = HistoryPanel(session)
        self.conversation_view = ConversationView(session)
        self.composer = Composer()
        self.parameter_panel = ParameterPanel(session.parameters, Presets(settings))
        self.status_bar = StatusBar(session, self._idle_state)
        self._title = Static("llm-edge", id="title", markup=False)
        self._pending_question: str | None = None  # asked before the first model was loaded

    def compose(self) -> ComposeResult:
        yield self._title
        with Horizontal(id="middle"):
            yield self.history
            with Vertical(id="chat"):
                yield self.conversation_view
                yield self.composer
            yield self.parameter_panel
        yield self.status_bar
        yield KeyFooter(show_command_palette=True)

    async def on_mount(self) -> None:
        """Show the conversation, and load the first model in the background."""
        self.loader.start(self._load)
        self.composer.focus()
        try:
            self.composer.set_history(self._session.store.questions())
        except LlmEdgeError as error:
            notify(self, str(error), "error")
        await self.show()
        if self._settings.trouble:
            notify(self, self._settings.trouble, "warning")

    async def show(self) -> None:
        """Show the session's conversation."""
        session, responder = self._session, self._session.responder
        await self.conversation_view.show()
        title = session.conversation.title or "New conversation"
        model = f"{responder.name} · {responder.detail}" if responder else "No model"
        self._title.update(printable(f"{title}  —  {model}"))
        self.history.refresh_list()
        self.status_bar.refresh_state()

    def _idle_state(self) -> str:
        """The state to show while there is no answer in progress."""
        if self.loader.loading:
            return "Loading model …"
        if self._exports.running is not None:
            return f"Export: {self._exports.running.progress}"
        return "Ready" if self._session.responder else "No model: press F4"

    # ---- models

    async def on_model_loader_loaded(self, event: ModelLoader.Loaded) -> None:
        self.loader.loading = False
        session, previous = self._session, self._session.responder
        session.set_responder(event.responder)
        changed, self._changed = self._changed, {}
        try:
            for name, value in changed.items():
                session.parameters.set(name, value)
        except LlmEdgeError as error:
            notify(self, str(error), "error")
        if previous is not None and previous is not event.responder:
            previous.close()
        self.parameter_panel.use(session.parameters, event.responder.name)
        await self.show()
        if self._pending_question is not None:
            question, self._pending_question = self._pending_question, None
            await self.ask(question)

    def on_model_loader_failed(self, event: ModelLoader.Failed) -> None:
        """Report the error; without any model, offer others."""
        self.loader.loading = False
        self.status_bar.refresh_state()
        if self._session.responder is None and self.app.screen is self:
            self.action_models(str(event.error))
        else:
            notify(self, str(event.error), "error")

    def action_models(self, reason: str = "") -> None:
        self.app.push_screen(self._models_screen(reason), lambda choice: self.loader.choose(choice) if choice else None)

    def _models_screen(self, reason: str = "") -> ModelsScreen:
        return ModelsScreen(self._settings, self._exports, self._session.responder, reason)

    # ---- questions and answers

    async def on_composer_submitted(self, event: Composer.Submitted) -> None:
        """Ask a question, or replace the one that is edited; an empty text starts a new conversation."""
        if not event.text.strip():
            await self.action_new()
        elif (question := self.composer.editing) is not None:
            text = event.text
            if await self._submit(text, lambda session, tokens: session.edit(question, text, tokens)):
                self.composer.stop_editing()
        elif self._session.responder is None and self.loader.loading:
            self._pending_question = event.text
            notify(self, "The model is still loading. Your question will be asked when it is ready.")
        else:
            await self.ask(event.text)

    async def ask(self, text: str) -> None:
        """Ask a question; if it is refused, it returns to the composer."""
        await self._submit(text, lambda session, tokens: session.ask(text, tokens))

    async def _submit(self, text: str, start: Callable[[ChatSession, int], Message]) -> bool:
        """Start the answer to a question unless it is too long. `start` is given its number of tokens."""
        responder, first = self._session.responder, not self._session.conversation.messages
        tokens = await asyncio.to_thread(tokens_of_question, responder, text, first=first)
        limit = responder.context_length if responder is not None else None
        if limit is not None and tokens >= limit:
            notify(self, f"The question has {tokens:,} tokens, but the context holds {limit:,}. Shorten it.", "warning")
        elif await self._answer(lambda session: start(session, tokens)):
            return True
        self.composer.write(text)
        return False

    async def _answer(self, start: Callable[[ChatSession], Message]) -> bool:
        """Start an answer and show it; returns whether it was started."""
        try:
            start(self._session)
        except LlmEdgeError as error:
            notify(self, str(error), "warning")
            return False
        if self.has_class("narrow"):
            self.history.remove_class("open")
        await self.show()
        self.status_bar.show_state("Reading prompt …")
        self.conversation_view.follow_answer()
        return True

    def on_conversation_view_answer_ended(self, event: ConversationView.AnswerEnded) -> None:
        if "error" in event.message.figures:
            notify(self, str(event.message.figures["error"]), "error")
        self.status_bar.refresh_state()

    @on(TextArea.Changed, "#composer")
    def _count_typed(self) -> None:
        self.status_bar.count_typed(self.composer.text)

    def on_composer_scroll_requested(self, event: Composer.ScrollRequested) -> None:
        view = self.conversation_view
        (view.scroll_page_up if event.pages < 0 else view.scroll_page_down)()

    async def on_composer_undo_requested(self) -> None:
        """Return to the conversation before the new one."""
        try:
            undone = self._session.undo_new()
        except LlmEdgeError as error:
            notify(self, str(error), "error")
            return
        if undone:
            await self.show()
        else:
            notify(self, "Nothing to undo.")

    async def action_new(self) -> None:
        if self._session.conversation.messages:
            self._session.new()
            notify(self, "New conversation. Press Ctrl-Z to return to the previous one.")
        self.composer.stop_editing(keep_text=True)
        await self.show()
        self.composer.focus()

    async def action_regenerate(self) -> None:
        """Answer the last question again."""
        if path := self._session.conversation.path():
            await self._answer(lambda session: session.regenerate(path[-1]))

    async def action_continue(self) -> None:
        if path := self._session.conversation.path():
            await self._answer(lambda session: session.continue_answer(path[-1]))

    def action_stop(self) -> None:
        """Stop the answer; without one, stop editing and focus the composer."""
        if self._session.answering is not None:
            self._session.stop()
        else:
            self.composer.stop_editing()
            self.composer.focus()

    # ---- messages

    def action_messages(self) -> None:
        """Focus the last message; from there, the one before."""
        views = self.conversation_view.views
        if isinstance(self.focused, Composer) and views:
            views[-1].focus()
        else:
            self.focus_previous()

    async def on_message_view_action_requested(self, event: MessageView.ActionRequested) -> None:
        """Quote, edit or regenerate a message, show its tokens or another version of it."""
        view, message, messages = event.view, event.view.message, self._session.conversation.messages
        if event.action == "quote":
            quoted = "\n".join(f"> {line}" for line in message.content.splitlines())
            self.composer.write("\n\n".join(filter(None, [self.composer.text.rstrip(), quoted])) + "\n\n")
        elif event.action == "edit":
            question = message if message.role == "user" else messages.get(message.parent or 0)
            if question is not None:
                self.composer.edit_question(question)
        elif event.action == "regenerate":
            await self._answer(lambda session: session.regenerate(message))
        elif event.action == "tokens":
            self.action_tokens(message)
        elif await self.conversation_view.show_version(view, 1 if event.action == "next" else -1):
            self.history.refresh_list()
            self.status_bar.refresh_state()

    # ---- panels and other screens

    def action_history(self) -> None:
        if self.has_class("narrow"):
            self.parameter_panel.remove_class("open")
        self.history.toggle()

    async def on_history_panel_conversation_changed(self, event: HistoryPanel.ConversationChanged) -> None:
        if event.opened:
            self.composer.stop_editing(keep_text=True)
        await self.show()
        self.parameter_panel.show()

    def on_history_panel_closed(self) -> None:
        self.composer.focus()

    async def action_parameters(self) -> None:
        if self.parameter_panel.has_class("open"):
            self.on_parameter_panel_close_requested()
            return
        if self.has_class("narrow"):
            self.history.remove_class("open")
        await self.parameter_panel.open()

    def on_parameter_panel_close_requested(self) -> None:
        self.parameter_panel.remove_class("open")
        self.composer.focus()

    def on_parameter_changed(self, event: ParameterChanged) -> None:
        self.parameter_panel.apply(event, self._session.apply_change)

    def action_questions(self) -> None:

        def chosen(choice: ChosenQuestion | None) -> None:
            if choice is None:
                return
            if choice.ask_now and self.composer.editing is None:
                self.composer.post_message(Composer.Submitted(choice.text))
            else:
                self.composer.write("\n\n".join(filter(None, [self.composer.text.rstrip(), choice.text])))

        self.app.push_screen(QuestionsScreen(Questions(self._settings)), chosen)

    def action_tokens(self, message: Message | None = None) -> None:
        """Show the tokens of an answer: the given one, the focused one, or the last one."""
        if message is None and isinstance(self.focused, MessageView):
            message = self.focused.message
        if message is None or message.role != ASSISTANT:
            answers = [each for each in self._session.conversation.path() if each.role == ASSISTANT]
            if not answers:
                notify(self, "There is no answer yet.")
                return
            message = answers[-1]
        answer = message

        async def closed(regenerate: bool | None) -> None:
            self.parameter_panel.show()
            if regenerate:
                await self._answer(lambda session: session.regenerate(answer))

        self.app.push_screen(TokensScreen(self._session, answer), closed)

    def action_compare(self) -> None:
        """Compare two answers to the composer's text or, if it is empty, to the last question."""
        session, text = self._session, self.composer.text.strip()
        if session.responder is None:
            notify(self, "No model is loaded yet.")
            return
        if session.answering is not None:
            notify(self, "Still answering. Press Esc to stop.", "warning")
            return
        path = session.conversation.path()
        last = None if text else next((each for each in reversed(path) if each.role == "user"), None)

        async def closed(asked: str | None) -> None:
            if last is None and asked is not None and self.composer.text.strip() == asked.strip():
                self.composer.load_text("")
            await self.show()

        screen = CompareScreen(session, Presets(self._settings), text, last, self._choose_model)
        self.app.push_screen(screen, closed)

    async def _choose_model(self) -> Callable[[], Responder] | None:
        """Let the user choose a model; returns a function that opens it on a worker thread."""
        choice: Choice | None = await self.app.push_screen_wait(self._models_screen())
        responder = self._session.responder
        if choice is None:
            return None
        if responder is not None and is_of(choice, responder):
            return lambda: responder  # already loaded
        return self.loader.opener(choice)
