"""`EndpointReply`: converts the chunks of a streamed response to `GenerationChunk`s."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from llm_edge.chat.stream_reader import StreamReader
from llm_edge.chat.text import one_line, printable
from llm_edge.runtime.errors import InputError, LlmEdgeError, MachineError
from llm_edge.runtime.results import FinishReason, GenerationChunk, Timings
from llm_edge.runtime.sampling.logprobs import TokenLogprob
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.runtime.text.holdback import TagSplitter

if TYPE_CHECKING:
    from llm_edge.chat.endpoint.http import OnSocket

MAX_TEXT = 4 << 20  # characters of an answer
_MAX_QUEUED = 512  # chunks read ahead
_MIN_ECHO = 16  # characters; a shorter prefix may be repeated by chance
_MAX_TOKENS = 1 << 31
_MAX_ALTERNATIVES = 20
_USAGE_TIMEOUT = 2.0  # seconds after the answer's end


class Connection:
    """The chunks of one streamed answer; cancelling shuts the socket down, which the endpoint notices."""

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
    """The `Reply` of an endpoint.

    Args:
        stream: opens the stream of chunks, and passes its socket to the callback.
        prefix: start of the answer, which is removed if the endpoint repeats it.
        token_id: returns an id for a token's text; None if there are too many.
        patience: timeout in seconds for a chunk.
    """

    def __init__(
        self,
        stream: Callable[[OnSocket], Generator[Any]],
        params: SamplingParams,
        prefix: str,
        token_id: Callable[[str], int | None],
        patience: float,
    ) -> None:
        self._stream = stream
        self._params = params
        self._begun = bool(prefix)
        self._echo = prefix if len(prefix) >= _MIN_ECHO else ""
        self._token_id = token_id
        self._patience = patience
        self._reader: StreamReader[Any] | None = None
        self._cancelled = False
        self._lock = threading.Lock()

    def cancel(self) -> None:
        """Stop now, and close the connection."""
        with self._lock:
            self._cancelled = True
            if self._reader is not None:
                self._reader.cancel()

    def adjust(self, params: SamplingParams) -> None:
        """Does nothing: endpoints cannot change the parameters of an answer that has started."""

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
            if length > MAX_TEXT:
                raise MachineError("the endpoint's answer has no end: the connection was closed")
            if reasoning or text:
                last = time.perf_counter()
                first = first if tokens else last
            if reasoning:
                tokens += 1
                thought += 1
                thinking = Thinking(False)  # this endpoint separates reasoning itself
                yield self._text_chunk(reasoning, reasoning=True)
            if text:
                for part in self._with_logprobs(text, choice):
                    tokens += 1
                    thought += thinking.inside
                    yield from _separated(part, thinking)
            reason = _reason(getattr(choice, "finish_reason", None)) or reason
            if tokens > 2 * self._params.max_tokens + 64:  # the endpoint ignores the limit
                reason = FinishReason.LENGTH
                break
        if reader.cancelled:
            reason = FinishReason.CANCELLED
        if held:
            tokens += 1
            yield from _separated(self._text_chunk(held), thinking)
        for rest, inside in thinking.flush():
            yield GenerationChunk(rest, None, reasoning=inside)
        if reason is None:
            raise MachineError(_CUT if chunks else _NOTHING)
        total = _count(usage, "completion_tokens") or tokens
        details = getattr(usage, "completion_tokens_details", None)
        cached = _count(getattr(usage, "prompt_tokens_details", None), "cached_tokens")
        timings = Timings(
            prompt_tokens=_count(usage, "prompt_tokens"),
            completion_tokens=total,
            time_to_first_token=first - began,
            prefill_seconds=first - began,
            decode_seconds=last - first,
            reasoning_tokens=min(_count(details, "reasoning_tokens") or thought, total),
            cached_tokens=cached,
        )
        yield GenerationChunk("", None, reason, timings)

    def _next(self, reader: StreamReader[Any], *, ending: bool) -> Any | None:
        """The next chunk; after the end of the answer only usage figures follow, which not every endpoint sends."""
        try:
            return reader.next(_USAGE_TIMEOUT if ending else self._patience)
        except TimeoutError:
            if ending:
                return None
            raise MachineError(f"the endpoint sent nothing for {self._patience:g} seconds: try again") from None

    def _text_chunk(
        self, text: str, *, reasoning: bool = False, logprob: TokenLogprob | None = None
    ) -> GenerationChunk:
        token = logprob.token if logprob is not None else self._token_id(text)
        return GenerationChunk(text, -1 if token is None else token, reasoning=reasoning, logprob=logprob)

    def _without_echo(self, text: str) -> tuple[str, str]:
        """Split text into what may still repeat the prefix, and the rest."""
        if len(text) < len(self._echo) and self._echo.startswith(text):
            return text, ""
        text, self._echo = text.removeprefix(self._echo), ""
        return "", text

    def _with_logprobs(self, text: str, choice: Any) -> Iterator[GenerationChunk]:
        """Yield the text as chunks, one per token if the endpoint reports tokens."""
        logprobs = getattr(choice, "logprobs", None)
        listed = getattr(logprobs, "content", None) if self._params.logprobs is not None else None
        entries = [(entry, made) for entry in _list(listed) if (made := self._logprob(entry))]
        if not entries:
            yield self._text_chunk(text)
            return
        whole = "".join(entry.token for entry, _ in entries) == text
        for number, (entry, made) in enumerate(entries):
            yield self._text_chunk(entry.token if whole else text if number == 0 else "", logprob=made)

    def _logprob(self, entry: Any) -> TokenLogprob | None:
        own = self._ranked(entry)
        if own is None:
            return None
        ranked = [self._ranked(each) for each in _list(getattr(entry, "top_logprobs", None))[:_MAX_ALTERNATIVES]]
        return TokenLogprob(*own, tuple(sorted((each for each in ranked if each), key=lambda each: -each[1])))

    def _ranked(self, entry: Any) -> tuple[int, float] | None:
        token: Any = getattr(entry, "token", None)
        logprob: Any = getattr(entry, "logprob", None)
        if not isinstance(token, str) or type(logprob) not in (int, float) or not -1e9 < logprob <= 1e-3:
            return None
        number = self._token_id(token)
        return None if number is None else (number, float(logprob))


class Thinking:
    """Separates reasoning from the answer, for endpoints that leave it between `<think>` and `</think>`.

    Servers without a reasoning parser do that for DeepSeek-R1, QwQ and many other models. White space around the tags
    is dropped.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.inside = False  # the text to come is reasoning, as far as is known
        self._tags = TagSplitter("<think>", "</think>") if enabled else None
        self._after_tag = False  # nothing but white space since
        self._space = ""  # held back: a tag may follow

    def push(self, text: str) -> Iterator[tuple[str, bool]]:
        """Add text; yields what is final now, and whether it is reasoning."""
        if self._tags is None:
            yield text, False
            return
        first, *others = self._tags.push(text)
        yield from self._section(first)
        for part in others:
            self.inside, self._after_tag, self._space = not self.inside, True, ""
            yield from self._section(part)

    def flush(self) -> Iterator[tuple[str, bool]]:
        """Yield the text that is held back, because no more text follows."""
        held = self._space + (self._tags.flush() if self._tags is not None else "")
        if held:
            yield held, self.inside

    def _section(self, text: str) -> Iterator[tuple[str, bool]]:
        text = self._space + (text.lstrip() if self._after_tag else text)
        final = text.rstrip() if self.inside or not text.strip() else text
        self._space = text[len(final) :]
        if final:
            self._after_tag = False
            yield final, self.inside


def _separated(chunk: GenerationChunk, thinking: Thinking) -> Iterator[GenerationChunk]:
    """Yield a chunk, split if it contains both reasoning and answer."""
    *before, (text, inside) = list(thinking.push(chunk.text)) or [("", thinking.inside)]
    for part, reasoning in before:
        yield GenerationChunk(part, None, reasoning=reasoning)
    yield replace(chunk, text=text, reasoning=inside)


_NOTHING = "the endpoint sent no answer: check the base URL, which usually ends in /v1"
_CUT = "the endpoint's answer was cut off: regenerate or continue it"
_REASONS: Mapping[str, FinishReason] = {
    "stop": FinishReason.STOP,
    "eos": FinishReason.STOP,
    "length": FinishReason.LENGTH,
}


def _reason(value: Any) -> FinishReason | None:
    if not isinstance(value, str) or not value:
        return None
    if value not in _REASONS:
        raise InputError(f"the endpoint ended the answer: {one_line(printable(value), 60)}")
    return _REASONS[value]


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _first(choices: Any) -> Any:
    return next(iter(_list(choices)), None)


def _text(delta: Any, name: str) -> str:
    value = getattr(delta, name, None)
    return value if isinstance(value, str) else ""


def _count(usage: Any, name: str) -> int:
    value = getattr(usage, name, None)
    return value if type(value) is int and 0 <= value < _MAX_TOKENS else 0
