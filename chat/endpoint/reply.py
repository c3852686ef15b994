"""An answer of an endpoint on its way: chunks off the network become pieces. Knows no widgets."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llm_edge.chat.endpoint.thinking import Thinking
from llm_edge.chat.stream_reader import StreamReader
from llm_edge.chat.text import one_line, printable
from llm_edge.runtime.errors import InputError, LlmEdgeError, MachineError
from llm_edge.runtime.results import FinishReason, GenerationChunk, Timings
from llm_edge.runtime.sampling.logprobs import TokenLogprob
from llm_edge.runtime.sampling.params import SamplingParams

if TYPE_CHECKING:
    from llm_edge.chat.endpoint.http import OnSocket

MOST_TEXT = 4 << 20  # characters of an answer
_MAX_QUEUED = 512  # chunks read ahead
_ECHO = 16  # characters: what is shorter may well be said again
_MOST_TOKENS = 1 << 31
_RUNNERS_UP = 20
_AFTERWARDS = 2.0  # seconds


class Connection:
    """The chunks of one streamed answer; cancelling shuts the socket down, which the endpoint notices.

    Args:
        stream: opens the stream, and passes its socket to the callback.
    """

    def __init__(self, stream: Callable[[OnSocket], Generator[Any]]) -> None:
        self._stream = stream
        self._cancelled = False
        self._socket: socket.socket | None = None
        self._lock = threading.Lock()

    def cancel(self) -> None:
        """End the stream now."""
        with self._lock:
            self._cancelled = True
            self._shut_down()

    def __iter__(self) -> Iterator[Any]:
        try:
            with contextlib.closing(self._stream(self._on_socket)) as chunks:
                for chunk in chunks:
                    if self._cancelled:
                        return
                    yield chunk
        except LlmEdgeError:
            raise
        except Exception as error:  # whatever an untrusted stream makes the client raise
            raise MachineError(f"the endpoint's answer could not be read ({type(error).__name__})") from error
        finally:
            self._socket = None

    def _on_socket(self, found: socket.socket) -> None:
        with self._lock:
            self._socket = found
            if self._cancelled:
                self._shut_down()

    def _shut_down(self) -> None:
        if self._socket is not None:
            with contextlib.suppress(OSError):
                socket.socket.shutdown(self._socket, socket.SHUT_RDWR)  # unlike closing, this wakes a blocked reader


class EndpointReply:
    """See `Reply`.

    Args:
        stream: gives the chunks, and tells of the socket they come through.
        params: how many tokens there may be.
        begin: what is continued; where the endpoint repeats it first, that is left out.
        number: gives an id for a token's text; None where there are too many.
        patience: seconds to wait for a chunk.
    """

    def __init__(
        self,
        stream: Callable[[OnSocket], Generator[Any]],
        params: SamplingParams,
        begin: str,
        number: Callable[[str], int | None],
        patience: float,
    ) -> None:
        self._stream = stream
        self._params = params
        self._begun = bool(begin)
        self._echo = begin if len(begin) >= _ECHO else ""
        self._number = number
        self._patience = patience
        self._reader: StreamReader[Any] | None = None
        self._cancelled = False
        self._lock = threading.Lock()

    def cancel(self) -> None:
        """See `Reply`."""
        with self._lock:
            self._cancelled = True
            if self._reader is not None:
                self._reader.cancel()

    def adjust(self, params: SamplingParams) -> None:
        """See `Reply`: an endpoint cannot be told anything once it answers."""

    def __iter__(self) -> Iterator[GenerationChunk]:
        with self._lock:
            if self._cancelled:
                yield GenerationChunk("", None, FinishReason.CANCELLED, Timings(0, 0, 0.0, 0.0, 0.0))
                return
            reader = self._reader = StreamReader(Connection(self._stream), _MAX_QUEUED)
        try:
            yield from self._chunks(reader)
        finally:
            reader.cancel()

    def _chunks(self, reader: StreamReader[Any]) -> Iterator[GenerationChunk]:
        began = first = last = time.perf_counter()
        chunks = tokens = thought = length = 0
        thinking = Thinking(not self._begun)
        reason: FinishReason | None = None
        usage: Any = None
        held = ""
        while (chunk := self._next(reader, ending=reason is not None)) is not None:
            usage = getattr(chunk, "usage", None) or usage
            choice = _first(getattr(chunk, "choices", None))
            chunks += 1
            if choice is None:
                continue
            delta = getattr(choice, "delta", None)
            reasoning, text = _text(delta, "reasoning_content") or _text(delta, "reasoning"), _text(delta, "content")
            if self._echo and text:
                held, text = self._without_echo(held + text)
            length += len(reasoning) + len(text)
            if length > MOST_TEXT:
                raise MachineError("the endpoint does not come to an end: the connection was cut")
            if reasoning or text:
                last = time.perf_counter()
                first = first if tokens else last
            if reasoning:
                tokens += 1
                thought += 1
                thinking = Thinking(False)  # this endpoint tells it apart by itself
                yield self._piece(reasoning, reasoning=True)
            if text:
                for piece in self._with_logprobs(text, choice):
                    tokens += 1
                    thought += thinking.inside
                    yield from _apart(piece, thinking)
            reason = _reason(getattr(choice, "finish_reason", None)) or reason
            if tokens > 2 * self._params.max_tokens + 64:  # it was told the limit, and passes over it
                reason = FinishReason.LENGTH
                break
        if reader.cancelled:
            reason = FinishReason.CANCELLED
        if held:
            tokens += 1
            yield from _apart(self._piece(held), thinking)
        for rest, inside in thinking.flush():
            yield GenerationChunk(rest, None, reasoning=inside)
        if reason is None:
            raise MachineError(_CUT if chunks else _NOTHING)
        told = _count(usage, "completion_tokens") or tokens
        details = getattr(usage, "completion_tokens_details", None)
        cached = _count(getattr(usage, "prompt_tokens_details", None), "cached_tokens")
        timings = Timings(
            prompt_tokens=_count(usage, "prompt_tokens"),
            completion_tokens=told,
            time_to_first_token=first - began,
            prefill_seconds=first - began,
            decode_seconds=last - first,
            reasoning_tokens=min(_count(details, "reasoning_tokens") or thought, told),
            cached_tokens=cached,
        )
        yield GenerationChunk("", None, reason, timings)

    def _next(self, reader: StreamReader[Any], *, ending: bool) -> Any | None:
        """The next chunk; behind the end of the answer only figures can follow, and not every endpoint sends them."""
        try:
            return reader.next(_AFTERWARDS if ending else self._patience)
        except TimeoutError:
            if ending:
                return None
            raise MachineError(f"the endpoint has sent nothing for {self._patience:g} seconds: try again") from None

    def _piece(self, text: str, *, reasoning: bool = False, logprob: TokenLogprob | None = None) -> GenerationChunk:
        token = logprob.token if logprob is not None else self._number(text)
        return GenerationChunk(text, -1 if token is None else token, reasoning=reasoning, logprob=logprob)

    def _without_echo(self, text: str) -> tuple[str, str]:
        """What may still be an echo of what is continued, and what is none."""
        if len(text) < len(self._echo) and self._echo.startswith(text):
            return text, ""
        text, self._echo = text.removeprefix(self._echo), ""
        return "", text

    def _with_logprobs(self, text: str, choice: Any) -> Iterator[GenerationChunk]:
        """A text as pieces, one for each token where the endpoint tells its tokens."""
        logprobs = getattr(choice, "logprobs", None)
        listed = getattr(logprobs, "content", None) if self._params.logprobs is not None else None
        entries = [(entry, made) for entry in _list(listed) if (made := self._logprob(entry))]
        if not entries:
            yield self._piece(text)
            return
        whole = "".join(entry.token for entry, _ in entries) == text
        for number, (entry, made) in enumerate(entries):
            yield self._piece(entry.token if whole else text if number == 0 else "", logprob=made)

    def _logprob(self, entry: Any) -> TokenLogprob | None:
        own = self._ranked(entry)
        if own is None:
            return None
        ranked = [self._ranked(each) for each in _list(getattr(entry, "top_logprobs", None))[:_RUNNERS_UP]]
        return TokenLogprob(*own, tuple(sorted((each for each in ranked if each), key=lambda each: -each[1])))

    def _ranked(self, entry: Any) -> tuple[int, float] | None:
        token: Any = getattr(entry, "token", None)
        logprob: Any = getattr(entry, "logprob", None)
        if not isinstance(token, str) or type(logprob) not in (int, float) or not -1e9 < logprob <= 1e-3:
            return None
        number = self._number(token)
        return None if number is None else (number, float(logprob))


def _apart(piece: GenerationChunk, thinking: Thinking) -> Iterator[GenerationChunk]:
    """A piece, and others before it where it holds reasoning and answer."""
    *before, (text, inside) = list(thinking.push(piece.text)) or [("", thinking.inside)]
    for part, reasoning in before:
        yield GenerationChunk(part, None, reasoning=reasoning)
    yield replace(piece, text=text, reasoning=inside)


_NOTHING = "the endpoint sent no answer: is the base URL right? It usually ends in /v1"
_CUT = "the endpoint's answer broke off in the middle: make it again, or continue it"
_REASONS: Mapping[str, FinishReason] = {
    "stop": FinishReason.STOP,
    "eos": FinishReason.STOP,
    "length": FinishReason.LENGTH,
}


def _reason(told: Any) -> FinishReason | None:
    if not isinstance(told, str) or not told:
        return None
    if told not in _REASONS:
        raise InputError(f"the endpoint ended the answer: {one_line(printable(told), 60)}")
    return _REASONS[told]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _first(choices: Any) -> Any:
    return next(iter(_list(choices)), None)


def _text(delta: Any, name: str) -> str:
    value = getattr(delta, name, None)
    return value if isinstance(value, str) else ""


def _count(usage: Any, name: str) -> int:
    value = getattr(usage, name, None)
    return value if type(value) is int and 0 <= value < _MOST_TOKENS else 0
