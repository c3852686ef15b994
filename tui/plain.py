"""`PlainChat`: a chat session line by line, for any terminal and for pipes."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import TextIO

from llm_edge.chat.attachments import Attachment, attach_mentioned, read_attachment, with_attachments
from llm_edge.chat.choice import find_choice, known_models, open_responder
from llm_edge.chat.commands import format_help, help_lines, run_command
from llm_edge.chat.editor import edit_text
from llm_edge.chat.figures import figures_line
from llm_edge.chat.history.conversation import Message, title_of
from llm_edge.chat.history.store import InMemoryStore
from llm_edge.chat.running_answer import Update
from llm_edge.chat.session import ChatSession
from llm_edge.chat.settings import Settings
from llm_edge.chat.text import printable
from llm_edge.runtime.errors import InputError, LlmEdgeError, MachineError
from llm_edge.runtime.results import FinishReason
from llm_edge.tui.terminal import ReasoningOutput, without_echo

HINT = "/help lists the commands, Ctrl-C stops an answer, quit leaves."
_KEYS = [
    ("(empty line)", "start a new conversation"),
    ("Ctrl-C", "stop the answer; at the prompt, leave"),
    ("quit", "leave (so does Ctrl-D)"),
]
_WAIT = 0.1  # seconds between checks for Ctrl-C


class PlainChat:
    """Asks a chat session and writes the answers as they are generated.

    Args:
        session: the chat.
        output: receives answers.
        notes: receives everything else.
        reasoning: receives reasoning; None = it is not written.
        interactive: a user is watching: Ctrl-C stops only the answer, a blank line follows each, and `@path` in a
            question attaches a file.
        with_figures: write a line of figures after each answer.

    Attributes:
        save_error: why conversations are no longer saved.
    """

    def __init__(
        self,
        session: ChatSession,
        output: TextIO,
        notes: TextIO,
        *,
        reasoning: TextIO | None = None,
        interactive: bool = False,
        with_figures: bool = True,
    ) -> None:
        self.session = session
        self.save_error: LlmEdgeError | None = None
        self._output = output
        self._notes = notes
        self._reasoning = reasoning
        self._interactive = interactive
        self._with_figures = with_figures
        self._announced = 0  # id of the conversation whose file was named
        self._attached: list[Attachment] = []  # to the next question
        self._left = False
        self._cut_off_reported = False

    def run(self, lines: Iterable[str]) -> int:
        """Answer lines until they end or one is `quit`.

        Returns:
            0, or the highest exit code of the errors that were reported.
        """
        worst = 0
        for line in lines:
            text = line.rstrip("\r\n").removeprefix("\ufeff")  # some editors start files with a byte order mark
            if text.strip().lower() in ("quit", "exit", "/quit", "/exit"):
                break
            try:
                self._line(text)
            except LlmEdgeError as error:
                worst = max(worst, error.exit_code)
                self._note(f"error: {error}")
            if self._left:
                break
        return max(worst, self.save_error.exit_code if self.save_error is not None else 0)

    def ask(self, text: str, title: str = "") -> None:
        """Ask a question and write its answer.

        A failed answer, and one that was stopped before any text, leaves the conversation as it was.

        Args:
            text: the question.
            title: what to name a new conversation after; "" = the question.

        Raises:
            LlmEdgeError: the answer failed.
        """
        self._finish(self._start(text, title or text))

    def _finish(self, answer: Message, *, again: bool = False) -> None:
        """Write a started answer. `again`: it is another answer to its question, or continued."""
        reasoning = ReasoningOutput(self._reasoning, instead=None if self.session.show_reasoning else "(thinking)")
        try:
            with _stop_on_interrupt() if self._interactive else contextlib.nullcontext() as interrupted:
                update = self._stream(answer, reasoning, interrupted, len(answer.content))
        finally:
            self.session.close()
            reasoning.end(gap=False)
            if answer.content or answer.reasoning or "error" not in answer.figures:
                self._write("\n")  # so that what follows starts a line
        stopped = answer.figures.get("finish_reason") == FinishReason.CANCELLED
        if (update.error is not None or (stopped and not answer.content)) and not again:
            self._discard(answer)
        self._report_saving()
        if update.error is not None:
            raise update.error
        if self._with_figures:
            self._note(figures_line(answer.figures))
        if answer.figures["finish_reason"] == FinishReason.LENGTH and (self._interactive or not self._cut_off_reported):
            self._cut_off_reported = True  # once is enough for a script
            self._note(self._cut_off(answer))

    def _stream(
        self, answer: Message, reasoning: ReasoningOutput, interrupted: threading.Event | None, written: int
    ) -> Update:
        """Write an answer as it is generated, from a number of characters on."""
        thought = len(answer.reasoning) if written else 0
        while True:
            self.session.wait(_WAIT)
            if interrupted is not None and interrupted.is_set():
                self.session.stop()
            if (update := self.session.poll()) is None:
                continue
            reasoning.write(answer.reasoning[thought:])
            thought = len(answer.reasoning)
            if text := answer.content[written:]:
                reasoning.end()
                self._write(text)
                written = len(answer.content)
            if update.ended:
                return update

    def _start(self, text: str, title: str) -> Message:
        conversation = self.session.conversation
        conversation.title = conversation.title or title_of(title)
        leaf = conversation.leaf
        try:
            return self.session.ask(text)
        except MachineError as error:
            self._stop_saving(error)
            conversation.leaf = leaf
            return self.session.ask(text)

    def _discard(self, answer: Message) -> None:
        try:
            self.session.discard(answer)
        except MachineError as error:
            self._stop_saving(error)
            self.session.discard(answer)

    def _report_saving(self) -> None:
        """Report where a conversation is saved, once, or that it is not."""
        store, number = self.session.store, self.session.conversation.id
        if self.session.save_error is not None and not isinstance(store, InMemoryStore):
            self._stop_saving(self.session.save_error)
        elif not isinstance(store, InMemoryStore) and self._announced != number:
            self._announced = number
            self._note(f"(saved in {store.path})")

    def _stop_saving(self, error: LlmEdgeError) -> None:
        """Continue without saving: a full disk should not end a chat."""
        if isinstance(self.session.store, InMemoryStore):
            raise error
        self.save_error, self.session.store = error, InMemoryStore()
        self._note(f"error: {error} (nothing is saved from here on)")

    def _cut_off(self, answer: Message) -> str:
        """Why an answer ends early, and the remedy."""
        count, limit = answer.figures["tokens"], self.session.parameters.params.max_tokens
        remedy = "raise --max-tokens"
        if count < limit:
            remedy = "the model's context holds no more"
        elif self._interactive:
            remedy = "raise it with /set max_tokens"
        if not answer.content and answer.reasoning:
            return f"all {count} tokens of the answer are reasoning: {remedy}"
        more = ", or continue it with /continue" if self._interactive else ""
        return f"(the answer was cut off after {count} tokens: {remedy}{more})"

    def _line(self, text: str) -> None:
        if any("\ud800" <= character <= "\udfff" for character in text):  # how Python reads bytes that are not UTF-8
            raise InputError("this line is not valid UTF-8: convert it first")
        if not text.strip() and not self._attached:
            self._note(self.new())
        elif text.startswith("/"):
            if shown := run_command(self, text):
                self._note(shown)
        else:
            self._ask_typed(text)

    def _ask_typed(self, text: str) -> None:
        """Ask a typed question, with the files that are attached to it."""
        attached = list(self._attached)
        if self._interactive:
            text, mentioned, missing = attach_mentioned(text)
            attached += mentioned
            for name in missing:
                self._note(f"({name}: no such file, sent as text)")
        self.ask(with_attachments(text, attached), title=text)
        self._attached.clear()
        if self._interactive:
            self._write("\n")

    # ---- what the commands need, see `CommandHost`

    def show_help(self) -> str:
        return format_help([*help_lines(), *_KEYS])

    def new(self) -> str:
        self.session.new(keep_parameters=True)
        self._attached.clear()
        return "(new conversation)"

    def regenerate(self) -> None:
        self._finish(self.session.regenerate(self._last()), again=True)

    def continue_answer(self) -> None:
        self._finish(self.session.continue_answer(self._last()), again=True)

    def _last(self) -> Message:
        path = self.session.conversation.path()
        if not path:
            raise InputError("there is no answer yet: ask a question first")
        return path[-1]

    def choose_model(self, name: str) -> str:
        """Load a model while the current one stays in memory; it is closed once the new one is ready."""
        settings, before = Settings(), self.session.responder
        if not name:
            current = f"current: {before.name}, {before.detail}\n" if before is not None else ""
            return current + "\n".join(line for line, _ in known_models(settings))
        responder = open_responder(find_choice(name, settings))
        self.session.set_responder(responder)
        if before is not None:
            before.close()
        return f"model = {responder.name}, {responder.detail}"

    def attach(self, path: str) -> str:
        attachment = read_attachment(path)
        self._attached.append(attachment)
        return f"attached {attachment.label}"

    def edit(self, text: str) -> None:
        if not self._interactive:
            raise InputError("/edit needs a terminal: write the question on one line")
        written = edit_text(text)
        if written.strip():
            self._write(written.rstrip() + "\n\n")
            self._ask_typed(written.rstrip())

    def leave(self) -> None:
        self._left = True

    # ---- output

    def _write(self, text: str) -> None:
        self._output.write(printable(text) if self._output.isatty() else text)
        self._output.flush()

    def _note(self, text: str) -> None:
        self._notes.write(printable(text) + "\n")
        self._notes.flush()


@contextlib.contextmanager
def _stop_on_interrupt() -> Iterator[threading.Event]:
    """Set the event on Ctrl-C instead of ending the program, and hide keys that are pressed meanwhile."""
    interrupted = threading.Event()

    def stop(_signal: int, _frame: FrameType | None) -> None:
        interrupted.set()

    try:
        before = signal.signal(signal.SIGINT, stop)
    except ValueError:  # not in the main thread, where Ctrl-C does not arrive
        yield interrupted
        return
    try:
        with without_echo():
            yield interrupted
    finally:
        signal.signal(signal.SIGINT, before)
