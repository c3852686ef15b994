"""`AskingScreen`: the part of the main screen that loads models, asks questions and executes slash commands."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from typing import Any

from textual import on, work
from textual.app import ComposeResult, SuspendNotSupported
from textual.containers import Horizontal, Vertical
from textual.screen import Screen
from textual.widgets import Static, TextArea

from llm_edge.chat.attachments import attach_mentioned, read_attachment, split_attachments, with_attachments
from llm_edge.chat.choice import find_choice
from llm_edge.chat.commands import is_command, run_command
from llm_edge.chat.editor import edit_text
from llm_edge.chat.history.conversation import Message
from llm_edge.chat.presets import Presets
from llm_edge.chat.responder import Responder, tokens_of_question
from llm_edge.chat.session import ChatSession
from llm_edge.chat.settings import Settings
from llm_edge.chat.text import printable
from llm_edge.runtime.errors import InputError, LlmEdgeError
from llm_edge.tui.export_manager import ExportManager
from llm_edge.tui.model_loader import ModelLoader
from llm_edge.tui.notifications import notify
from llm_edge.tui.screens.models import ModelsScreen
from llm_edge.tui.screens.output import OutputScreen
from llm_edge.tui.widgets.composer import Composer
from llm_edge.tui.widgets.conversation_view import ConversationView
from llm_edge.tui.widgets.footer import KeyFooter
from llm_edge.tui.widgets.history_panel import HistoryPanel
from llm_edge.tui.widgets.parameter_panel import ParameterPanel
from llm_edge.tui.widgets.pending import Pending
from llm_edge.tui.widgets.status_bar import StatusBar

_BUSY = "Still answering. Press Esc to stop."


class AskingScreen(Screen[None]):
    """The conversation, the composer and the status bar; a `CommandHost` for the slash commands.

    Args:
        load: returns the first model; called on a worker thread.
        changed: values that replace the first model's defaults, by parameter name.
    """

    def __init__(
        self,
        session: ChatSession,
        settings: Settings,
        exports: ExportManager,
        load: Callable[[], Responder],
        changed: Mapping[str, Any],
    ) -> None:
        super().__init__()
        self.session, self._settings, self._exports = session, settings, exports
        self._load, self._changed = load, dict(changed)
        self.loader = ModelLoader(self, session, settings)
        self.history = HistoryPanel(session)
        self.conversation_view = ConversationView(session)
        self.pending = Pending()
        self.composer = Composer(has_queue=lambda: bool(self.pending.questions))
        self.parameter_panel = ParameterPanel(session.parameters, Presets(settings))
        self.status_bar = StatusBar(session, self._idle_state)
        self._title = Static("llm-edge", id="title", markup=False)

    def compose(self) -> ComposeResult:
        yield self._title
        with Horizontal(id="middle"):
            yield self.history
            with Vertical(id="chat"):
                yield self.conversation_view
                yield self.pending
                yield self.composer
            yield self.parameter_panel
        yield self.status_bar
        yield KeyFooter(show_command_palette=True)

    async def on_mount(self) -> None:
        """Show the conversation, and load the first model in the background."""
        self.loader.start(self._load)
        self.composer.focus()
        try:
            self.composer.set_history(self.session.store.questions())
        except LlmEdgeError as error:
            notify(self, str(error), "error")
        await self.show()
        if self._settings.trouble:
            notify(self, self._settings.trouble, "warning")

    async def show(self) -> None:
        """Show the session's conversation."""
        session, responder = self.session, self.session.responder
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
        return "Ready" if self.session.responder else "No model: press F4"

    # ---- models

    async def on_model_loader_loaded(self, event: ModelLoader.Loaded) -> None:
        self.loader.loading = False
        session, previous = self.session, self.session.responder
        session.set_responder(event.responder)
        changed, self._changed = self._changed, {}
        if changed:
            try:
                session.set_start_values(changed)
            except LlmEdgeError as error:
                notify(self, str(error), "error")
        if previous is not None and previous is not event.responder:
            previous.close()
        self.parameter_panel.use(session.parameters, event.responder.name, event.responder.unsupported)
        await self.show()
        await self._ask_next()

    def on_model_loader_failed(self, event: ModelLoader.Failed) -> None:
        """Report the error; without any model, offer others."""
        self.loader.loading = False
        self.status_bar.refresh_state()
        if self.session.responder is None:
            self._return_questions()
        if self.session.responder is None and self.app.screen is self:
            self.action_models(str(event.error))
        else:
            notify(self, str(event.error), "error")

    def action_models(self, reason: str = "") -> None:
        self.app.push_screen(self._models_screen(reason), lambda choice: self.loader.choose(choice) if choice else None)

    def _models_screen(self, reason: str = "") -> ModelsScreen:
        return ModelsScreen(self._settings, self._exports, self.session.responder, reason)

    # ---- questions and answers

    @property
    def _busy(self) -> bool:
        """Whether a question has to wait: for the current answer, or for the first model."""
        return self.session.answering is not None or (self.session.responder is None and self.loader.loading)

    async def on_composer_submitted(self, event: Composer.Submitted) -> None:
        """Ask or queue a question, replace the one that is edited, or execute a command.

        An empty text starts a new conversation, unless an answer is being generated.
        """
        if is_command(event.text):
            self._run_command(event.text)
        elif not event.text.strip() and not self.pending.attachments:
            if self.session.answering is None and not self.pending.questions:
                await self.action_new()
        else:
            await self._submit_question(event)

    async def _submit_question(self, event: Composer.Submitted) -> None:
        try:
            text, attachments, missing = attach_mentioned(event.typed)
        except LlmEdgeError as error:
            notify(self, str(error), "warning")
            self.composer.write(event.text)
            return
        if missing:
            notify(self, f"{missing[0]}: no such file, sent as text.")
        self.pending.attach(*attachments)
        editing = self.composer.editing
        if editing is not None and self._busy:
            notify(self, _BUSY, "warning")
            self.composer.write(event.text)
            return
        text = with_attachments(self.composer.whole(text), self.pending.take_attachments())
        if editing is not None:
            if await self._submit(text, lambda session, tokens: session.edit(editing, text, tokens)):
                self.composer.stop_editing()
        elif self._busy:
            self.pending.queue(text)
        else:
            await self.ask(text)

    async def ask(self, text: str) -> None:
        """Ask a question; if it is refused, it returns to the composer."""
        await self._submit(text, lambda session, tokens: session.ask(text, tokens))

    async def _submit(self, text: str, start: Callable[[ChatSession, int], Message]) -> bool:
        """Start the answer to a question unless it is too long. `start` is given its number of tokens."""
        responder, first = self.session.responder, not self.session.conversation.messages
        tokens = await asyncio.to_thread(tokens_of_question, responder, text, first=first)
        limit = responder.context_length if responder is not None else None
        if limit is not None and tokens >= limit:
            notify(self, f"The question has {tokens:,} tokens, but the context holds {limit:,}. Shorten it.", "warning")
        elif await self._answer(lambda session: start(session, tokens)):
            return True
        self._return_questions(text)
        return False

    async def _answer(self, start: Callable[[ChatSession], Message]) -> bool:
        """Start an answer and show it; returns whether it was started."""
        try:
            start(self.session)
        except LlmEdgeError as error:
            notify(self, str(error), "warning")
            return False
        if self.has_class("narrow"):
            self.history.remove_class("open")
        await self.show()
        self.status_bar.show_state("Reading prompt …")
        self.conversation_view.follow_answer()
        return True

    async def on_conversation_view_answer_ended(self, event: ConversationView.AnswerEnded) -> None:
        """Ask the next queued question; after an error or a stop, return the queue to the composer."""
        figures = event.message.figures
        self.status_bar.refresh_state()
        if "error" in figures:
            notify(self, str(figures["error"]), "error")
        if "error" in figures or figures.get("finish_reason") == "cancelled":
            self._return_questions()
        else:
            await self._ask_next()

    async def on_status_bar_title_changed(self) -> None:
        await self.show()

    async def _ask_next(self) -> None:
        if self.session.answering is None and (question := self.pending.next_question()) is not None:
            await self.ask(question)

    def _return_questions(self, *texts: str) -> None:
        """Return refused and queued questions to the composer, before what is typed there."""
        texts = (*texts, *self.pending.take_questions())
        if texts:
            self._write_question("\n\n".join(filter(None, [*texts, self.composer.text.strip()])))

    def _write_question(self, question: str) -> None:
        """Write a question into the composer, and its files above it."""
        attachments, text = split_attachments(question)
        self.pending.attach(*attachments)
        self.composer.write(text)

    def on_composer_queued_wanted(self) -> None:
        """Take the last queued question back."""
        if self.pending.questions:
            self._write_question(self.pending.last_question())

    @on(TextArea.Changed, "#composer")
    def _composer_changed(self) -> None:
        self.status_bar.count_typed(with_attachments(self.composer.text, self.pending.attachments))

    async def action_new(self) -> None:
        """Start a new conversation; an answer in progress is never lost."""
        if self.session.answering is not None:
            notify(self, _BUSY, "warning")
            return
        if self.session.conversation.messages:
            self.session.new()
            notify(self, "New conversation. Press Ctrl-Z to return to the previous one.")
        self.composer.stop_editing(keep_text=True)
        await self.show()
        self.parameter_panel.show()
        self.composer.focus()

    async def action_regenerate(self) -> None:
        """Answer the last question again."""
        if path := self.session.conversation.path():
            await self._answer(lambda session: session.regenerate(path[-1]))

    async def action_continue(self) -> None:
        if path := self.session.conversation.path():
            await self._answer(lambda session: session.continue_answer(path[-1]))

    # ---- slash commands, see `CommandHost`

    def _run_command(self, line: str) -> None:
        try:
            shown = run_command(self, line)
        except LlmEdgeError as error:
            notify(self, str(error), "warning")
            self.composer.write(line)
            return
        self.parameter_panel.show()
        if "\n" in shown:
            self.app.push_screen(OutputScreen(line.strip(), shown))
        elif shown:
            notify(self, shown)

    def show_help(self) -> str:
        self.call_later(self.app.run_action, "help")
        return ""

    def new(self) -> str:
        self.call_later(self.action_new)
        return ""

    def regenerate(self) -> None:
        self.call_later(self.action_regenerate)

    def continue_answer(self) -> None:
        self.call_later(self.action_continue)

    def choose_model(self, name: str) -> str:
        if name:
            self.loader.choose(find_choice(name, self._settings))
        else:
            self.call_later(self.action_models)
        return ""

    def attach(self, path: str) -> str:
        self.pending.attach(read_attachment(path))
        return ""

    def edit(self, text: str) -> None:
        self.call_later(self.action_edit, text)

    def leave(self) -> None:
        self.call_later(self.app.run_action, "quit")

    @work(exclusive=True, group="editor")
    async def action_edit(self, text: str = "") -> None:
        """Write the question in the user's editor, which has the terminal meanwhile."""
        before = text or self.composer.text
        try:
            with self.app.suspend():
                written = edit_text(before)
        except SuspendNotSupported:
            notify(self, "The editor needs a terminal of its own; it is not available here.", "warning")
            return
        except InputError as error:
            notify(self, str(error), "warning")
            written = before
        self.composer.write(written)
