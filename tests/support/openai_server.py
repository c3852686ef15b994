"""A local server with OpenAI's chat completions API, for tests of clients."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse


class Server:
    """Streams the bytes that `events` yields as server-sent events."""

    def __init__(self) -> None:
        self.reset()
        app = FastAPI()
        app.get("/v1/models")(self._list)
        app.post("/v1/chat/completions")(self._answer)
        self._server = uvicorn.Server(uvicorn.Config(app, log_level="critical", lifespan="off", ws="none"))
        listening = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        self._thread = threading.Thread(target=self._server.run, args=([listening],))
        self._thread.start()

    def reset(self) -> None:
        """Restore the initial state."""
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.models: Any = {"data": [{"id": "small", "max_model_len": 4096}, {"id": "large"}]}
        self.key = ""
        self.refuse: Callable[[dict[str, Any]], tuple[int, Any] | None] = lambda _asked: None
        self.events: Callable[[], Iterator[bytes]] = lambda: text_events("Hello", " there")
        self.gone = threading.Event()

    def stop(self) -> None:
        self._server.should_exit = self._server.force_exit = True
        self._thread.join()

    async def _list(self, request: Request) -> Any:
        self.headers.append(dict(request.headers))
        if self.key and request.headers.get("authorization") != f"Bearer {self.key}":
            given = request.headers.get("authorization", "no key").removeprefix("Bearer ")
            return JSONResponse({"error": {"message": f"Incorrect API key provided: {given}"}}, 401)
        return self.models if self.models is not None else JSONResponse({"detail": "Not Found"}, 404)

    async def _answer(self, request: Request) -> Any:
        self.headers.append(dict(request.headers))
        asked = await request.json()
        self.requests.append(asked)
        if refusal := self.refuse(asked):
            return JSONResponse({"error": refusal[1]}, refusal[0])
        return StreamingResponse(self._watched(self.events(), self.gone), media_type="text/event-stream")

    async def _watched(self, events: Iterator[bytes], gone: threading.Event) -> AsyncIterator[bytes]:
        try:
            while data := await asyncio.to_thread(next, events, b""):
                yield data
        finally:
            gone.set()


def event(value: Any) -> bytes:
    return f"data: {json.dumps(value)}\n\n".encode()


def chunk(finish: str | None = None, logprobs: Any = None, **delta: Any) -> bytes:
    choice = {"index": 0, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
    return event({"id": "1", "object": "chat.completion.chunk", "choices": [choice]})


def text_events(*texts: str, finish: str = "stop", **usage: int) -> Iterator[bytes]:
    for text in texts:
        yield chunk(content=text)
    yield chunk(finish)
    if usage:
        yield event({"choices": [], "usage": usage})
    yield b"data: [DONE]\n\n"
