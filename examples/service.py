"""A streaming service: POST /chat with {"messages": […]} answers with server-sent events.

    python examples/service.py --port 8000
    curl -N localhost:8000/chat --json '{"messages": [{"role": "user", "content": "Hi"}]}'

It needs fastapi and uvicorn; docs/embedding.md explains it.
"""

import argparse
import asyncio
import json
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Annotated

import uvicorn
from fastapi import Body, FastAPI, HTTPException
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from llm_edge.runtime import AsyncGeneration, BusyError, Engine
from llm_edge.runtime.errors import LlmEdgeError

parser = argparse.ArgumentParser(description="Serve a bundle.")
parser.add_argument("--bundle", default="artifacts/smollm2-135m")
parser.add_argument("--port", type=int, default=8000)
app, options = FastAPI(), parser.parse_args()


class _Events(StreamingResponse):
    """An answer as server-sent events, one per chunk; it is cancelled with the connection."""

    def __init__(self, answer: AsyncGeneration) -> None:
        super().__init__(self._events(), media_type="text/event-stream")
        self._answer = answer

    async def _events(self) -> AsyncIterator[str]:
        try:
            async for chunk in self._answer:
                yield f"data: {json.dumps({'text': chunk.text, 'finish_reason': chunk.finish_reason})}\n\n"
        except LlmEdgeError as error:
            yield f"event: error\ndata: {json.dumps(str(error))}\n\n"

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        with self._answer:
            await super().__call__(scope, receive, send)


@app.post("/chat")
async def _chat(messages: Annotated[list[dict[str, str]], Body()], max_tokens: Annotated[int, Body()] = 200) -> _Events:
    try:
        params = replace(engine.default_params, max_tokens=max_tokens)
        return _Events(await asyncio.to_thread(engine.chat, messages, params))
    except LlmEdgeError as error:
        raise HTTPException(503 if isinstance(error, BusyError) else 422, str(error)) from error


with Engine.load(options.bundle) as engine:
    uvicorn.run(app, port=options.port, log_level="warning", timeout_graceful_shutdown=5)
