"""The main screen: the conversation, the composer, the side panels and the status bar."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from textual.binding import Binding, BindingType

from llm_edge.chat.attachments import split_attachments
from llm_edge.chat.choice import Choice, is_of
from llm_edge.chat.history.conversation import ASSISTANT, Message
from llm_edge.chat.presets import Presets
from llm_edge.chat.questions import Questions
from llm_edge.chat.responder import Responder
from llm_edge.runtime.errors import LlmEdgeError
from llm_edge.tui.notifications import notify
from llm_edge.tui.screens.asking import AskingScreen
from llm_edge.tui.screens.compare import CompareScreen
from llm_edge.tui.screens.questions import ChosenQuestion, QuestionsScreen
from llm_edge.tui.screens.tokens import ALTERNATIVES, TokensScreen
from llm_edge.tui.widgets.composer import Composer
from llm_edge.tui.widgets.history_panel import HistoryPanel
from llm_edge.tui.widgets.message_view import MessageView
from llm_edge.tui.widgets.parameter_fields import ParameterChanged


class ChatScreen(AskingScreen):
    """The main screen, with what its keys do besides asking; see `AskingScreen` for the arguments."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f1", "app.help", "Help"),
        Binding("f2,ctrl+t", "history", "Chats", key_display="F2"),
        Binding("f3,ctrl+o", "parameters", "Parameters", key_display="F3"),
        Binding("f4,ctrl+l", "models", "Models", key_display="F4"),
        Binding("f5", "questions", "Questions"),
        Binding("f6", "tokens", "Token view", show=False, priority=True),
        Binding("f7", "compare", "Compare", show=False, priority=True),
        Binding("f9", "edit", "Editor", show=False),
        Binding("ctrl+n", "new", "New"),
        Binding("ctrl+r", "regenerate", "Regenerate"),
        Binding("ctrl+g", "continue", "Continue"),
        Binding("escape", "stop", "Stop", show=False),
        Binding("shift+tab", "messages", "Messages", show=False, priority=True),
    ]

    def on_composer_scroll_requested(self, event: Composer.ScrollRequested) -> None:
        view = self.conversation_view
        (view.scroll_page_up if event.pages < 0 else view.scroll_page_down)()

    async def on_composer_undo_requested(self) -> None:
        """Return to the conversation before the new one."""
        if self.session.answering is not None:
            notify(self, "Still answering. Press Esc to stop.", "warning")
            return
        try:
            undone = self.session.undo_new()
        except LlmEdgeError as error:
            notify(self, str(error), "error")
            return
        if undone:
            await self.show()
            self.parameter_panel.show()
        else:
            notify(self, "Nothing to undo.")

    # ---- stopping

    def action_stop(self) -> None:
        """Stop the answer; without one, remove attached files, stop editing and focus the composer."""
        if self.session.answering is not None:
            self.session.stop()
        else:
            self.pending.take_attachments()
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
        view, message, messages = event.view, event.view.message, self.session.conversation.messages
        if event.action == "quote":
            quoted = "\n".join(f"> {line}" for line in message.content.splitlines())
            self.composer.write("\n\n".join(filter(None, [self.composer.text.rstrip(), quoted])) + "\n\n")
        elif event.action == "edit":
            question = message if message.role == "user" else messages.get(message.parent or 0)
            if question is not None:
                attachments, text = split_attachments(question.content)
                self.composer.edit_question(question, text)
                self.pending.attach(*attachments)
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
            self._return_questions()
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
        self.parameter_panel.apply(event, self.session.apply_change)

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
            answers = [each for each in self.session.conversation.path() if each.role == ASSISTANT]
            if not answers:
                notify(self, "There is no answer yet.")
                return
            message = answers[-1]
        answer = message

        async def closed(regenerate: bool | None) -> None:
            self.parameter_panel.show()
            if regenerate:
                await self._regenerate_recorded(answer)

        self.app.push_screen(TokensScreen(self.session, answer), closed)

    async def _regenerate_recorded(self, answer: Message) -> None:
        """Regenerate an answer with its tokens recorded, which later ones are not, and show them as they come."""
        parameters = self.session.parameters
        before = parameters.value("logprobs")
        parameters.set("logprobs", before or ALTERNATIVES)
        started = await self._answer(lambda session: session.regenerate(answer))
        parameters.set("logprobs", before)
        path = self.session.conversation.path()
        if started and path:
            self.app.push_screen(TokensScreen(self.session, path[-1], recording=True))

    def action_compare(self) -> None:
        """Compare two answers to the composer's text or, if it is empty, to the last question."""
        session, text = self.session, self.composer.text.strip()
        if session.responder is None:
            notify(self, "No model is loaded yet.")
            return
        if session.answering is not None:
            notify(self, "Still answering. Press Esc to stop.", "warning")
            return
        session.close()  # the model may be writing a title
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
        responder = self.session.responder
        if choice is None:
            return None
        if responder is not None and is_of(choice, responder):
            return lambda: responder  # already loaded
        return self.loader.opener(choice)
