"""`Wire`: requests to an endpoint through the `openai` client, with limits and one-line errors.

Importing this module takes over a second, so it is only imported on threads.
"""

from __future__ import annotations

import json
import re
import socket
import ssl
import threading
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import httpx2
import openai

from llm_edge.chat.text import one_line, printable
from llm_edge.runtime.errors import ContextLengthError, InputError, LlmEdgeError, MachineError

MAX_BYTES = 64 << 20  # of one response
MAX_EVENT = 4 << 20  # bytes without an empty line
_HEADERS = ("accept", "connection", "content-length", "content-type", "host", "user-agent")
_LIST_TIMEOUT = 10.0  # seconds
_MAX_MESSAGE = 300  # characters of a server's error message
_UNREADABLE = (
    ValueError,
    RecursionError,
    TypeError,
    AttributeError,
    KeyError,
)  # what malformed responses make the client raise
_LIMIT = re.compile(r"maximum context length is (\d{1,9}) tokens")
_PROMPT = re.compile(r"(?:resulted in|you requested|at least|contains) (\d{1,9}) (?:input )?tokens")
OnSocket = Callable[[socket.socket], None]


class Wire:
    """Requests to one base URL.

    Each request has its own connection, whose socket is passed to `on_socket`, so that another thread can shut it down
    at any time. Only the necessary headers are sent: the client would add the environment's organization and details
    of the machine. Redirects are not followed.
    `patience` is the timeout in seconds between two chunks.
    """

    def __init__(self, url: str, key: str, patience: float) -> None:
        self._key = key
        self._host = urllib.parse.urlsplit(url).netloc
        self._patience = patience
        self._current = threading.local()
        self._refused: set[str] = set()  # fields that this endpoint rejected
        name = urllib.parse.urlsplit(url).hostname or ""
        self._client = openai.OpenAI(
            api_key="-",  # the key is added to the request last, so that no error can contain it
            base_url=url,
            max_retries=0,
            http_client=openai.DefaultHttpxClient(
                timeout=httpx2.Timeout(patience, connect=min(patience, 10.0)),
                limits=httpx2.Limits(max_keepalive_connections=0),
                follow_redirects=False,
                trust_env=name not in ("localhost", "127.0.0.1", "::1"),  # no proxy for this machine
                event_hooks={"request": [self._prepare], "response": [_bound]},
            ),
        )

    def models(self, limit: int) -> list[dict[str, Any]]:
        """The endpoint's models as JSON objects with an `id`; empty if it does not list them.

        Raises:
            InputError, MachineError: the endpoint cannot be reached, or rejects the key.
        """
        try:
            listed = self._client.get(
                "/models", cast_to=object, options={"timeout": min(self._patience, _LIST_TIMEOUT)}
            )
        except (openai.NotFoundError, openai.APIResponseValidationError):
            return []
        except openai.APIStatusError as error:
            if error.status_code in (405, 501):
                return []
            raise self.error_for(error) from None
        except (openai.OpenAIError, LlmEdgeError, *_UNREADABLE) as error:
            raise self.error_for(error) from None
        found = listed.get("data") if isinstance(listed, dict) else None
        known = [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []
        return [each for each in known if isinstance(each.get("id"), str) and 0 < len(each["id"]) <= _MAX_MESSAGE][
            :limit
        ]

    def stream(self, body: Mapping[str, Any], on_socket: OnSocket) -> Iterator[Any]:
        """Yield the chunks of an answer.

        Raises:
            InputError, MachineError: the request failed.
        """
        self._current.on_socket = on_socket
        try:
            with self._open(dict(body)) as chunks:
                yield from chunks
        except (openai.OpenAIError, httpx2.HTTPError, LlmEdgeError, OSError, *_UNREADABLE) as error:
            raise self.error_for(error) from None

    def close(self) -> None:
        """Close the client."""
        self._client.close()

    def _open(self, body: dict[str, Any]) -> openai.Stream[Any]:
        for name in self._refused:
            _without(body, name)
        while True:
            try:
                made: openai.Stream[Any] = self._client.chat.completions.create(**body, stream=True)
            except (openai.BadRequestError, openai.UnprocessableEntityError) as error:
                refused = _refused_field(body, f"{error.param} {error.message}")
                if refused is None:
                    raise
                self._refused.add(refused)
                _without(body, refused)
            else:
                return made

    def _prepare(self, request: httpx2.Request) -> None:
        for name in [each for each in request.headers if each.lower() not in _HEADERS]:
            del request.headers[name]
        request.headers["accept-encoding"] = "identity"
        if self._key:
            request.headers["authorization"] = f"Bearer {self._key}"
        on_socket = getattr(self._current, "on_socket", None)
        if on_socket is not None:

            def trace(event: str, info: Mapping[str, Any]) -> None:
                if event.endswith(("connect_tcp.complete", "start_tls.complete")):
                    found = info["return_value"].get_extra_info("socket")
                    if isinstance(found, socket.socket):
                        on_socket(found)

            request.extensions = {**request.extensions, "trace": trace}

    def error_for(self, error: BaseException) -> LlmEdgeError:
        """The error to raise for an exception of the client; it never contains the key."""
        reason = next((each for each in _causes(error) if isinstance(each, LlmEdgeError)), None)
        if reason is not None:
            return reason
        if isinstance(error, openai.APITimeoutError):
            return MachineError(f"{self._host} timed out: try again, or check whether it is overloaded")
        if isinstance(error, openai.APIStatusError):
            return self._status_error(error)
        if isinstance(error, openai.APIConnectionError | httpx2.HTTPError | OSError):
            return self._unreachable(error)
        if isinstance(error, openai.APIError):
            return MachineError(f"{self._host} aborted the answer: {self._words(error)}")
        return MachineError(f"{self._host} sent an invalid response: check the base URL")

    def _status_error(self, error: openai.APIStatusError) -> LlmEdgeError:
        status, words = error.status_code, self._words(error)
        if status in (400, 413, 422) and (counts := _overflow(error)):
            return ContextLengthError(*counts)
        if status in (401, 403):
            with_key = "rejects the API key" if self._key else "requires an API key"
            return InputError(f"{self._host} {with_key} ({status}): {words}")
        if status == 404:
            return InputError(
                f"{self._host} has no such path or model (404): check the base URL, which usually ends in /v1, "
                f"and the model: {words}"
            )
        if status == 429:
            return InputError(f"{self._host}: rate limit or quota reached (429): {words}")
        if 300 <= status < 400:
            where = self._clean(error.response.headers.get("location", "elsewhere"))
            return InputError(f"{self._host} redirects to {where}: use that as the base URL if you trust it")
        if status < 500:
            return InputError(f"{self._host} rejects the request ({status}): {words}")
        return MachineError(f"{self._host} failed ({status}): {words}")

    def _unreachable(self, error: BaseException) -> LlmEdgeError:
        for each in _causes(error):
            if isinstance(each, ConnectionRefusedError):
                return InputError(
                    f"{self._host} refused the connection: check that the server is running, and the port"
                )
            if isinstance(each, socket.gaierror):
                return InputError(f"{self._host}: unknown host name: check the base URL")
            if isinstance(each, ssl.SSLError):
                return InputError(f"{self._host}: no secure connection ({self._clean(each.reason or str(each))})")
        cause = self._clean(str(list(_causes(error))[-1]))
        return MachineError(f"the connection to {self._host} failed ({cause}): try again")

    def _words(self, error: openai.APIError) -> str:
        """The error message of a server."""
        body = error.body
        if isinstance(body, dict):
            inner = body.get("error", body)
            said = inner.get("message") or inner.get("detail") if isinstance(inner, dict) else inner
            body = said if isinstance(said, str) else json.dumps(body, default=str)[:_MAX_MESSAGE]
        return self._clean(body if isinstance(body, str) and body.strip() else error.message)

    def _clean(self, text: str) -> str:
        text = one_line(printable(text[: 8 * _MAX_MESSAGE]), _MAX_MESSAGE)
        return text.replace(self._key, "[the key]") if self._key else text


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and its causes."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__


def _refused_field(body: Mapping[str, Any], message: str) -> str | None:
    """A field that an endpoint rejects and that can be renamed or omitted; None = there is none."""
    if "max_tokens" in body and "max_completion_tokens" in message:
        return "max_tokens"
    idle = {"temperature": 1.0, "top_p": 1.0}
    for name in ("stream_options", *idle):
        if name in body and name in message and body[name] == idle.get(name, body[name]):
            return name
    return None


def _overflow(error: openai.APIError) -> tuple[int, int] | None:
    """The lengths of the prompt and the context in tokens, if an error says that the prompt is too long.

    llama.cpp reports them in fields, OpenAI and vLLM in the message. An unknown prompt length counts as one too many.
    """
    body = error.body if isinstance(error.body, dict) else {}
    limit, prompt = body.get("n_ctx"), body.get("n_prompt_tokens")
    if found := _LIMIT.search(error.message[:2000]):
        limit = int(found[1])
        counted = _PROMPT.search(error.message[:2000])
        prompt = int(counted[1]) if counted else None
    if type(limit) is not int or limit < 1:
        return None
    return (prompt if type(prompt) is int and prompt > limit else limit + 1), limit


def _without(body: dict[str, Any], name: str) -> None:
    value = body.pop(name, None)
    if name == "max_tokens" and value is not None:
        body["max_completion_tokens"] = value


def _bound(response: httpx2.Response) -> None:
    """Limit the size of a response; compressed ones are refused."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise InputError("the endpoint compresses its answers without being asked: check the base URL")
    assert isinstance(response.stream, httpx2.SyncByteStream)
    response.stream = _Bounded(response.stream)


class _Bounded(httpx2.SyncByteStream):
    """A stream that raises MachineError once it is larger than any answer."""

    def __init__(self, stream: httpx2.SyncByteStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        total = event = 0
        for data in self._stream:
            total += len(data)
            end = max(data.rfind(b"\n\n"), data.rfind(b"\r\n\r\n"), data.rfind(b"\r\r"))
            event = len(data) - end if end >= 0 else event + len(data)
            if total > MAX_BYTES or event > MAX_EVENT:
                raise MachineError("the endpoint sent too much data: the connection was closed")
            yield data

    def close(self) -> None:
        self._stream.close()
