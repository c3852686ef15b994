"""A chat as it goes: a conversation that is kept, parameters that may be turned, and an answer that may be on its way.

Knows no widgets. A screen calls `poll` when it has time, and shows what is in the conversation.
"""

from __future__ import annotations

import contextlib
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_edge.chat.context import dropped_note, fit_to_context
from llm_edge.chat.figures import figures_of
from llm_edge.chat.history.conversation import Conversation, Message
from llm_edge.chat.history.store import KEEP_EVERY, Store
from llm_edge.chat.parameters import CHAT_ONLY, ChatParameters
from llm_edge.chat.responder import Reply, Responder
from llm_edge.chat.stream_reader import StreamReader
from llm_edge.chat.token_records import Recorder, TokenRecord, pack, unpack
from llm_edge.runtime.errors import InputError, LlmEdgeError
from llm_edge.runtime.results import FinishReason, GenerationChunk
from llm_edge.runtime.text.prompts import Message as Prompt

_RATES = 60  # of the latest moments, for a picture of the speed


@dataclass(frozen=True, slots=True)
class Update:
    """What `poll` found: the message that grew, and whether it is complete."""

    message: Message
    ended: bool


class ChatSession:
    """See the module.

    Args:
        store: where conversations are kept.
        knobs: the parameters.
        clock: gives seconds, as `time.perf_counter` does.

    Attributes:
        responder: who answers; None while there is nobody yet, see `use`.
        conversation: of now.
        knobs: the parameters.
        records: of the tokens of answers, by message id; see `record_of`.
        rates: tokens per second of late.
    """

    def __init__(self, store: Store, knobs: ChatParameters, clock: Callable[[], float] = time.perf_counter) -> None:
        self.store = store
        self.responder: Responder | None = None
        self.knobs = knobs
        self.conversation = store.new()
        self.records: dict[int, list[TokenRecord]] = {}
        self.rates: deque[float] = deque([0.0] * _RATES, maxlen=_RATES)
        self._clock = clock
        self._feed: StreamReader | None = None
        self._message: Message | None = None
        self._note = ""
        self._count = self._prompt = 0  # tokens of the answer on its way, and before it
        self._kept = 0.0
        self._rate_since = (0.0, 0)
        self._recorder: Recorder | None = None
        self._packed = 0  # of the records of the answer on its way are kept already
        self._before: list[int] = []  # conversations that a new one took the place of
        self._own_system = self._given_system = knobs.system  # of new conversations, and what `_go_to` set

    # ---- what a person does

    @property
    def answering(self) -> Message | None:
        """The answer on its way."""
        return self._message

    def ask(self, text: str, tokens: int = 0) -> Message:
        """Ask; returns the answer, which grows. `tokens` says how many the question takes, as far as that is known."""
        self._refuse_while_answering()
        self._require_responder()
        question = self.store.add(self.conversation, "user", text, parent=self.conversation.leaf)
        return self._answer(question, tokens)

    def regenerate(self, message: Message) -> Message:
        """Another answer to the question that an answer answers, beside it; or to a question itself."""
        self._refuse_while_answering()
        question = message if message.role == "user" else self._parent(message)
        return self._answer(question)

    def edit(self, question: Message, text: str, tokens: int = 0) -> Message:
        """Ask something else instead, beside what was asked; see `ask`."""
        self._refuse_while_answering()
        self._require_responder()
        if question.role != "user":
            raise InputError("only what you asked can be edited: choose one of your messages")
        return self._answer(self.store.add(self.conversation, "user", text, parent=question.parent), tokens)

    def go_on(self, message: Message) -> Message:
        """Continue an answer where it ended."""
        self._refuse_while_answering()
        if message.id != self.conversation.leaf:
            raise InputError("only the last answer can be continued")
        if message.role == "user":  # nobody came to answer it
            return self._answer(message)
        if not message.content and not self._require_responder().continues_thoughts:
            message.reasoning = ""
            self.store.drop_records(message.id)
            self.records[message.id] = []
        return self._begin(message, self._parent(message))

    def adopt(
        self, answer: Message, question: Message | str, behind: int | None, records: Sequence[TokenRecord] = ()
    ) -> tuple[Message, Message]:
        """Take an answer that was made elsewhere into the conversation; returns its question and itself.

        Args:
            answer: stays as it is; what joins the conversation is a copy.
            question: a message of the conversation, of which this becomes another answer; or the text of a new one.
            behind: the message that a new question follows; None = it begins the conversation.
            records: of its tokens.
        """
        self._refuse_while_answering()
        if isinstance(question, str):
            question = self.store.add(self.conversation, "user", question, parent=behind)
        kept = self.store.add(
            self.conversation,
            "assistant",
            answer.content,
            parent=question.id,
            model=answer.model,
            params=answer.params,
        )
        kept.reasoning, kept.figures, kept.finished = answer.reasoning, dict(answer.figures), True
        self.records[kept.id], self._packed = list(records), 0
        self._write(kept)
        return question, kept

    def stop(self) -> None:
        """End the answer on its way."""
        if self._feed is not None:
            self._feed.cancel()

    def apply_change(self, change: Callable[[ChatParameters], None]) -> None:
        """Turn a parameter, also while an answer comes.

        Raises:
            ParameterError: it cannot be so.
        """
        before = dict(self.knobs.changed)
        change(self.knobs)
        if self._feed is None or self._message is None or before == self.knobs.changed:
            return
        adjusts = self._require_responder().adjusts
        if adjusts:
            self._feed.adjust(self.knobs.params)
        for name in sorted({*before, *self.knobs.changed}):
            if before.get(name) != self.knobs.changed.get(name):
                self._tell_change(self._message, name, self._count if adjusts and name not in CHAT_ONLY else None)

    def new(self) -> None:
        """Begin a new conversation; `undo_new` returns to the one before."""
        self._leave()
        if self.conversation.messages:
            self._before.append(self.conversation.id)
            self._begin_anew()

    def undo_new(self) -> bool:
        """Return to the conversation that `new` left, or to the latest one there is; False where there is none."""
        self._leave()
        while self._before:
            with contextlib.suppress(InputError):  # another program deleted it
                self._go_to(self.store.load(self._before.pop()))
                return True
        kept = [] if self.conversation.messages else self.store.recent()
        if kept:  # the program has just begun
            self._go_to(self.store.load(max(kept, key=lambda each: each.updated).id))
        return bool(kept)

    def open(self, number: int) -> None:
        """Go to a conversation of the store; the system prompt it was held with is that of now."""
        self._leave()
        self._go_to(self.store.load(number))

    def rename(self, number: int, title: str) -> None:
        """Give a conversation another title."""
        self.store.set_title(self.conversation if number == self.conversation.id else number, title)

    def pin(self, number: int, pinned: bool) -> None:
        """Let a conversation stand first among all, or no longer."""
        self.store.pin(self.conversation if number == self.conversation.id else number, pinned)

    def delete(self, number: int) -> None:
        """Delete a conversation, which `store.restore` brings back; in place of the one of now, a new one begins."""
        if number == self.conversation.id:
            self._leave()
            self._begin_anew()
        self.store.delete(number)
        self._before = [each for each in self._before if each != number]

    def select(self, message: int) -> None:
        """Walk to a version of a message."""
        self._refuse_while_answering()
        self.store.select(self.conversation, message)

    def use(self, responder: Responder) -> None:
        """Let another model answer from now on."""
        self._leave()
        self.responder = responder
        self.knobs.use(responder.default_params)

    def close(self) -> None:
        """End what is on its way, and keep it."""
        self._leave()

    # ---- what a screen shows

    def poll(self) -> Update | None:
        """Take what has come; None where nothing has."""
        feed, message = self._feed, self._message
        if feed is None or message is None:
            return None
        news = feed.drain()
        for each in news:
            if isinstance(each, LlmEdgeError):
                message.figures["error"] = str(each)
                return self._end(message)
            self._take(message, each)
            if each.finish_reason is not None and each.timings is not None:
                changes = message.figures.get("changes")
                message.figures = figures_of(each.timings, each.finish_reason, self._require_responder().detail)
                if changes:
                    message.figures["changes"] = changes
                return self._end(message)
        if not news:
            return None
        now = self._clock()
        if now - self._kept >= KEEP_EVERY:
            self._kept = now
            self._keep(message)
        return Update(message, ended=False)

    def sample_rate(self) -> float:
        """Tokens per second since the last call; joins `rates`."""
        now, (before, count) = self._clock(), self._rate_since
        self._rate_since = (now, self._count)
        rate = max(self._count - count, 0) / (now - before) if now > before else 0.0
        self.rates.append(rate)
        return rate

    def record_of(self, message: Message) -> list[TokenRecord]:
        """What was kept of the tokens of an answer; grows with it.

        Raises:
            InputError: it is damaged.
        """
        if message.id not in self.records:
            self.records[message.id] = [each for data in self.store.records(message.id) for each in unpack(data)]
        return self.records[message.id]

    def used(self) -> int:
        """Tokens that the conversation takes of the context, as far as its answers tell."""
        if self._feed is not None:
            return self._prompt + self._count
        return next((_taken(each) for each in reversed(self.conversation.path()) if "tokens" in each.figures), 0)

    # ---- how

    def _answer(self, question: Message, tokens: int = 0) -> Message:
        message = self.store.add(
            self.conversation,
            "assistant",
            parent=question.id,
            model=self._require_responder().name,
            params=dict(self.knobs.changed),
        )
        return self._begin(message, question, tokens)

    def _begin(self, message: Message, question: Message, tokens: int = 0) -> Message:
        if self.conversation.system != self.knobs.system:
            self.store.set_system(self.conversation, self.knobs.system)
        turns = self._turns(question)
        opening: list[Prompt] = [{"role": "system", "content": self.knobs.system}] if self.knobs.system else []
        responder, params, prefix = self._require_responder(), self.knobs.params, (message.content, message.reasoning)

        def reply() -> Reply:
            made, kept, limit = fit_to_context(
                lambda messages: responder.answer(
                    messages, params, assistant_prefix=prefix[0], reasoning_prefix=prefix[1]
                ),
                opening,
                turns[:-1],
                turns[-1],
            )
            if limit:
                self._note = dropped_note((len(turns) - 1 - len(kept)) // 2, limit)
            return made

        self._prompt = self._estimated_prompt(message, question, tokens)
        message.finished = False
        message.figures = {}
        self._message, self._note, self._count, self._kept = message, "", 0, self._clock()
        self._rate_since = (self._clock(), 0)
        self._recorder, self._packed = Recorder(responder.token_text), len(self._begun_records(message))
        self._feed = StreamReader(reply)
        return message

    def _estimated_prompt(self, message: Message, question: Message, tokens: int) -> int:
        """Tokens that stand before what an answer is about to say; the answer's own figures tell once it has ended."""
        if "tokens" in message.figures:  # it goes on
            return _taken(message)
        for number in reversed(self.conversation.siblings(message.id)):
            if told := self.conversation.messages[number].figures.get("prompt_tokens"):
                return int(told)
        before = reversed(self.conversation.path_to(question.parent))
        return next((_taken(each) for each in before if "tokens" in each.figures), 0) + tokens

    def _turns(self, question: Message) -> list[Mapping[str, Any]]:
        """What stands before an answer, question and answer in turn, the question last."""
        return [{"role": each.role, "content": each.content} for each in self.conversation.path_to(question.id)]

    def _parent(self, message: Message) -> Message:
        if message.parent is None:
            raise InputError("this message answers nothing")
        return self.conversation.messages[message.parent]

    def _take(self, message: Message, piece: GenerationChunk) -> None:
        if piece.reasoning:
            message.reasoning += piece.text
        else:
            message.content += piece.text
        if piece.token is not None:
            self._count += 1
            if piece.logprob is not None:
                assert self._recorder is not None
                self.records[message.id].append(self._recorder.record(piece.logprob))

    def _end(self, message: Message) -> Update:
        message.finished = True
        if self._note:
            message.figures["note"] = self._note
        self._feed = self._message = None
        self._keep(message)
        return Update(message, ended=True)

    def _keep(self, message: Message) -> None:
        """Write down what has come; where that fails, the answer goes on, and the line under it says so."""
        try:
            self._write(message)
        except LlmEdgeError as error:
            message.figures["note"] = f"not kept: {error}"

    def _tell_change(self, message: Message, name: str, at: int | None) -> None:
        """Note in an answer that a parameter was turned, and from which token on that counts; None = not in it."""
        changes = [each for each in message.figures.get("changes", ()) if (each["name"], each["at"]) != (name, at)]
        if at is not None or self.knobs.changed.get(name) != message.params.get(name):
            changes.append({"at": at, "name": name, "value": self.knobs.text(name)})
        message.figures["changes"] = changes

    def _write(self, message: Message) -> None:
        self.store.update(message)
        records = self.records[message.id]
        if len(records) > self._packed:
            self.store.add_records(message.id, pack(records[self._packed :]))
            self._packed = len(records)

    def _begun_records(self, message: Message) -> list[TokenRecord]:
        """Of the tokens of an answer that is about to begin or to go on."""
        if not message.content and not message.reasoning:
            return self.records.setdefault(message.id, [])
        with contextlib.suppress(InputError):
            return self.record_of(message)
        self.store.drop_records(message.id)
        return self.records.setdefault(message.id, [])

    def _begin_anew(self) -> None:
        self._keep_own_system()
        self._go_to(self.store.new(system=self._own_system))

    def _go_to(self, conversation: Conversation) -> None:
        self._keep_own_system()
        self.conversation = conversation
        self.knobs.set("system", conversation.system)
        self._given_system = conversation.system

    def _keep_own_system(self) -> None:
        """A system prompt that somebody wrote is that of new conversations; one that an old conversation had is not."""
        if self.knobs.system != self._given_system:
            self._own_system = self._given_system = self.knobs.system

    def _leave(self) -> None:
        """End an answer on its way, and keep what came of it."""
        feed, message = self._feed, self._message
        if feed is None or message is None:
            return
        feed.cancel()
        feed.join()
        self.poll()
        if self._message is not None:  # it ended without a word
            message.figures["finish_reason"] = FinishReason.CANCELLED.value
            self._end(message)

    def _require_responder(self) -> Responder:
        if self.responder is None:
            raise InputError("there is no model to answer yet: choose one (F4), or wait a moment if one is loading")
        return self.responder

    def _refuse_while_answering(self) -> None:
        if self._message is not None:
            raise InputError("an answer is on its way: stop it first (Esc)")


def _taken(message: Message) -> int:
    """Tokens of an answer and all before it, by its figures."""
    return int(message.figures.get("prompt_tokens", 0)) + int(message.figures.get("tokens", 0))
