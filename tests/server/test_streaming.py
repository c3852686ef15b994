"""Streamed responses: errors become their last piece, and what they hold is released however they end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from llm_edge.runtime.errors import InputError
from llm_edge.server.streaming import event_stream, ndjson_stream

SCOPE = {"type": "http", "method": "POST", "path": "/", "headers": []}


async def pieces(error: Exception | None = None) -> AsyncIterator[bytes]:
    yield b"data: 1\n\n"
    if error is not None:
        raise error
    yield b"data: 2\n\n"


def respond(response: Any, *, disconnected: bool = False) -> bytes:
    """The body that a client receives, who has left before the first piece or stays to the end."""
    body = b""

    async def receive() -> Any:
        if not disconnected:
            await asyncio.Event().wait()
        return {"type": "http.disconnect"}

    async def send(message: Any) -> None:
        nonlocal body
        body += message.get("body", b"")

    asyncio.run(response(SCOPE, receive, send))
    return body


@pytest.mark.parametrize("disconnected", [False, True])
def test_a_stream_is_closed_also_if_the_client_left_before_its_first_piece(disconnected: bool) -> None:
    closed = []

    async def close() -> None:
        closed.append(True)

    body = respond(event_stream(pieces(), 10.0, close=close), disconnected=disconnected)
    assert closed == [True]
    assert disconnected or body == b"data: 1\n\ndata: 2\n\n"


def test_an_error_is_the_last_event() -> None:
    failing = event_stream(pieces(InputError("wrong")), 10.0, lambda error: error.message.encode())
    assert respond(failing) == b"data: 1\n\nwrong"


def test_an_error_is_the_last_line() -> None:
    async def lines() -> AsyncIterator[Any]:
        yield {"a": 1}
        raise InputError("wrong")

    assert respond(ndjson_stream(lines(), lambda error: {"error": error.message})) == b'{"a":1}\n{"error":"wrong"}\n'
