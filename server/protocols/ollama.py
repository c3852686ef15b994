"""Ollama's `/api/chat`, `/api/generate`, `/api/tags`, `/api/show`, `/api/ps`, `/api/embed` and `/api/version`.

https://docs.ollama.com/api. Streams are NDJSON, durations are nanoseconds. A tag names a precision.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict
from starlette.concurrency import run_in_threadpool

from llm_edge.runtime.results import Timings
from llm_edge.runtime.sampling.constraint import Constraint
from llm_edge.server.adding import add_download, hub_model_name, is_hub_id
from llm_edge.server.embeddings import embed
from llm_edge.server.errors import ApiError, error_route, invalid
from llm_edge.server.events import Completed, Finish, ReasoningDelta, TextDelta, ToolCallDelta, ToolCallStarted
from llm_edge.server.generation import start_chat, start_text
from llm_edge.server.jobs import Job
from llm_edge.server.messages import arguments_of, chat_messages, tool_use
from llm_edge.server.models import ModelEntry
from llm_edge.server.request import ChatRequest, TextRequest, reasoning_overrides, sampling_overrides
from llm_edge.server.running import RunningRequest
from llm_edge.server.state import ServerState, server_state
from llm_edge.server.streaming import ndjson_stream, unless_disconnected

_NANOSECONDS = 1_000_000_000
_PARTS = 1000  # of a download or export, whose size in bytes is not known
_FAR = "2318-01-01T00:00:00Z"  # expires_at of a model that stays


def error_body(error: ApiError) -> dict[str, Any]:
    """An error as Ollama writes it."""
    return {"error": error.message}


router = APIRouter(route_class=error_route(error_body), tags=["Ollama"])


class _Body(BaseModel):
    model_config = ConfigDict(extra="allow")

    model: str
    stream: bool = True
    format: str | dict[str, Any] | None = None
    options: dict[str, Any] | None = None
    think: bool | str | None = None

    def settings(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Sampling overrides and template variables."""
        fields = dict(self.options or {})
        if isinstance(fields.get("num_predict"), int):
            count = fields.pop("num_predict")
            if count > 0:
                fields["max_tokens"] = count
        overrides = sampling_overrides(fields)
        if self.format == "json":
            overrides["constraint"] = Constraint.json()
        elif isinstance(self.format, Mapping):
            overrides["constraint"] = Constraint.json_schema(self.format)
        elif self.format not in (None, ""):
            raise invalid(f"format is {self.format!r}: use json or a JSON schema", "format")
        if self.think is None:
            return overrides, {}
        effort = self.think if isinstance(self.think, str) else "high" if self.think else "none"
        reasoning, variables = reasoning_overrides(effort)
        return {**overrides, **reasoning}, variables


class Chat(_Body):
    """The body of a request to answer a conversation; sampling parameters are in `options`."""

    messages: list[dict[str, Any]] = []
    tools: list[dict[str, Any]] | None = None


class Generate(_Body):
    """The body of a request to answer a prompt, or with `raw` to continue it."""

    prompt: str = ""
    system: str | None = None
    raw: bool = False


@router.post("/api/chat")
async def chat(body: Chat, request: Request) -> Response:
    """Answer a conversation."""
    state = server_state(request)
    if not body.messages:  # Ollama's way to load a model
        await unless_disconnected(request, state.pool.preload(body.model))
        return JSONResponse({**_head(body.model), "message": _said(""), "done": True, "done_reason": "load"})
    overrides, variables = body.settings()
    messages = chat_messages(body.messages)
    asked = ChatRequest(body.model, messages, overrides, tool_use(body.tools, None), 1, variables)
    running = await unless_disconnected(request, start_chat(state.pool, asked))
    if body.stream:
        return ndjson_stream(_chat_lines(running, body.model), error_body, running.close)
    (answer,) = await unless_disconnected(request, running.collect())
    message = _said(answer.text)
    if answer.reasoning:
        message["thinking"] = answer.reasoning
    if answer.calls:
        message["tool_calls"] = [_call(call.name, call.arguments) for call in answer.calls]
    return JSONResponse({**_head(body.model), "message": message, **_ending(running, answer.finish)})


@router.post("/api/generate")
async def generate(body: Generate, request: Request) -> Response:
    """Answer a prompt, or continue it as it is."""
    state = server_state(request)
    if not body.prompt:
        await unless_disconnected(request, state.pool.preload(body.model))
        return JSONResponse({**_head(body.model), "response": "", "done": True, "done_reason": "load"})
    overrides, variables = body.settings()
    if body.raw:
        start = start_text(state.pool, TextRequest(body.model, body.prompt, overrides))
    else:
        system = [{"role": "system", "content": body.system}] if body.system else []
        messages = [*system, {"role": "user", "content": body.prompt}]
        start = start_chat(state.pool, ChatRequest(body.model, messages, overrides, template_variables=variables))
    running = await unless_disconnected(request, start)
    if body.stream:
        return ndjson_stream(_generate_lines(running, body.model), error_body, running.close)
    (answer,) = await unless_disconnected(request, running.collect())
    found = {**_head(body.model), "response": answer.text, **_ending(running, answer.finish)}
    if answer.reasoning:
        found["thinking"] = answer.reasoning
    return JSONResponse(found)


def _head(model: str) -> dict[str, Any]:
    return {"model": model, "created_at": datetime.now(UTC).isoformat().replace("+00:00", "Z")}


def _said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


def _call(name: str, arguments: str) -> dict[str, Any]:
    return {"function": {"name": name, "arguments": arguments_of(arguments)}}


async def _chat_lines(running: RunningRequest, model: str) -> AsyncIterator[dict[str, Any]]:
    calls: list[tuple[str, list[str]]] = []
    async for event in running.events():
        match event:
            case TextDelta(_, text, _) if text:
                yield {**_head(model), "message": _said(text), "done": False}
            case ReasoningDelta(_, text):
                yield {**_head(model), "message": {**_said(""), "thinking": text}, "done": False}
            case ToolCallStarted(_, _, _, name):
                calls.append((name, []))
            case ToolCallDelta(_, number, arguments):
                calls[number][1].append(arguments)
            case Completed(_, finish, _):
                if calls:
                    written = [_call(name, "".join(parts)) for name, parts in calls]
                    yield {**_head(model), "message": {**_said(""), "tool_calls": written}, "done": False}
                yield {**_head(model), "message": _said(""), **_ending(running, finish)}


async def _generate_lines(running: RunningRequest, model: str) -> AsyncIterator[dict[str, Any]]:
    async for event in running.events():
        match event:
            case TextDelta(_, text, _) if text:
                yield {**_head(model), "response": text, "done": False}
            case ReasoningDelta(_, text):
                yield {**_head(model), "response": "", "thinking": text, "done": False}
            case Completed(_, finish, _):
                yield {**_head(model), "response": "", **_ending(running, finish)}


def _ending(running: RunningRequest, finish: Finish) -> dict[str, Any]:
    timings = running.timings
    reason = "length" if finish in (Finish.LENGTH, Finish.CANCELLED) else "stop"
    return {"done": True, "done_reason": reason, **(_durations(timings) if timings is not None else {})}


def _durations(timings: Timings) -> dict[str, int]:
    def nanoseconds(seconds: float) -> int:
        return round(seconds * _NANOSECONDS)

    return {
        "total_duration": nanoseconds(timings.time_to_first_token + timings.decode_seconds),
        "load_duration": 0,
        "prompt_eval_count": timings.prompt_tokens,
        "prompt_eval_duration": nanoseconds(timings.prefill_seconds),
        "eval_count": timings.completion_tokens,
        "eval_duration": nanoseconds(timings.decode_seconds),
    }


def _card(entry: ModelEntry, precision: str) -> dict[str, Any]:
    info = entry.bundle.precisions[precision]
    modified = datetime.fromtimestamp(entry.created, UTC).isoformat().replace("+00:00", "Z")
    name = f"{entry.name}:{precision}"
    details = {
        "parent_model": "",
        "format": info.format,
        "family": str(entry.bundle.manifest.get("family", "")),
        "families": None,
        "parameter_size": "",
        "quantization_level": precision,
    }
    return {"name": name, "model": name, "modified_at": modified, "size": info.size, "digest": "", "details": details}


def _upstream_card(name: str) -> dict[str, Any]:
    details = {"parent_model": "", "format": "", "family": "", "families": None, "parameter_size": ""}
    details["quantization_level"] = ""
    fields = {"modified_at": "1970-01-01T00:00:00Z", "size": 0, "digest": "", "details": details}
    return {"name": name, "model": name, **fields}


@router.get("/api/tags")
async def tags(request: Request) -> dict[str, Any]:
    """The models, once per precision, and those of upstreams."""
    pool = server_state(request).pool
    entries = await run_in_threadpool(pool.entries)
    own = [_card(entry, precision) for entry in entries for precision in entry.bundle.precisions]
    return {"models": [*own, *map(_upstream_card, pool.upstreams.names())]}


@router.get("/api/ps")
async def running_models(request: Request) -> dict[str, Any]:
    """The models in memory."""
    pool = server_state(request).pool
    found = []
    for state in pool.states():
        if state.loaded:
            entry, precision = await run_in_threadpool(pool.find, state.name)
            found.append({**_card(entry, precision), "expires_at": _FAR, "size_vram": 0})
    return {"models": found}


@router.get("/api/version")
async def version() -> dict[str, str]:
    """Our version."""
    return {"version": metadata.version("llm-edge")}


class Show(BaseModel):
    """The body of a request for a model's properties."""

    model_config = ConfigDict(extra="allow")

    model: str = ""
    name: str = ""


@router.post("/api/show")
async def show(body: Show, request: Request) -> dict[str, Any]:
    """A model's properties."""
    pool, name = server_state(request).pool, body.model or body.name
    if pool.upstreams.find(name) is not None:
        return _properties(_upstream_card(name), "", {}, ["completion", "tools"])
    entry, precision = await run_in_threadpool(pool.find, name)
    card, shape = _card(entry, precision), entry.bundle.shape
    family = card["details"]["family"]
    capabilities = ["completion", "tools"]
    if entry.bundle.reasoning is not None:
        capabilities.append("thinking")
    if entry.bundle.precisions[precision].hidden_size is not None:
        capabilities.append("embedding")
    info = {
        "general.architecture": family,
        f"{family}.context_length": shape.max_position_embeddings,
        f"{family}.block_count": shape.num_hidden_layers,
    }
    return _properties(card, entry.bundle.chat_template() or "", info, capabilities)


def _properties(card: dict[str, Any], template: str, info: dict[str, Any], capabilities: list[str]) -> dict[str, Any]:
    return {
        "license": "",
        "modelfile": "",
        "parameters": "",
        "template": template,
        "details": card["details"],
        "modified_at": card["modified_at"],
        "model_info": info,
        "capabilities": capabilities,
    }


class Embed(BaseModel):
    """The body of a request for embeddings."""

    model_config = ConfigDict(extra="allow")

    model: str
    input: str | list[str]


@router.post("/api/embed")
async def embed_texts(body: Embed, request: Request) -> dict[str, Any]:
    """Texts as vectors of length 1."""
    inputs = [body.input] if isinstance(body.input, str) else list(body.input)
    found = await unless_disconnected(request, embed(server_state(request).pool, body.model, inputs))
    vectors = [vector.tolist() for vector in found.vectors]
    return {"model": body.model, "embeddings": vectors, "prompt_eval_count": found.tokens}


class Pull(BaseModel):
    """The body of a request to add a model."""

    model_config = ConfigDict(extra="allow")

    model: str = ""
    name: str = ""
    stream: bool = True


@router.post("/api/pull")
async def pull(body: Pull, request: Request) -> Response:
    """Download a model of the Hugging Face Hub (`owner/name`, also after `hf.co/`) and export it.

    A tag names a precision. The export is cancelled if the client disconnects.
    """
    state = server_state(request)
    source, _, tag = (body.model or body.name).partition(":")
    source = source.removeprefix("https://").removeprefix("huggingface.co/").removeprefix("hf.co/")
    present = await run_in_threadpool(_is_present, state, source)
    job = None if present else add_download(state, source, "", "" if tag == "latest" else tag)
    lines = _pull_lines(state, job)
    if body.stream:
        return ndjson_stream(lines, error_body)
    last = [line async for line in lines][-1]
    if "error" in last:
        raise ApiError(500, last["error"], "export_failed")
    return JSONResponse(last)


def _is_present(state: ServerState, source: str) -> bool:
    """Whether there is a model of this name, or one that was downloaded from there."""
    names = {source, hub_model_name(source)} if is_hub_id(source) else {source}
    return any(entry.name in names for entry in state.pool.entries())


async def _pull_lines(state: ServerState, job: Job | None) -> AsyncIterator[dict[str, Any]]:
    """The progress of a job; None = the model is there already."""
    yield {"status": "pulling manifest"}
    if job is None:
        yield {"status": "success"}
        return
    try:
        async for seen in job.watch():
            if seen["stage"] is not None and not job.ended:
                line = {"status": f"{seen['stage']} {seen['detail']}".strip()}
                share = seen["progress"]
                yield line if share is None else {**line, "total": _PARTS, "completed": round(share * _PARTS)}
    finally:
        if not job.ended:
            state.spawn(state.jobs.cancel(job.id))
    yield {"error": job.error} if job.error is not None else {"status": "success"}
