"""`AccessLog`: ASGI middleware that logs a line for each request."""

from __future__ import annotations

import logging
import time
from urllib.parse import quote

from llm_edge.server.guard import App, Message, Receive, Scope, Send

_log = logging.getLogger("llm_edge.access")


class AccessLog:
    """Logs client, method, path, status, bytes and seconds once a response has ended; never queries, headers or bodies.

    The status of a response that was never begun, because the client left or the handler failed, is `-`.
    """

    def __init__(self, app: App) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began, status, size = time.perf_counter(), "-", 0

        async def sender(message: Message) -> None:
            nonlocal status, size
            if message["type"] == "http.response.start":
                status = str(message["status"])
            size += len(message.get("body", b""))
            await send(message)

        try:
            await self._app(scope, receive, sender)
        finally:
            client = (scope.get("client") or ("-",))[0]
            path = quote(scope["path"], safe="/:@-._~")  # no control characters
            seconds = time.perf_counter() - began
            _log.info("%s %s %s %s %d B %.3f s", client, scope["method"], path[:200], status, size, seconds)
