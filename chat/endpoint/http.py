"""The network side of an endpoint: requests through the `openai` client, bounded, and its errors in one line.

Loading this module takes over a second, so it is imported on threads alone. Knows nothing of chats.
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

MOST_BYTES = 64 << 20  # of one response
MOST_EVENT = 4 << 20  # bytes without an empty line
_HEADERS = ("accept", "connection", "content-length", "content-type", "host", "user-agent")
_LOOK_UP = 10.0  # seconds: somebody waits for this, and it takes no model
_LONGEST = 300  # characters of a server's own words
_UNREADABLE = (ValueError, RecursionError, TypeError, AttributeError, KeyError)  # what nonsense makes of the client
_LIMIT = re.compile(r"maximum context length is (\d{1,9}) tokens")
_PROMPT = re.compile(r"(?:resulted in|you requested|at least|contains) (\d{1,9}) (?:input )?tokens")
OnSocket = Callable[[socket.socket], None]


class Wire:
    """Requests to one base URL.

    A request has a connection of its own, which `on_socket` is told, so that it can be cut from another thread at any
    time. No header leaves but those that are needed: the client would also send what the environment says of an
    organization, and facts about the machine. Redirections are not followed.

    Args:
        url: the base.
        key: the key itself; "" = none.
        patience: seconds between two signs of life.
    """

    def __init__(self, url: str, key: str, patience: float) -> None:
        self._key = key
        self._host = urllib.parse.urlsplit(url).netloc
        self._patience = patience
        self._current = threading.local()
        self._refused: set[str] = set()  # fields that this endpoint was found not to take
        name = urllib.parse.urlsplit(url).hostname or ""
        self._client = openai.OpenAI(
            api_key="-",  # the key itself joins the request last of all, and is in nothing that could be shown
            base_url=url,
            max_retries=0,
            http_client=openai.DefaultHttpxClient(
                timeout=httpx2.Timeout(patience, connect=min(patience, 10.0)),
                limits=httpx2.Limits(max_keepalive_connections=0),
                follow_redirects=False,
                trust_env=name not in ("localhost", "127.0.0.1", "::1"),  # no proxy leads to this machine itself
                event_hooks={"request": [self._prepare], "response": [_bound]},
            ),
        )

    def models(self, most: int) -> list[dict[str, Any]]:
        """What the endpoint says of its models, each with a text at `id`; nothing where it offers no list.

        Raises:
            InputError, MachineError: it cannot be reached, or refuses the key.
        """
        try:
            listed = self._client.get("/models", cast_to=object, options={"timeout": min(self._patience, _LOOK_UP)})
        except (openai.NotFoundError, openai.APIResponseValidationError):
            return []
        except openai.APIStatusError as error:
            if error.status_code in (405, 501):
                return []
            raise self.told(error) from None
        except (openai.OpenAIError, LlmEdgeError, *_UNREADABLE) as error:
            raise self.told(error) from None
        found = listed.get("data") if isinstance(listed, dict) else None
        known = [each for each in found if isinstance(each, dict)] if isinstance(found, list) else []
        return [each for each in known if isinstance(each.get("id"), str) and 0 < len(each["id"]) <= _LONGEST][:most]

    def stream(self, body: Mapping[str, Any], on_socket: OnSocket) -> Iterator[Any]:
        """The chunks of an answer.

        Raises:
            InputError, MachineError: whatever goes wrong.
        """
        self._current.on_socket = on_socket
        try:
            with self._open(dict(body)) as chunks:
                yield from chunks
        except (openai.OpenAIError, httpx2.HTTPError, LlmEdgeError, OSError, *_UNREADABLE) as error:
            raise self.told(error) from None

    def close(self) -> None:
        """End it."""
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

            def trace(event: str, told: Mapping[str, Any]) -> None:
                if event.endswith(("connect_tcp.complete", "start_tls.complete")):
                    found = told["return_value"].get_extra_info("socket")
                    if isinstance(found, socket.socket):
                        on_socket(found)

            request.extensions = {**request.extensions, "trace": trace}

    def told(self, error: BaseException) -> LlmEdgeError:
        """An error of ours for whatever went wrong, without the key."""
        reason = next((each for each in _causes(error) if isinstance(each, LlmEdgeError)), None)
        if reason is not None:
            return reason
        if isinstance(error, openai.APITimeoutError):
            return MachineError(f"{self._host} was silent for too long: try again, or see whether it is overloaded")
        if isinstance(error, openai.APIStatusError):
            return self._refusal(error)
        if isinstance(error, openai.APIConnectionError | httpx2.HTTPError | OSError):
            return self._unreachable(error)
        if isinstance(error, openai.APIError):
            return MachineError(f"{self._host} broke the answer off: {self._words(error)}")
        return MachineError(f"{self._host} sent something that is no answer: is the base URL right?")

    def _refusal(self, error: openai.APIStatusError) -> LlmEdgeError:
        status, words = error.status_code, self._words(error)
        if status in (400, 413, 422) and (counts := _overflow(error)):
            return ContextLengthError(*counts)
        if status in (401, 403):
            with_key = "refuses the key" if self._key else "wants a key"
            return InputError(f"{self._host} {with_key} ({status}): {words}")
        if status == 404:
            return InputError(
                f"{self._host} knows no such address or model (404): check the base URL, which usually ends in /v1, "
                f"and the model: {words}"
            )
        if status == 429:
            return InputError(f"{self._host} takes no more requests for now (429): {words}")
        if 300 <= status < 400:
            where = self._clean(error.response.headers.get("location", "elsewhere"))
            return InputError(f"{self._host} redirects to {where}: give that as the base URL if you trust it")
        if status < 500:
            return InputError(f"{self._host} refuses the request ({status}): {words}")
        return MachineError(f"{self._host} failed ({status}): {words}")

    def _unreachable(self, error: BaseException) -> LlmEdgeError:
        for each in _causes(error):
            if isinstance(each, ConnectionRefusedError):
                return InputError(f"{self._host} refuses the connection: is the server running, and is the port right?")
            if isinstance(each, socket.gaierror):
                return InputError(f"{self._host}: no machine of this name is known")
            if isinstance(each, ssl.SSLError):
                return InputError(f"{self._host}: no safe connection ({self._clean(each.reason or str(each))})")
        cause = self._clean(str(list(_causes(error))[-1]))
        return MachineError(f"the connection to {self._host} broke off ({cause}): try again")

    def _words(self, error: openai.APIError) -> str:
        """A server's own words."""
        body = error.body
        if isinstance(body, dict):
            inner = body.get("error", body)
            said = inner.get("message") or inner.get("detail") if isinstance(inner, dict) else inner
            body = said if isinstance(said, str) else json.dumps(body, default=str)[:_LONGEST]
        return self._clean(body if isinstance(body, str) and body.strip() else error.message)

    def _clean(self, text: str) -> str:
        text = one_line(printable(text[: 8 * _LONGEST]), _LONGEST)
        return text.replace(self._key, "[the key]") if self._key else text


def _causes(error: BaseException) -> Iterator[BaseException]:
    """An error and what led to it, the nearest first."""
    seen: set[int] = set()
    following: BaseException | None = error
    while following is not None and id(following) not in seen:
        seen.add(id(following))
        yield following
        following = following.__cause__ or following.__context__


def _refused_field(body: Mapping[str, Any], complaint: str) -> str | None:
    """A field that an endpoint complains of, and that can go: it has another name there, or says nothing of its own."""
    if "max_tokens" in body and "max_completion_tokens" in complaint:
        return "max_tokens"
    idle = {"temperature": 1.0, "top_p": 1.0}
    for name in ("stream_options", *idle):
        if name in body and name in complaint and body[name] == idle.get(name, body[name]):
            return name
    return None


def _overflow(error: openai.APIError) -> tuple[int, int] | None:
    """Tokens of the prompt and of the context, where an endpoint says that the one is longer than the other.

    llama.cpp has them as fields, OpenAI and vLLM in a sentence; a prompt that is not counted is one too long.
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
    """Let no response be larger than we can hold, however it is packed."""
    if response.headers.get("content-encoding", "identity") != "identity":
        raise InputError("the endpoint packs its answers, which was not asked for: is the base URL right?")
    assert isinstance(response.stream, httpx2.SyncByteStream)
    response.stream = _Bounded(response.stream)


class _Bounded(httpx2.SyncByteStream):
    """A stream that ends with an error once it is larger than any answer."""

    def __init__(self, stream: httpx2.SyncByteStream) -> None:
        self._stream = stream

    def __iter__(self) -> Iterator[bytes]:
        total = event = 0
        for data in self._stream:
            total += len(data)
            end = max(data.rfind(b"\n\n"), data.rfind(b"\r\n\r\n"), data.rfind(b"\r\r"))
            event = len(data) - end if end >= 0 else event + len(data)
            if total > MOST_BYTES or event > MOST_EVENT:
                raise MachineError("the endpoint sends more than any answer takes: the connection was cut")
            yield data

    def close(self) -> None:
        self._stream.close()
