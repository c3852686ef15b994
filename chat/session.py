"""`ChatSession`: a chat as every front end uses it: the conversation, its parameters, and the answer being generated.

A front end calls `poll` when it has time, and shows the conversation.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from llm_edge.chat.context import dropped_note, fit_to_context
from llm_edge.chat.history.conversation import Conversation, Message
from llm_edge.chat.history.store import Store
from llm_edge.chat.model_parameters import ModelParameters, without_system
from llm_edge.chat.parameters import CHAT_ONLY, ChatParameters
from llm_edge.chat.responder import Reply, Responder
from llm_edge.chat.running_answer import RunningAnswer, Update, save_answer
from llm_edge.chat.titles import TitleWriter, needs_title
from llm_edge.chat.token_records import TokenRecord, unpack
from llm_edge.runtime.errors import InputError, LlmEdgeError
from llm_edge.runtime.text.prompts import Message as Prompt

_RATES = 60  # samples of the speed


class ChatSession:
    """A chat: one conversation of a store at a time.

    Attributes:
        responder: the model that answers; None until `set_responder` is called.
        conversation: the current one.
        records: token records of answers, by message id; see `record_of`.
        rates: latest samples of the speed, in tokens per second.
        show_reasoning: whether front ends show the reasoning of answers.
        thinking: whether the chat template asks for reasoning; None = the template's default.
        save_error: why the latest answer could not be saved.
        automatic_titles: whether the model is asked for a title where the first question makes a poor one.
    """

    def __init__(
        self, store: Store, parameters: ChatParameters, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.store = store
        self.responder: Responder | None = None
        self.parameters = parameters
        self.conversation = store.new(system=parameters.system)
        self.records: dict[int, list[TokenRecord]] = {}
        self.rates: deque[float] = deque([0.0] * _RATES, maxlen=_RATES)
        self.show_reasoning = True
        self.thinking: bool | None = None
        self.save_error: LlmEdgeError | None = None
        self.automatic_titles = False
        self._title_writer: TitleWriter | None = None
        self._clock = clock
        self._running: RunningAnswer | None = None
        self._values = ModelParameters(parameters)
        self._previous: list[int] = []  # conversations that `new` left

    # ---- actions

    @property
    def answering(self) -> Message | None:
        """The answer being generated."""
        return self._running.message if self._running is not None else None

    def ask(self, text: str, tokens: int = 0) -> Message:
        """Ask a question; returns the answer, which grows with each `poll`.

        Args:
            text: the question.
            tokens: its length, as far as it is known.
        """
        self._refuse_while_answering()
        self._require_responder()
        question = self.store.add(self.conversation, "user", text, parent=self.conversation.leaf)
        return self._answer(question, tokens)

    def regenerate(self, message: Message) -> Message:
        """Answer the question of an answer once more, as another branch; or a question itself."""
        self._refuse_while_answering()
        return self._answer(message if message.role == "user" else self._parent(message))

    def edit(self, question: Message, text: str, tokens: int = 0) -> Message:
        """Ask another question in place of one, as another branch; see `ask`."""
        self._refuse_while_answering()
        self._require_responder()
        if question.role != "user":
            raise InputError("only questions can be edited: select one of yours")
        return self._answer(self.store.add(self.conversation, "user", text, parent=question.parent), tokens)

    def continue_answer(self, message: Message) -> Message:
        """Continue the last answer where it ended; if the last message is a question, answer it."""
        self._refuse_while_answering()
        if message.id != self.conversation.leaf:
            raise InputError("only the last answer can be continued")
        if message.role == "user":
            return self._answer(message)
        if not message.content and not self._require_responder().continues_thoughts:
            message.reasoning = ""
            self.store.drop_records(message.id)
            self.records[message.id] = []
        return self._start(message, self._parent(message))

    def add_answer(
        self, answer: Message, question: Message | str, parent: int | None, records: Sequence[TokenRecord] = ()
    ) -> tuple[Message, Message]:
        """Add a copy of an answer that was generated elsewhere; returns its question and the copy.

        Args:
            answer: the answer.
            question: a message of the conversation, to which this is another answer; or the text of a new one.
            parent: the message that a new question follows; None = it is the first.
            records: of the answer's tokens.
        """
        self._refuse_while_answering()
        if isinstance(question, str):
            question = self.store.add(self.conversation, "user", question, parent=parent)
        copy = self.store.add(
            self.conversation, "assistant", answer.content, parent=question.id, model=answer.model, params=answer.params
        )
        copy.reasoning, copy.figures, copy.finished = answer.reasoning, dict(answer.figures), True
        self.records[copy.id] = list(records)
        save_answer(self.store, copy, self.records[copy.id])
        return question, copy

    def discard(self, answer: Message) -> None:
        """Leave an answer and its question out of the conversation; both stay in the store as a branch."""
        self._refuse_while_answering()
        self.store.set_leaf(self.conversation, self._parent(answer).parent)

    def stop(self) -> None:
        """Stop the answer being generated."""
        if self._running is not None:
            self._running.cancel()

    def apply_change(self, change: Callable[[ChatParameters], None]) -> None:
        """Change parameters, also while an answer is generated.

        Raises:
            ParameterError: a value is not allowed.
        """
        before = dict(self.parameters.changed)
        change(self.parameters)
        running, now = self._running, self.parameters.changed
        if running is None or before == now:
            return
        adjusts = self._require_responder().adjusts
        if adjusts:
            running.adjust(self.parameters.params)
        for name in sorted({*before, *now}):
            if before.get(name) != now.get(name):
                self._note_change(running.message, name, running.tokens if adjusts and name not in CHAT_ONLY else None)

    def set_start_values(self, values: Mapping[str, Any]) -> None:
        """Change parameters of the current model, which new conversations with it start with too."""
        self._values.set_start_values(values)

    def reset_parameters(self) -> None:
        """Restore the parameters that conversations with this model start with; the system prompt stays."""
        self.apply_change(lambda parameters: self._values.reset(parameters, self.responder))

    def new(self, *, keep_parameters: bool = False) -> None:
        """Start a new conversation, with the model's own parameters; `undo_new` returns to the previous one.

        `keep_parameters`: go on with the current ones.
        """
        self.close()
        if self.conversation.messages:
            self._previous.append(self.conversation.id)
            values = without_system(self.parameters.changed) if keep_parameters else None
            self._start_new()
            if values is not None:
                self._values.load(values)

    def undo_new(self) -> bool:
        """Return to the conversation that `new` left, else to the latest one; False if there is none."""
        self.close()
        while self._previous:
            with contextlib.suppress(InputError):  # another program deleted it
                self._show(self.store.load(self._previous.pop()))
                return True
        return not self.conversation.messages and self.open_latest()  # nothing was asked since the start

    def open_latest(self) -> bool:
        """Show the conversation that was used last; False if there is none."""
        self.close()
        stored = self.store.recent()
        if stored:
            self._show(self.store.load(max(stored, key=lambda each: each.updated).id))
        return bool(stored)

    def open(self, number: int) -> None:
        """Show a conversation of the store, and use its system prompt."""
        self.close()
        self._show(self.store.load(number))

    def rename(self, number: int, title: str) -> None:
        """Set the title of a conversation."""
        self.store.set_title(self.conversation if number == self.conversation.id else number, title)

    def pin(self, number: int, pinned: bool) -> None:
        """List a conversation before the others, or no longer."""
        self.store.pin(self.conversation if number == self.conversation.id else number, pinned)

    def delete(self, number: int) -> None:
        """Delete a conversation, which `store.restore` brings back; a new one replaces the current one."""
        if number == self.conversation.id:
            self.close()
            self._start_new()
        self.store.delete(number)
        self._previous = [each for each in self._previous if each != number]

    def select(self, message: int) -> None:
        """Show the branch with this message."""
        self._refuse_while_answering()
        self.store.select(self.conversation, message)

    def set_responder(self, responder: Responder) -> None:
        """Use another model from now on, with its own parameters, or those it had in this conversation."""
        self.close()
        previous, self.responder = self.responder, responder
        self._values.use_model(previous, responder, self.conversation)

    def close(self) -> None:
        """Stop the answer being generated, wait for its end, and save it."""
        self._stop_title_writer()
        running, self._running = self._running, None
        if running is not None:
            running.finish(self.store)
            self.save_error = running.save_error

    # ---- state

    def poll(self) -> Update | None:
        """Take what was generated since the last call; None = nothing was."""
        running = self._running
        update = running.poll(self.store) if running is not None else None
        if running is not None and update is not None and update.ended:
            self._running, self.save_error = None, running.save_error
            if self.automatic_titles and update.error is None and needs_title(self.conversation):
                self._title_writer = TitleWriter(
                    self._require_responder(), [*self._system(), *self._turns(update.message)]
                )
        return update

    def poll_title(self) -> bool:
        """Use the title that the model was asked for; returns whether the conversation has a new title."""
        title = self._title_writer.poll() if self._title_writer is not None else None
        if title is None:
            return False
        self._title_writer = None
        if title and needs_title(self.conversation):  # the user did not rename it meanwhile
            with contextlib.suppress(LlmEdgeError):  # a title is not worth an error message
                self.store.set_title(self.conversation, title)
        return bool(title)

    def wait(self, seconds: float) -> None:
        """Wait until there is something to poll, at most so many seconds."""
        if self._running is not None:
            self._running.wait(seconds)

    def sample_rate(self) -> float:
        """Tokens per second since the last call; appended to `rates`."""
        rate = self._running.rate() if self._running is not None else 0.0
        self.rates.append(rate)
        return rate

    def record_of(self, message: Message) -> list[TokenRecord]:
        """The token records of an answer; the list grows with it.

        Raises:
            InputError: the stored records are damaged.
        """
        if message.id not in self.records:
            self.records[message.id] = [each for data in self.store.records(message.id) for each in unpack(data)]
        return self.records[message.id]

    def used(self) -> int:
        """Number of tokens of the context in use, as far as the answers report it."""
        if self._running is not None:
            return self._running.prompt_tokens + self._running.tokens
        return next((_total(each) for each in reversed(self.conversation.path()) if "tokens" in each.figures), 0)

    # ---- internals

    def _answer(self, question: Message, tokens: int = 0) -> Message:
        message = self.store.add(
            self.conversation,
            "assistant",
            parent=question.id,
            model=self._require_responder().name,
            params=dict(self.parameters.changed),
        )
        return self._start(message, question, tokens)

    def _start(self, message: Message, question: Message, tokens: int = 0) -> Message:
        if self.conversation.system != self.parameters.system:
            self.store.set_system(self.conversation, self.parameters.system)
        self._stop_title_writer()
        system, turns = self._system(), self._turns(question)
        responder, params, prefix = (
            self._require_responder(),
            self.parameters.params,
            (message.content, message.reasoning),
        )
        variables = {} if self.thinking is None else {"enable_thinking": self.thinking}

        def request(running: RunningAnswer) -> Reply:
            reply, kept, limit = fit_to_context(
                lambda messages: responder.answer(
                    messages,
                    params,
                    assistant_prefix=prefix[0],
                    reasoning_prefix=prefix[1],
                    template_variables=variables,
                ),
                system,
                turns[:-1],
                turns[-1],
            )
            if limit:
                running.note = dropped_note((len(turns) - 1 - len(kept)) // 2, limit)
            return reply

        prompt_tokens = self._estimated_prompt(message, question, tokens)
        message.finished = False
        message.figures = {}
        records = self._stored_records(message)
        self._running = RunningAnswer(message, request, responder, records, prompt_tokens, self._clock)
        return message

    def _estimated_prompt(self, message: Message, question: Message, tokens: int) -> int:
        """Estimate the number of tokens before an answer; its figures report the exact one once it has ended."""
        if "tokens" in message.figures:  # it is continued
            return _total(message)
        for number in reversed(self.conversation.siblings(message.id)):
            if count := self.conversation.messages[number].figures.get("prompt_tokens"):
                return int(count)
        before = reversed(self.conversation.path_to(question.parent))
        return next((_total(each) for each in before if "tokens" in each.figures), 0) + tokens

    def _turns(self, question: Message) -> list[Mapping[str, Any]]:
        """The messages before an answer: questions and answers in turn, its question last."""
        return [{"role": each.role, "content": each.content} for each in self.conversation.path_to(question.id)]

    def _system(self) -> list[Prompt]:
        return [{"role": "system", "content": self.parameters.system}] if self.parameters.system else []

    def _stop_title_writer(self) -> None:
        writer, self._title_writer = self._title_writer, None
        if writer is not None:
            writer.cancel()

    def _parent(self, message: Message) -> Message:
        if message.parent is None:
            raise InputError("this message is not an answer")
        return self.conversation.messages[message.parent]

    def _note_change(self, message: Message, name: str, at: int | None) -> None:
        """Add a changed parameter to an answer's figures; `at` = first token it applies to, None = the next answer."""
        changes = [each for each in message.figures.get("changes", ()) if (each["name"], each["at"]) != (name, at)]
        if at is not None or self.parameters.changed.get(name) != message.params.get(name):
            changes.append({"at": at, "name": name, "value": self.parameters.text(name)})
        message.figures["changes"] = changes

    def _stored_records(self, message: Message) -> list[TokenRecord]:
        """The token records of an answer that is about to start or to continue."""
        if not message.content and not message.reasoning:
            return self.records.setdefault(message.id, [])
        with contextlib.suppress(InputError):
            return self.record_of(message)
        self.store.drop_records(message.id)
        return self.records.setdefault(message.id, [])

    def _start_new(self) -> None:
        self._values.keep_system()
        self._show(self.store.new(system=self._values.new_system))

    def _show(self, conversation: Conversation) -> None:
        self.conversation = conversation
        self._values.use_conversation(conversation, self.responder)

    def _require_responder(self) -> Responder:
        if self.responder is None:
            raise InputError("no model is loaded: choose one (F4), or wait if one is loading")
        return self.responder

    def _refuse_while_answering(self) -> None:
        if self._running is not None:
            raise InputError("still answering: press Esc to stop")


def _total(message: Message) -> int:
    """Number of tokens of an answer and everything before it, by its figures."""
    return int(message.figures.get("prompt_tokens", 0)) + int(message.figures.get("tokens", 0))
