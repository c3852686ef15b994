"""A streaming service with OpenAI's API: GET /v1/models and POST /v1/chat/completions.

    python examples/service.py --port 8000
    curl localhost:8000/v1/chat/completions --json '{"messages": [{"role": "user", "content": "Hi"}]}'
    llm-chat --endpoint http://localhost:8000/v1 --model smollm2-135m

It needs fastapi and uvicorn; docs/embedding.md explains it. Format: https://platform.openai.com/docs/api-reference/chat
"""

import argparse
import asyncio
import json
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse, StreamingResponse
from pydantic import BaseModel
from starlette.types import Receive, Scope, Send

from llm_edge.runtime import AsyncGeneration, BusyError, Engine, Timings
from llm_edge.runtime.errors import LlmEdgeError

parser = argparse.ArgumentParser(description="Serve a bundle.")
parser.add_argument("--bundle", default="artifacts/smollm2-135m")
parser.add_argument("--port", type=int, default=8000)
app, options = FastAPI(), parser.parse_args()
NAME = Path(options.bundle).resolve().name


class Request(BaseModel):
    """What this service uses of a request; other fields are ignored."""

    messages: list[dict[str, Any]]
    stream: bool = False
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None


def _changes(request: Request) -> dict[str, Any]:
    """The sampling parameters that a request sets."""
    given = {name: getattr(request, name) for name in ("temperature", "top_p", "top_k", "min_p", "seed")}
    given["max_tokens"] = request.max_completion_tokens or request.max_tokens
    if request.stop:
        given["stop"] = (request.stop,) if isinstance(request.stop, str) else tuple(request.stop)
    return {name: value for name, value in given.items() if value is not None}


def _chunk(number: str, kind: str, choice: dict[str, Any] | None, **fields: Any) -> dict[str, Any]:
    choices = [{"index": 0, "finish_reason": None, **choice}] if choice is not None else []
    created = int(time.time())
    return {"id": number, "object": kind, "created": created, "model": NAME, "choices": choices, **fields}


def _usage(timings: Timings | None) -> dict[str, int]:
    prompt, completion = (timings.prompt_tokens, timings.completion_tokens) if timings is not None else (0, 0)
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


class _Events(StreamingResponse):
    """An answer as server-sent events, one per chunk; it is cancelled with the connection."""

    def __init__(self, answer: AsyncGeneration) -> None:
        super().__init__(self._events(), media_type="text/event-stream")
        self._answer = answer

    async def _events(self) -> AsyncIterator[str]:
        number, kind = f"chatcmpl-{uuid.uuid4().hex}", "chat.completion.chunk"
        try:
            async for chunk in self._answer:
                delta = {"reasoning_content" if chunk.reasoning else "content": chunk.text}
                choice = {"delta": delta, "finish_reason": chunk.finish_reason}
                yield f"data: {json.dumps(_chunk(number, kind, choice))}\n\n"
                if chunk.timings is not None:
                    yield f"data: {json.dumps(_chunk(number, kind, None, usage=_usage(chunk.timings)))}\n\n"
        except LlmEdgeError as error:
            yield f"data: {json.dumps({'error': {'message': str(error), 'type': 'server_error'}})}\n\n"
        yield "data: [DONE]\n\n"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._answer:
            await super().__call__(scope, receive, send)


@app.get("/v1/models")
async def _models() -> dict[str, Any]:
    model = {"id": NAME, "object": "model", "owned_by": "llm-edge", "context_length": engine.context_length}
    return {"object": "list", "data": [model]}


@app.post("/v1/chat/completions", response_model=None)
async def _chat(request: Request) -> _Events | JSONResponse | dict[str, Any]:
    try:
        params = replace(engine.default_params, **_changes(request))
        answer = await asyncio.to_thread(engine.chat, request.messages, params)
        if request.stream:
            return _Events(answer)
        result = await answer.aresult()
    except LlmEdgeError as error:
        body = {"error": {"message": str(error), "type": "invalid_request_error"}}
        return JSONResponse(body, 503 if isinstance(error, BusyError) else 400)
    message = {"role": "assistant", "content": result.text}
    choice = {"message": message, "finish_reason": result.finish_reason}
    return _chunk(f"chatcmpl-{uuid.uuid4().hex}", "chat.completion", choice, usage=_usage(result.timings))


with Engine.load(options.bundle) as engine:
    uvicorn.run(app, port=options.port, log_level="warning", timeout_graceful_shutdown=5)
