"""The API of the service that this project began with, in its shapes.

Streams are those of the original (`data: TEXT`), but each event carries the text as it was generated, one `data:` line
per line of it, so that clients of server-sent events get newlines and spaces back.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.concurrency import run_in_threadpool

from llm_edge.runtime.errors import LlmEdgeError
from llm_edge.server.adding import add_upload
from llm_edge.server.errors import ApiError, api_error, error_route
from llm_edge.server.events import Completed, ReasoningDelta, TextDelta
from llm_edge.server.generation import start_chat, start_text
from llm_edge.server.messages import chat_messages
from llm_edge.server.models import ModelEntry
from llm_edge.server.protocols.model_jobs import upload_schema
from llm_edge.server.request import ChatRequest, TextRequest, sampling_overrides
from llm_edge.server.running import RunningRequest
from llm_edge.server.state import server_state
from llm_edge.server.streaming import DONE, event_stream, unless_disconnected

_VERSION = "0.1.0"  # of the original's API


def error_body(error: ApiError) -> dict[str, Any]:
    """An error as FastAPI writes it."""
    if error.status == 422:
        return {
            "detail": [{"loc": ["body", *(error.param or "").split(".")], "msg": error.message, "type": "value_error"}]
        }
    return {"detail": error.message}


router = APIRouter(route_class=error_route(error_body, invalid_body=422), tags=["Original service"])


class Message(BaseModel):
    """A message of a conversation."""

    role: str
    content: str
    thinking: str | None = None


class Chat(BaseModel):
    """The body of a request."""

    model_config = ConfigDict(extra="ignore")

    messages: list[Message]
    max_length: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    stream: bool = False

    def to_request(self, model: str) -> ChatRequest:
        """The request that a model answers."""
        messages = chat_messages([message.model_dump(exclude_none=True) for message in self.messages])
        fields = {"max_tokens": self.max_length, **self.model_dump(include={"temperature", "top_p", "top_k"})}
        return ChatRequest(model, messages, sampling_overrides(fields))


@router.get("/model/info")
async def model_info(request: Request) -> dict[str, Any]:
    """The current model."""
    entry = await _current(request)
    if entry is None:
        unknown = {"parameters": "unknown", "vocab_size": 0, "max_sequence_length": 0, "device": "upstream"}
        return {"model_name": server_state(request).current, **unknown}
    shape = entry.bundle.shape
    return {
        "model_name": entry.name,
        "parameters": _readable(entry.bundle.manifest.get("parameters")),
        "vocab_size": shape.vocab_size,
        "max_sequence_length": shape.max_position_embeddings,
        "device": server_state(request).config.models.provider,
    }


def _readable(count: object) -> str:
    if not isinstance(count, int):
        return "unknown"
    return f"{count / 1e9:.1f}B" if count >= 10**9 else f"{count / 1e6:.0f}M"


@router.get("/models/available")
async def models_available(request: Request) -> list[dict[str, Any]]:
    """All models."""
    pool = server_state(request).pool
    entries = await run_in_threadpool(pool.entries)
    own = [{"name": entry.name, "type": "local", "description": f"Local model: {entry.name}"} for entry in entries]
    return [*own, *map(_upstream, pool.upstreams.names())]


def _upstream(name: str) -> dict[str, Any]:
    return {"name": name, "type": "openai", "description": f"OpenAI-compatible model: {name}"}


@router.get("/models/current")
async def models_current(request: Request) -> dict[str, Any]:
    """The current model, and whether it is loaded."""
    state, entry = server_state(request), await _current(request)
    if entry is None:
        return {**_upstream(state.current), "loaded": True}
    loaded = any(each.loaded and each.name.startswith(f"{entry.name}:") for each in state.pool.states())
    description = f"Local model: {entry.name}" + ("" if loaded else " (not loaded)")
    return {"name": entry.name, "type": "local", "loaded": loaded, "description": description}


@router.post("/chat")
async def chat(body: Chat, request: Request) -> Response:
    """Answer a conversation."""
    state = server_state(request)
    if body.stream:
        raise ApiError(400, "Use /chat/stream for streaming responses")
    entry = await _current(request)
    running = await unless_disconnected(request, start_chat(state.pool, body.to_request(state.current)))
    (answer,) = await unless_disconnected(request, running.collect())
    timings = running.timings
    seconds = timings.time_to_first_token + timings.decode_seconds if timings is not None else 0.0
    usage = {
        "input_tokens": running.usage.prompt_tokens,
        "output_tokens": running.usage.completion_tokens,
        "total_tokens": running.usage.total_tokens,
        "generation_time_ms": round(seconds * 1000),
    }
    about = {"model": entry.name if entry is not None else state.current, "version": _VERSION}
    return JSONResponse({"response": answer.text, "usage": usage, "model_info": about})


@router.post("/chat/stream")
async def chat_stream(body: Chat, request: Request) -> Response:
    """Answer a conversation as a stream."""
    state = server_state(request)
    await _current(request)
    running = await unless_disconnected(request, start_chat(state.pool, body.to_request(state.current)))
    response = event_stream(_stream(running), state.config.keepalive, _failed, running.close)
    response.headers["content-type"] = "text/plain; charset=utf-8"
    return response


async def _stream(running: RunningRequest) -> AsyncIterator[bytes]:
    async for event in running.events():
        match event:
            case TextDelta(_, text, _) if text:
                yield _data(text)
            case ReasoningDelta() | Completed():
                pass
    yield DONE


def _failed(error: ApiError) -> bytes:
    return b"event: error\n" + _data(error.message) + DONE


def _data(text: str) -> bytes:
    lines = text.replace("\r", "").split("\n")
    return "".join(f"data: {line}\n" for line in lines).encode("utf-8", "replace") + b"\n"


@router.post("/generate")
async def generate(
    request: Request,
    prompt: str,
    max_length: int | None = None,
    temperature: float | None = None,
    top_p: float | None = None,
    top_k: int | None = None,
) -> dict[str, str]:
    """Continue a text; the parameters are in the query."""
    state = server_state(request)
    await _current(request)
    fields = {"max_tokens": max_length, "temperature": temperature, "top_p": top_p, "top_k": top_k}
    asked = TextRequest(state.current, prompt, sampling_overrides(fields))
    running = await unless_disconnected(request, start_text(state.pool, asked))
    (answer,) = await unless_disconnected(request, running.collect())
    return {"generated_text": answer.text}


class Switch(BaseModel):
    """The body of a request to switch models."""

    model_name: str


@router.post("/models/switch")
async def models_switch(body: Switch, request: Request) -> dict[str, Any]:
    """Load a model and make it the current one."""
    state = server_state(request)
    try:
        await unless_disconnected(request, state.pool.preload(body.model_name))
    except (ApiError, LlmEdgeError) as error:
        return {"success": False, "message": f"Error switching model: {api_error(error).message}", "model_name": None}
    state.current = body.model_name
    return {"success": True, "message": f"Switched to {body.model_name}", "model_name": body.model_name}


@router.post("/models/upload", openapi_extra=upload_schema("model_file"))
async def models_upload(request: Request) -> dict[str, Any]:
    """Export the uploaded files, wait for the result and make it the current model; failures are reported with 200."""
    state = server_state(request)
    try:
        job = await add_upload(request, state)
    except ApiError as error:
        return {"success": False, "message": f"Error uploading model: {error.message}"}
    async for _ in job.watch():
        pass
    if job.error is not None:
        return {"success": False, "message": f"Failed to load the uploaded model: {job.error}"}
    state.current = job.model
    state.spawn(state.pool.preload(job.model))
    return {"success": True, "message": f"Successfully loaded {job.model}"}


@router.post("/model/reload")
async def model_reload(request: Request) -> dict[str, str]:
    """Load the current model again; running answers end first."""
    state = server_state(request)
    entry = await _current(request)
    for loaded in state.pool.states():
        if entry is not None and loaded.name.startswith(f"{entry.name}:"):
            await state.pool.unload(loaded.name)
    state.spawn(state.pool.preload(state.current))
    return {"message": "Model reload initiated"}


async def _current(request: Request) -> ModelEntry | None:
    """The bundle of the current model; None = the model is behind an upstream."""
    state = server_state(request)
    if state.pool.upstreams.find(state.current) is not None:
        return None
    try:
        entry, _ = await run_in_threadpool(state.pool.find, state.current)
    except ApiError:
        raise ApiError(503, "Model not loaded") from None
    return entry
