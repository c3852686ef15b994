"""`RunningAnswer`: an answer while it is generated, read on a thread and saved as it grows."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from llm_edge.chat.figures import figures_of
from llm_edge.chat.history.conversation import Message
from llm_edge.chat.history.store import SAVE_INTERVAL, Store
from llm_edge.chat.responder import Reply, Responder
from llm_edge.chat.stream_reader import StreamReader
from llm_edge.chat.token_records import Recorder, TokenRecord, pack
from llm_edge.runtime.errors import LlmEdgeError
from llm_edge.runtime.results import FinishReason, GenerationChunk
from llm_edge.runtime.sampling.params import SamplingParams


@dataclass(frozen=True, slots=True)
class Update:
    """What a poll found."""

    message: Message  # the answer, which has grown
    ended: bool  # it is complete, cancelled or failed
    error: LlmEdgeError | None = None  # the reason if it failed


class DeferredReply:
    """A reply that is requested when it is iterated, on the reader's thread: encoding a prompt may take seconds."""

    def __init__(self, request: Callable[[], Reply]) -> None:
        self._request = request
        self._reply: Reply | None = None
        self._params: SamplingParams | None = None
        self._cancelled = False
        self._lock = threading.Lock()

    def __iter__(self) -> Iterator[GenerationChunk]:
        reply = self._request()
        with self._lock:
            self._reply = reply
            if self._params is not None:
                reply.adjust(self._params)
            if self._cancelled:
                reply.cancel()
        yield from reply

    def cancel(self) -> None:
        with self._lock:
            self._cancelled = True
            if self._reply is not None:
                self._reply.cancel()

    def adjust(self, params: SamplingParams) -> None:
        with self._lock:
            self._params = params
            if self._reply is not None:
                self._reply.adjust(params)


class RunningAnswer:
    """An answer while it is generated.

    Args:
        message: the answer; grows with each `poll`.
        request: requests the reply; called on the reader's thread, and may set `note`.
        records: of the message's tokens so far; grows too.
        prompt_tokens: estimated number of tokens before the answer.
    """

    def __init__(
        self,
        message: Message,
        request: Callable[[RunningAnswer], Reply],
        responder: Responder,
        records: list[TokenRecord],
        prompt_tokens: int,
        clock: Callable[[], float],
    ) -> None:
        self.message = message
        self.prompt_tokens = prompt_tokens
        self.tokens = 0
        self.note = ""  # shown below the answer once it has ended
        self.save_error: LlmEdgeError | None = None
        self._detail = responder.detail
        self._recorder = Recorder(responder.token_text)
        self._records, self._saved_records = records, len(records)
        self._clock, self._saved_at = clock, clock()
        self._rate_since = (clock(), 0)
        self._reply = DeferredReply(lambda: request(self))
        self._reader = StreamReader(self._reply)

    def cancel(self) -> None:
        """Stop generating; what was generated stays."""
        self._reader.cancel()

    def adjust(self, params: SamplingParams) -> None:
        """Change the parameters of the tokens to come."""
        self._reply.adjust(params)

    def wait(self, seconds: float) -> None:
        """Wait until there is something to poll, at most so many seconds."""
        self._reader.wait(seconds)

    def poll(self, store: Store) -> Update | None:
        """Add what was generated since the last call to the message; None = nothing was."""
        items = self._reader.drain()
        for item in items:
            if isinstance(item, LlmEdgeError):
                self.message.figures["error"] = str(item)
                return self._end(store, item)
            self._add(item)
            if item.finish_reason is not None and item.timings is not None:
                changes = self.message.figures.get("changes")
                self.message.figures = figures_of(item.timings, item.finish_reason, self._detail)
                if changes:
                    self.message.figures["changes"] = changes
                return self._end(store)
        if not items:
            return None
        if self._clock() - self._saved_at >= SAVE_INTERVAL:
            self._saved_at = self._clock()
            self._save(store)
        return Update(self.message, ended=False)

    def finish(self, store: Store) -> None:
        """Cancel, wait for the end, and save what was generated."""
        self.cancel()
        self._reader.join()
        update = self.poll(store)
        if update is None or not update.ended:
            self.message.figures["finish_reason"] = FinishReason.CANCELLED.value
            self._end(store)

    def rate(self) -> float:
        """Tokens per second since the last call."""
        now, (before, count) = self._clock(), self._rate_since
        self._rate_since = (now, self.tokens)
        return (self.tokens - count) / (now - before) if now > before else 0.0

    def _add(self, chunk: GenerationChunk) -> None:
        if chunk.reasoning:
            self.message.reasoning += chunk.text
        else:
            self.message.content += chunk.text
        if chunk.token is not None:
            self.tokens += 1
            if chunk.logprob is not None:
                self._records.append(self._recorder.record(chunk.logprob))

    def _end(self, store: Store, error: LlmEdgeError | None = None) -> Update:
        self.message.finished = True
        if self.note:
            self.message.figures["note"] = self.note
        self._save(store)
        return Update(self.message, ended=True, error=error)

    def _save(self, store: Store) -> None:
        """Save the message; if that fails, generation continues and a note below the answer reports it."""
        try:
            save_answer(store, self.message, self._records[self._saved_records :])
            self._saved_records = len(self._records)
        except LlmEdgeError as error:
            self.save_error = error
            self.message.figures["note"] = f"not saved: {error}"


def save_answer(store: Store, message: Message, new_records: list[TokenRecord]) -> None:
    """Save a message, and the records of its tokens that are not saved yet."""
    store.update(message)
    if new_records:
        store.add_records(message.id, pack(new_records))
