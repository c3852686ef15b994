"""Server-sent events and NDJSON: the bytes of streamed responses, and requests whose client has left."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from llm_edge.server.errors import ApiError, api_error

T = TypeVar("T")
_CLIENT_CLOSED = 499  # nginx's status for a client that left; nobody reads it
_ENCODER = json.JSONEncoder(ensure_ascii=False, allow_nan=False, separators=(",", ":"))  # json.dumps would make one
DONE = b"data: [DONE]\n\n"
_KEEPALIVE = b": keepalive\n\n"
_HEADERS = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would collect the events


def dumps(value: Any) -> str:
    """Compact JSON."""
    return _ENCODER.encode(value)


def sse(value: Any, event: str | None = None) -> bytes:
    """A server-sent event whose data is JSON."""
    head = f"event: {event}\n" if event is not None else ""
    return f"{head}data: {dumps(value)}\n\n".encode("utf-8", "replace")


async def _nothing() -> None:
    pass


class _Stream(StreamingResponse):
    """A streamed response that calls `close` at the end, also if the client left before the first piece was made."""

    def __init__(self, pieces: AsyncIterator[bytes], media_type: str, close: Callable[[], Awaitable[None]]) -> None:
        super().__init__(pieces, media_type=media_type, headers=_HEADERS)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            await self._close()


def event_stream(
    events: AsyncIterator[bytes],
    keepalive: float,
    failed: Callable[[ApiError], bytes] = lambda _error: b"",
    close: Callable[[], Awaitable[None]] = _nothing,
) -> StreamingResponse:
    """A response of server-sent events.

    Args:
        events: the events.
        keepalive: seconds without an event after which a comment is sent.
        failed: writes an error of `events` as the last event.
        close: called at the end, however it comes.
    """
    return _Stream(_kept_alive(_with_error(events, failed), keepalive), "text/event-stream", close)


def ndjson_stream(
    lines: AsyncIterator[Any], failed: Callable[[ApiError], Any], close: Callable[[], Awaitable[None]] = _nothing
) -> StreamingResponse:
    """A response of JSON values, one per line; arguments as for `event_stream`."""

    async def encoded() -> AsyncIterator[bytes]:
        async for line in _with_error(lines, failed):
            yield f"{dumps(line)}\n".encode("utf-8", "replace")

    return _Stream(encoded(), "application/x-ndjson", close)


async def _with_error(pieces: AsyncIterator[T], failed: Callable[[ApiError], T]) -> AsyncIterator[T]:
    """The pieces, and an error as the last one, because the status has been sent already."""
    try:
        async for piece in pieces:
            yield piece
    except Exception as error:  # noqa: BLE001 (every error becomes a piece)
        yield failed(api_error(error))
    finally:
        with contextlib.suppress(Exception):
            await pieces.aclose()  # type: ignore[attr-defined]


async def _kept_alive(events: AsyncIterator[bytes], seconds: float) -> AsyncIterator[bytes]:
    """The events, those that are ready at the same time as one piece, and comments while there are none."""
    ready: list[bytes] = []
    changed = asyncio.Event()

    async def read() -> None:
        try:
            async for event in events:
                ready.append(event)
                changed.set()
        finally:
            with contextlib.suppress(Exception):
                await events.aclose()  # type: ignore[attr-defined]

    reader = asyncio.create_task(read())
    reader.add_done_callback(lambda _: changed.set())
    try:
        while True:
            if not ready and not reader.done():
                try:
                    async with asyncio.timeout(seconds):
                        await changed.wait()
                except TimeoutError:
                    yield _KEEPALIVE
                    continue
            changed.clear()
            if ready:
                piece = b"".join(ready)
                ready.clear()
                yield piece
            elif reader.done():
                reader.result()
                return
    finally:
        reader.cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):
            await reader


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled once the client has left.

    Raises:
        ApiError: the client has left.
    """
    task, left = asyncio.ensure_future(work), False

    async def watch() -> None:
        nonlocal left
        while (await request.receive())["type"] != "http.disconnect":
            pass
        left = True
        task.cancel()

    watcher = asyncio.create_task(watch())
    try:
        return await task
    except asyncio.CancelledError:
        if left:
            raise ApiError(_CLIENT_CLOSED, "the client closed the connection") from None
        raise
    finally:
        task.cancel()
        watcher.cancel()
