"""`Guard`: ASGI middleware that checks the host, origin, key and size of every request before a handler runs."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
from collections.abc import Awaitable, Callable, MutableMapping
from typing import Any
from urllib.parse import urlsplit

from starlette.exceptions import HTTPException

from llm_edge.server.config import LOOPBACK, ServerConfig

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_SAFE = ("GET", "HEAD", "OPTIONS")
_PUBLIC = ("/", "/health", "/favicon.svg", "/favicon.ico")  # answered without a key; they reveal nothing
_PUBLIC_PREFIX = "/static/"
_UPLOAD_PATHS = ("/models/jobs", "/models/upload")  # their bodies are written to disk as they arrive
_LARGER_BODIES = {"/ui/api/import": 2 << 30}  # written to disk as they arrive


class _TooLargeError(HTTPException):
    """Raised by `receive`; FastAPI lets only HTTP exceptions through."""


class Guard:
    """Refuses requests from foreign pages, without a valid key, or with too large a body.

    A foreign Host header means that a page's name was rebound to this address; a foreign Origin, that another site's
    page sends the request.
    """

    def __init__(self, app: App, config: ServerConfig) -> None:
        self._app = app
        self._config = config
        self._digests = [_digest(key) for key in config.api_keys]
        names = {*LOOPBACK, config.host.strip("[]").lower(), *(host.lower() for host in config.allowed_hosts)}
        self._hosts = frozenset(names)
        self._any_host = config.host in ("0.0.0.0", "::")  # noqa: S104 (compared, not bound)
        self._origins = frozenset(origin.rstrip("/").lower() for origin in config.allowed_origins)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        origin = headers.get("origin")
        if not self._host_allowed(headers.get("host", "")):
            await _refuse(send, 400, "the Host header names another host: add it with --allowed-host", "invalid_host")
            return
        foreign = origin is not None and not self._same_origin(origin, headers.get("host", ""))
        if foreign and not self._origin_allowed(origin or ""):
            if scope["method"] not in _SAFE or scope["method"] == "OPTIONS":
                await _refuse(send, 403, "requests from pages of other sites are not allowed", "invalid_origin")
                return
            foreign = False  # readable only by pages of the same origin, since there is no CORS header
        if scope["method"] == "OPTIONS":
            await _answer(send, 204, [*self._cors(origin if foreign else None), (b"content-length", b"0")], b"")
            return
        if not self._public(scope) and not self._authorized(headers):
            await _refuse(send, 401, "a valid API key is needed: send Authorization: Bearer KEY", "invalid_api_key")
            return
        scope = _as_json(scope, headers.get("content-type", ""))
        await self._bounded(scope, receive, self._with_headers(send, origin if foreign else None), headers)

    def _host_allowed(self, host: str) -> bool:
        name = _host_name(host)
        if name in self._hosts:
            return True
        return self._any_host and _is_address(name)

    def _same_origin(self, origin: str, host: str) -> bool:
        return urlsplit(origin).netloc.lower() == host.lower()

    def _origin_allowed(self, origin: str) -> bool:
        return "*" in self._origins or origin.rstrip("/").lower() in self._origins

    def _public(self, scope: Scope) -> bool:
        path: str = scope["path"]
        return path in _PUBLIC or path.startswith(_PUBLIC_PREFIX)

    def _authorized(self, headers: MutableMapping[str, str]) -> bool:
        """Whether a request carries a key, as `Authorization: Bearer` or `X-Api-Key`; in constant time."""
        if not self._digests:
            return True
        scheme, _, token = headers.get("authorization", "").partition(" ")
        given = token.strip() if scheme.lower() == "bearer" else headers.get("x-api-key", "").strip()
        digest = _digest(given)
        matches = [hmac.compare_digest(digest, known) for known in self._digests]  # all of them, always
        return any(matches)

    def _cors(self, origin: str | None) -> list[tuple[bytes, bytes]]:
        if origin is None:
            return []
        return [
            (b"access-control-allow-origin", origin.encode("latin-1")),
            (b"access-control-allow-methods", b"GET, POST, PUT, PATCH, DELETE, OPTIONS"),
            (b"access-control-allow-headers", b"authorization, content-type, x-api-key, anthropic-version"),
            (b"vary", b"Origin"),
        ]

    def _with_headers(self, send: Send, origin: str | None) -> Send:
        extra = [*self._cors(origin), (b"x-content-type-options", b"nosniff"), (b"referrer-policy", b"no-referrer")]

        async def sender(message: Message) -> None:
            if message["type"] == "http.response.start":
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            await send(message)

        return sender

    def _limit(self, path: str, content_type: str) -> int:
        """Bytes that the body of a request may have."""
        if path in _UPLOAD_PATHS and self._config.jobs.uploads and content_type.startswith("multipart/"):
            return self._config.jobs.max_upload
        return _LARGER_BODIES.get(path, self._config.max_body)

    async def _bounded(self, scope: Scope, receive: Receive, send: Send, headers: MutableMapping[str, str]) -> None:
        """Run the application, which cannot receive more than the limit."""
        limit = self._limit(scope["path"], headers.get("content-type", ""))
        length = headers.get("content-length", "0")
        if not (length.isascii() and length.isdigit()) or int(length) > limit:
            await _refuse(send, 413, f"the body is larger than {limit:,} bytes", "body_too_large", close=True)
            return
        received, started = 0, False

        async def receiver() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > limit:
                raise _TooLargeError(413, f"the body is larger than {limit:,} bytes")
            return message

        async def sender(message: Message) -> None:
            nonlocal started
            started = True
            await send(message)

        try:
            await self._app(scope, receiver, sender)
        except _TooLargeError:
            if not started:
                await _refuse(send, 413, f"the body is larger than {limit:,} bytes", "body_too_large", close=True)
        except asyncio.CancelledError:  # by uvicorn at the end of a shutdown; it would log a traceback
            if not started:
                await _refuse(send, 503, "the server is shutting down", "shutting_down", close=True)


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def _host_name(host: str) -> str:
    """The name in a Host header, without the port and the brackets of IPv6 addresses."""
    host = host.lower()
    if host.startswith("["):
        return host[1:].partition("]")[0]
    return host.partition(":")[0]


def _is_address(name: str) -> bool:
    """Whether this is an IP address: no name can be rebound to it."""
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def _as_json(scope: Scope, content_type: str) -> Scope:
    """The scope with the content type of JSON, which curl does not send by itself; uploads keep theirs."""
    if scope["method"] not in ("POST", "PUT", "PATCH") or content_type.startswith("multipart/"):
        return scope
    kept = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
    return {**scope, "headers": [*kept, (b"content-type", b"application/json")]}


async def _refuse(send: Send, status: int, message: str, code: str, *, close: bool = False) -> None:
    kind = "authentication_error" if status == 401 else "invalid_request_error"
    error = {"message": message, "type": kind, "param": None, "code": code}
    body = json.dumps({"error": error, "detail": message}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    if status == 401:
        headers.append((b"www-authenticate", b"Bearer"))
    if close:
        headers.append((b"connection", b"close"))
    await _answer(send, status, headers, body)


async def _answer(send: Send, status: int, headers: list[tuple[bytes, bytes]], body: bytes) -> None:
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
