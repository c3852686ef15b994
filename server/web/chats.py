"""`LiveChats`: the conversations in use, whose answers keep going when nobody watches.

Each conversation in use is a `ChatSession`, as in the terminal chat, and in the same store. All work on sessions and
the store runs on threads, one call at a time for each conversation.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.concurrency import run_in_threadpool

from llm_edge.chat.history.conversation import Message
from llm_edge.chat.history.store import Store
from llm_edge.chat.parameters import ChatParameters
from llm_edge.chat.responder import LocalResponder, Responder
from llm_edge.chat.session import ChatSession
from llm_edge.runtime.errors import LlmEdgeError
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.server.errors import ApiError
from llm_edge.server.models import ModelPool
from llm_edge.server.web.markdown import AnswerBlocks
from llm_edge.server.web.upstream_responder import UpstreamResponder
from llm_edge.server.web.views import chat_view

_log = logging.getLogger("llm_edge.server")
_INTERVAL = 0.08  # seconds between looks at a running answer
_RATE_INTERVAL = 0.5  # seconds over which the speed is measured
_CLOSE_SECONDS = 5.0
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Progress:
    """The answer being generated, as far as it has come.

    Attributes:
        message: its id.
        blocks: HTML of the answer.
        reasoning: the text of its reasoning.
        used: number of tokens of the context in use.
        rate: tokens per second.
    """

    message: int
    blocks: tuple[str, ...]
    reasoning: str
    used: int
    rate: float


@dataclass(frozen=True, slots=True)
class AnswerOptions:
    """What a request for an answer sets.

    Attributes:
        model: name in the pool; "" = the default.
        params: parameters that differ from the model's defaults.
        system: system prompt; None = the conversation's.
        thinking: whether the chat template asks for reasoning; None = its default.
    """

    model: str
    params: dict[str, Any]
    system: str | None = None
    thinking: bool | None = None


class LiveChat:
    """A conversation in use.

    Attributes:
        session: the conversation, its parameters and the answer being generated.
        context: length of the context of the model that answers, or answered last.
        version: changes with the conversation, but not while an answer grows.
        progress: of the answer being generated, if somebody watches it.
        closing: the server shuts down: streams of events end with the answer.
    """

    def __init__(self, store: Store) -> None:
        self.session = ChatSession(store, ChatParameters(SamplingParams()))
        self.context: int | None = None
        self.version = 0
        self.progress: Progress | None = None
        self.users = 0
        self.closing = False
        self._lock = asyncio.Lock()
        self._watchers: set[asyncio.Event] = set()
        self._blocks = AnswerBlocks()
        self._rate, self._rate_at = 0.0, 0.0

    @property
    def running(self) -> bool:
        """Whether an answer is being generated."""
        return self.session.answering is not None

    async def read(self, work: Callable[[ChatSession], T]) -> T:
        """Run something on a thread that does not change the conversation."""
        async with self._lock:
            return await run_in_threadpool(self._fresh, work)

    async def change(self, work: Callable[[ChatSession], T], *, while_answering: bool = False) -> T:
        """Run something on a thread that changes the conversation.

        Raises:
            ApiError: an answer is being generated, and `work` would interfere with it.
        """
        async with self._lock:
            if not while_answering:
                self._refuse_while_answering()
            result = await run_in_threadpool(self._fresh, work)
        self.changed()
        return result

    def changed(self) -> None:
        """Send the conversation to everyone who watches it."""
        self.version += 1
        self._wake()

    # ---- answers

    async def answer(
        self,
        pool: ModelPool,
        options: AnswerOptions,
        begin: Callable[[ChatSession], Message],
        started: Callable[[], None],
    ) -> None:
        """Answer to the end; `started` is called once the answer exists.

        Raises:
            ApiError: an answer is being generated already, or the model cannot be used.
            LlmEdgeError: the model cannot be loaded, or an option is not allowed.
        """
        self._refuse_while_answering()
        async with _responder(pool, options.model) as responder:
            async with self._lock:
                self._refuse_while_answering()  # another request may have begun while the model was loaded
                await run_in_threadpool(self._fresh, lambda session: self._begin(session, responder, options, begin))
            try:
                started()
                self.changed()
                while True:
                    began = time.perf_counter()
                    async with self._lock:
                        await run_in_threadpool(self._poll)
                    if not self.running:  # nothing may come between the end and what follows it
                        break
                    self._wake()
                    # Rendering takes at most about a tenth of the time, however long a block is.
                    await asyncio.sleep(max(_INTERVAL, 10 * (time.perf_counter() - began)))
            finally:
                self._release()
                self.changed()

    def _begin(
        self,
        session: ChatSession,
        responder: Responder,
        options: AnswerOptions,
        begin: Callable[[ChatSession], Message],
    ) -> None:
        session.set_responder(responder)
        try:
            system = session.conversation.system if options.system is None else options.system
            session.parameters.load({**options.params, "system": system})
            session.thinking = options.thinking
            self.context = responder.context_length
            self._blocks, self._rate, self._rate_at = AnswerBlocks(), 0.0, time.monotonic()
            begin(session)
        except BaseException:
            self._release()
            raise

    def _release(self) -> None:
        """End the answer, if the server shuts down before its end, and let go of the model."""
        self.session.close()
        self.session.responder = None
        self.progress = None

    def _poll(self) -> None:
        self.session.poll()
        now = time.monotonic()
        if now - self._rate_at >= _RATE_INTERVAL:
            self._rate, self._rate_at = self.session.sample_rate(), now
        answer = self.session.answering
        if self._watchers and answer is not None:  # at the end, the whole conversation is sent
            self.progress = self._progress(answer)

    def _progress(self, answer: Message) -> Progress:
        used = self.session.used()
        return Progress(answer.id, self._blocks.update(answer.content), answer.reasoning, used, self._rate)

    def _refuse_while_answering(self) -> None:
        if self.running:
            raise ApiError(409, "an answer is being generated: stop it first", "answering")

    def _fresh(self, work: Callable[[ChatSession], T]) -> T:
        """Run something on the conversation as it is stored now: another program may have changed it."""
        session = self.session
        if not self.running and session.conversation.id:
            session.conversation = session.store.load(session.conversation.id)
            session.records.clear()
        return work(session)

    # ---- watching

    async def events(self) -> AsyncIterator[tuple[str, dict[str, Any]]]:
        """Names and data of events: `chat` = the whole conversation; `answer` = what was generated since the last one.

        The first event is the conversation; it ends with `gone` if the conversation is deleted.
        """
        wake = asyncio.Event()
        self._watchers.add(wake)
        version, sent = -1, None
        try:
            while True:
                wake.clear()
                if version != self.version:
                    version = self.version
                    try:
                        state, sent = await self.read(self._state)
                    except LlmEdgeError as error:
                        yield "gone", {"detail": str(error)}
                        return
                    yield "chat", state
                elif (now := self.progress) is not None and sent is not None and now is not sent:
                    changes = _changes(sent, now)
                    sent = now
                    yield "answer", changes
                elif self.closing and not self.running:
                    return
                else:
                    await wake.wait()
        finally:
            self._watchers.discard(wake)

    def _state(self, session: ChatSession) -> tuple[dict[str, Any], Progress | None]:
        answer = session.answering
        if answer is None:
            return chat_view(session.conversation, session.used(), self.context), None
        progress = self._progress(answer)
        return chat_view(session.conversation, progress.used, self.context, answer.id, progress.blocks), progress

    def close_soon(self) -> None:
        """End the streams of events once no answer is being generated."""
        self.closing = True
        self._wake()

    def _wake(self) -> None:
        for watcher in self._watchers:
            watcher.set()


@contextlib.asynccontextmanager
async def _responder(pool: ModelPool, name: str) -> AsyncIterator[Responder]:
    """The model of this name, which stays available meanwhile."""
    upstream = pool.upstreams.find(name)
    if upstream is not None:
        yield UpstreamResponder(upstream, asyncio.get_running_loop())
        return
    async with pool.use(name) as loaded:
        yield LocalResponder(loaded.engine)


def _changes(before: Progress, now: Progress) -> dict[str, Any]:
    """What a page that shows `before` needs to show `now`."""
    pairs = enumerate(zip(before.blocks, now.blocks, strict=False))
    first = next((n for n, (old, new) in pairs if old != new), min(len(before.blocks), len(now.blocks)))
    start = len(before.reasoning) if now.reasoning.startswith(before.reasoning) else 0
    return {
        "message": now.message,
        "from": first,
        "blocks": now.blocks[first:],
        "reasoning_from": start,
        "reasoning": now.reasoning[start:],
        "used": now.used,
        "rate": round(now.rate, 1),
    }


class LiveChats:
    """The conversations in use.

    Args:
        store: of all conversations.
        pool: the models.
        spawn: runs something in the background.
    """

    def __init__(self, store: Store, pool: ModelPool, spawn: Callable[[Coroutine[Any, Any, None]], None]) -> None:
        self.store = store
        self._pool = pool
        self._spawn = spawn
        self._chats: dict[int, LiveChat] = {}

    @contextlib.contextmanager
    def use(self, number: int) -> Iterator[LiveChat]:
        """A conversation, which stays in memory until nobody uses it and its answer has ended."""
        chat = self._chats.get(number)
        if chat is None:
            chat = self._chats[number] = LiveChat(self.store)
            chat.session.conversation.id = number  # loaded when it is read
        with self._used(chat):
            yield chat

    def running(self) -> set[int]:
        """Ids of the conversations in which an answer is being generated."""
        return {number for number, chat in self._chats.items() if chat.running}

    async def answer(
        self, number: int | None, options: AnswerOptions, begin: Callable[[ChatSession], Message]
    ) -> dict[str, int]:
        """Start an answer, which continues in the background; returns the ids of the conversation and the answer.

        Args:
            number: the conversation; None = a new one.
            options: model and parameters.
            begin: calls a method of the session that starts an answer.

        Raises:
            ApiError, LlmEdgeError: as `LiveChat.answer`.
        """
        loop = asyncio.get_running_loop()
        started: asyncio.Future[dict[str, int]] = loop.create_future()
        with self.use(number) if number is not None else contextlib.nullcontext(LiveChat(self.store)) as chat:
            self._spawn(self._answer(chat, options, begin, started))
            return await asyncio.shield(started)

    async def _answer(
        self,
        chat: LiveChat,
        options: AnswerOptions,
        begin: Callable[[ChatSession], Message],
        started: asyncio.Future[dict[str, int]],
    ) -> None:
        def exists() -> None:
            answer, conversation = chat.session.answering, chat.session.conversation.id
            assert answer is not None
            self._chats.setdefault(conversation, chat)
            started.set_result({"chat": conversation, "message": answer.id})

        with self._used(chat):
            try:
                await chat.answer(self._pool, options, begin, exists)
            except Exception as error:  # noqa: BLE001 (raised by `answer`)
                if started.done():
                    _log.exception("an answer failed", exc_info=error)
                else:
                    started.set_exception(error)

    def end_streams(self) -> None:
        """End the streams of events, with the answers that are being generated."""
        for chat in self._chats.values():
            chat.close_soon()

    async def close(self) -> None:
        """Wait until the answers that the shutdown ended are saved, and close the store."""
        deadline = time.monotonic() + _CLOSE_SECONDS
        while self.running() and time.monotonic() < deadline:
            await asyncio.sleep(_INTERVAL)
        self.store.close()

    @contextlib.contextmanager
    def _used(self, chat: LiveChat) -> Iterator[None]:
        chat.users += 1
        try:
            yield
        finally:
            chat.users -= 1
            if not chat.users:
                self._chats.pop(chat.session.conversation.id, None)
