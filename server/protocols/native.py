"""Endpoints of our own and of llama-server: health, metrics, properties, tokens and prompts."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse, PlainTextResponse
from pydantic import BaseModel, ConfigDict
from starlette.concurrency import run_in_threadpool

from llm_edge.runtime.text.token_text import token_bytes
from llm_edge.server.errors import error_route, invalid
from llm_edge.server.generation import chat_tokens
from llm_edge.server.protocols.openai_chat import ChatCompletion
from llm_edge.server.protocols.openai_common import error_body
from llm_edge.server.state import server_state
from llm_edge.server.streaming import unless_disconnected

router = APIRouter(route_class=error_route(error_body), tags=["llm-edge"])


@router.get("/health")
async def health(request: Request) -> Response:
    """200 once the default model is loaded, 503 before and while the server shuts down."""
    state = server_state(request)
    status = "shutting_down" if state.closing.is_set() else "healthy" if state.ready else "loading"
    body = {"status": status, "model_loaded": bool(state.pool.engines()), "config_loaded": True}
    return JSONResponse(body, 200 if status == "healthy" else 503)


@router.get("/props")
async def props(request: Request, model: str = "") -> dict[str, Any]:
    """Properties of a model, of the default one unless named; does not load it."""
    state = server_state(request)
    entry, precision = await run_in_threadpool(state.pool.find, model)
    context = entry.bundle.shape.max_position_embeddings
    return {
        "model_path": entry.name,
        "precision": precision,
        "total_slots": state.config.models.parallel,
        "chat_template": entry.bundle.chat_template() or "",
        "default_generation_settings": {"n_ctx": context},
    }


class Tokenize(BaseModel):
    """The body of a request to tokenize a text."""

    model_config = ConfigDict(extra="allow")

    content: str | None = None
    prompt: str | None = None
    model: str = ""
    add_special: bool = False
    parse_special: bool = False
    with_pieces: bool = False


@router.post("/tokenize")
async def tokenize(body: Tokenize, request: Request) -> dict[str, Any]:
    """The token ids of a text."""
    text = body.content if body.content is not None else body.prompt
    if text is None:
        raise invalid("content: give a text", "content")
    async with server_state(request).pool.use(body.model) as loaded:
        tokenizer = loaded.engine.tokenizer
        ids = await run_in_threadpool(
            tokenizer.encode, text, parse_special=body.parse_special, add_special_tokens=body.add_special
        )
        if not body.with_pieces:
            return {"tokens": ids}
        return {"tokens": [{"id": token, "piece": _piece(token_bytes(tokenizer, token))} for token in ids]}


def _piece(content: bytes) -> str | list[int]:
    """The text of a token, or its bytes if they are part of a character."""
    try:
        return content.decode()
    except UnicodeDecodeError:
        return list(content)


class Detokenize(BaseModel):
    """The body of a request to decode token ids."""

    model_config = ConfigDict(extra="allow")

    tokens: list[int]
    model: str = ""


@router.post("/detokenize")
async def detokenize(body: Detokenize, request: Request) -> dict[str, Any]:
    """The text of token ids."""
    async with server_state(request).pool.use(body.model) as loaded:
        size = loaded.engine.bundle.shape.vocab_size
        if not all(0 <= token < size for token in body.tokens):
            raise invalid(f"tokens: the vocabulary has the ids 0 to {size - 1}", "tokens")
        text = await run_in_threadpool(loaded.engine.tokenizer.decode, body.tokens, skip_special=False)
        return {"content": text, "prompt": text}


@router.post("/apply-template")
async def apply_template(body: ChatCompletion, request: Request) -> dict[str, Any]:
    """The prompt of a conversation, as text and as token ids; nothing is generated."""
    asked = body.to_request()

    async def render() -> dict[str, Any]:
        async with server_state(request).pool.use(asked.model) as loaded:
            tokens = await run_in_threadpool(chat_tokens, loaded, asked)
            return {"prompt": loaded.engine.tokenizer.decode(tokens, skip_special=False), "tokens": tokens}

    return await unless_disconnected(request, render())


_METRICS = {  # our counter -> (Prometheus name, kind, help)
    "requests": ("llm_edge_requests_total", "counter", "Requests accepted."),
    "refused": ("llm_edge_refused_total", "counter", "Requests refused because the queue was full."),
    "finished": ("llm_edge_finished_total", "counter", "Answers that ended by themselves."),
    "cancelled": ("llm_edge_cancelled_total", "counter", "Answers that were cancelled."),
    "failed": ("llm_edge_failed_total", "counter", "Answers that failed."),
    "prompt_tokens": ("llm_edge_prompt_tokens_total", "counter", "Prompt tokens computed or taken from the cache."),
    "completion_tokens": ("llm_edge_completion_tokens_total", "counter", "Tokens generated."),
    "cached_tokens": ("llm_edge_cached_tokens_total", "counter", "Prompt tokens taken from the cache."),
    "active": ("llm_edge_active", "gauge", "Answers being generated."),
    "waiting": ("llm_edge_waiting", "gauge", "Requests waiting."),
    "kept_tokens": ("llm_edge_cache_tokens", "gauge", "Tokens in the prefix cache."),
    "kept_bytes": ("llm_edge_cache_bytes", "gauge", "Bytes of the prefix cache."),
    "evictions": ("llm_edge_evictions_total", "counter", "Prefixes dropped from the cache."),
}


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Counters of all loaded models in Prometheus' text format."""
    engines = server_state(request).pool.engines()
    counters = {name: engine.counters() for name, engine in engines.items()}
    lines = []
    for field, (name, kind, text) in _METRICS.items():
        samples = [
            f'{name}{{model="{_escaped(model)}"}} {getattr(found, field)}'
            for model, found in counters.items()
            if hasattr(found, field)
        ]
        if samples:
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}", *samples]
    if engines:
        name = "llm_edge_run_seconds_total"
        lines += [f"# HELP {name} Time spent inside onnxruntime.", f"# TYPE {name} counter"]
        lines += [f'{name}{{model="{_escaped(model)}"}} {engine.run_seconds}' for model, engine in engines.items()]
    return PlainTextResponse("\n".join(lines) + "\n", media_type="text/plain; version=0.0.4; charset=utf-8")


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
