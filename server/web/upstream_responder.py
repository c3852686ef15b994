"""`UpstreamResponder`: a model of an upstream as the page's conversations use it."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import fields
from typing import Any

from llm_edge.runtime.errors import InputError
from llm_edge.runtime.results import FinishReason, GenerationChunk, Timings
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.runtime.text.prompts import Message
from llm_edge.server.errors import ApiError
from llm_edge.server.events import Completed, Event, Finish, ReasoningDelta, TextDelta
from llm_edge.server.request import ChatRequest
from llm_edge.server.running import RunningRequest
from llm_edge.server.upstream import UpstreamModel

_DEFAULTS = SamplingParams()
_TOKEN = 0  # an upstream's tokens are not known; each delta counts as one while the answer is generated


class UpstreamResponder:
    """A `Responder` for a model of an upstream; its replies cannot be adjusted.

    Args:
        model: the model.
        loop: the event loop that its requests run on.
    """

    unsupported: frozenset[str] = frozenset({"logprobs"})
    adjusts = False
    continues_thoughts = False
    context_length: int | None = None
    default_params = _DEFAULTS

    def __init__(self, model: UpstreamModel, loop: asyncio.AbstractEventLoop) -> None:
        self.name = self.settings_key = model.name
        self.detail = "upstream"
        self._model = model
        self._loop = loop

    def answer(
        self,
        messages: Sequence[Message],
        params: SamplingParams,
        *,
        assistant_prefix: str = "",
        reasoning_prefix: str = "",
        template_variables: Mapping[str, Any] | None = None,
    ) -> UpstreamReply:
        """Prepare a request, which is sent when the reply is iterated.

        Raises:
            InputError: the answer is to be continued, which few servers can.
        """
        if assistant_prefix or reasoning_prefix:
            raise InputError("models of upstreams cannot continue an answer: regenerate it")
        values = {each.name: getattr(params, each.name) for each in fields(params)}
        changed = {name: value for name, value in values.items() if value != getattr(_DEFAULTS, name)}
        request = ChatRequest(
            self._model.name,
            [dict(message) for message in messages],
            {name: value for name, value in changed.items() if name not in self.unsupported},
            template_variables=dict(template_variables or {}),
        )
        return UpstreamReply(lambda: self._model.start(request), self._loop)

    def count(self, messages: Sequence[Message]) -> int | None:  # noqa: ARG002 (the tokenizer is not known)
        return None

    def token_text(self, token: int) -> str:
        return f"<{token}>"

    def close(self) -> None:
        """Does nothing: the upstreams belong to the server."""


class UpstreamReply:
    """The `Reply` of an upstream: reads its events on the event loop, for a reader on a thread."""

    def __init__(self, start: Callable[[], Awaitable[RunningRequest]], loop: asyncio.AbstractEventLoop) -> None:
        self._start = start
        self._loop = loop
        self._events: queue.SimpleQueue[Event | None] = queue.SimpleQueue()  # None = the end
        self._lock = threading.Lock()
        self._cancelled = False
        self._reading: Future[None] | None = None

    def cancel(self) -> None:
        """Stop now, and close the connection."""
        with self._lock:
            self._cancelled = True
            if self._reading is not None:
                self._reading.cancel()

    def adjust(self, params: SamplingParams) -> None:
        """Does nothing: the parameters of an answer that has started cannot be changed."""

    def __iter__(self) -> Iterator[GenerationChunk]:
        with self._lock:
            reading = self._reading = asyncio.run_coroutine_threadsafe(self._read(), self._loop)
            if self._cancelled:
                reading.cancel()
        reading.add_done_callback(lambda _: self._events.put(None))
        finish, timings = FinishReason.CANCELLED, Timings(0, 0, 0.0, 0.0, 0.0)
        while (event := self._events.get()) is not None:
            match event:
                case TextDelta(_, text, _):
                    yield GenerationChunk(text, _TOKEN)
                case ReasoningDelta(_, text):
                    yield GenerationChunk(text, _TOKEN, reasoning=True)
                case Completed(_, ended, timings):
                    finish = FinishReason.LENGTH if ended is Finish.LENGTH else FinishReason.STOP
        try:
            reading.result()
        except CancelledError:
            finish = FinishReason.CANCELLED
        except ApiError as error:
            raise InputError(error.message) from error
        yield GenerationChunk("", None, finish, timings)

    async def _read(self) -> None:
        running = await self._start()
        try:
            async for event in running.events():
                self._events.put(event)
        finally:
            await running.close()
