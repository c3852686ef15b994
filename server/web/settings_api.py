"""The page's API for models, parameters, presets and quick questions."""

from __future__ import annotations

from importlib import metadata
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request
from starlette.concurrency import run_in_threadpool

from llm_edge.chat.parameters import ChatParameters
from llm_edge.runtime.errors import LlmEdgeError
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.server.errors import ApiError, error_route
from llm_edge.server.models import ModelEntry
from llm_edge.server.state import ServerState, server_state
from llm_edge.server.web.bodies import Preset, Question
from llm_edge.server.web.state import web_state
from llm_edge.server.web.views import parameter_views, preset_views

router = APIRouter(
    prefix="/ui/api",
    route_class=error_route(lambda error: {"detail": error.message, "code": error.code}),
    include_in_schema=False,
)
Name = Annotated[str, Query(max_length=300)]


@router.get("/state")
async def state(request: Request) -> dict[str, Any]:
    """What the page needs to start."""
    web = await web_state(request)
    questions = await run_in_threadpool(web.questions.all)
    return {
        "version": metadata.version("llm-edge"),
        "note": web.note,
        "parameters": parameter_views(),
        "questions": questions,
        "adds_models": hasattr(server_state(request), "jobs"),  # with the routes under /models/jobs
        **await models(request),
    }


@router.get("/models")
async def models(request: Request) -> dict[str, Any]:
    """The models that can be chosen, and whether they are loaded."""
    server = server_state(request)
    entries = await run_in_threadpool(server.pool.entries)
    states = {each.name: each.loaded for each in server.pool.states()}
    found = [
        {**_model(entry, precision), "state": _load_state(states, f"{entry.name}:{precision}")}
        for entry in entries
        for precision in _precisions(server, entry)
    ]
    found += map(_upstream_model, server.pool.upstreams.names())
    default = server.pool.config.default
    first = next((each["name"] for each in found if default in (None, each["folder"], each["name"])), "")
    return {"models": found, "default": first, "ready": server.ready}


def _precisions(server: ServerState, entry: ModelEntry) -> list[str]:
    """The precisions of a bundle, that which is served by default first."""
    names = list(entry.bundle.precisions)
    try:
        preferred = entry.bundle.precision(server.pool.config.precision).name
    except LlmEdgeError:
        return names
    return [preferred, *(name for name in names if name != preferred)]


def _model(entry: ModelEntry, precision: str) -> dict[str, Any]:
    return {
        "name": f"{entry.name}:{precision}",
        "folder": entry.name,
        "bundle": entry.bundle.name,
        "precision": precision,
        "size": entry.bundle.precisions[precision].size,
        "context": entry.bundle.shape.max_position_embeddings,
    }


def _upstream_model(name: str) -> dict[str, Any]:
    of_bundles = {"precision": "", "size": 0, "context": 0}
    return {"name": name, "folder": name, "bundle": name, **of_bundles, "state": "loaded"}


def _load_state(states: dict[str, bool], name: str) -> str:
    return "idle" if name not in states else "loaded" if states[name] else "loading"


@router.post("/models/load")
async def load(request: Request, model: Name) -> dict[str, Any]:
    """Load a model in advance, and wait for it; returns what is known about it then."""
    await server_state(request).pool.preload(model)
    return await model_details(request, model)


@router.get("/models/details")
async def model_details(request: Request, model: Name) -> dict[str, Any]:
    """A model's default parameters and presets; those of all models until it is loaded."""
    web = await web_state(request)
    key, params = await run_in_threadpool(_settings_of, server_state(request), model)
    defaults = ChatParameters(params or SamplingParams())
    presets = await run_in_threadpool(preset_views, web.presets, key, defaults)
    names = [each["name"] for each in parameter_views()]
    return {
        "defaults": {name: defaults.default(name) for name in names},
        "presets": presets,
        "loaded": params is not None,
    }


@router.post("/presets")
async def save_preset(request: Request, body: Preset, model: Name) -> dict[str, Any]:
    """Save parameters as a preset of a model."""
    web = await web_state(request)
    key, defaults = await run_in_threadpool(_settings_of, server_state(request), model)
    params = {name: value for name, value in body.params.items() if name != "system"}
    parameters = ChatParameters(defaults or SamplingParams(), params)
    return {"name": await run_in_threadpool(web.presets.save, key, body.name, parameters)}


@router.delete("/presets")
async def delete_preset(request: Request, model: Name, name: Name) -> dict[str, Any]:
    """Delete a preset of the user."""
    web = await web_state(request)
    key, _ = await run_in_threadpool(_settings_of, server_state(request), model)
    await run_in_threadpool(web.presets.delete, key, name)
    return {}


def _settings_of(server: ServerState, model: str) -> tuple[str, SamplingParams | None]:
    """The name under which a model's presets are kept, and its default parameters; None until it is loaded."""
    if server.pool.upstreams.find(model) is not None:
        return model, SamplingParams()
    entry, precision = server.pool.find(model)
    engine = server.pool.engines().get(f"{entry.name}:{precision}")
    return entry.bundle.name, engine.default_params if engine is not None else None


# ---- quick questions


@router.post("/questions")
async def add_question(request: Request, body: Question) -> dict[str, Any]:
    """Append a question."""
    web = await web_state(request)
    await run_in_threadpool(web.questions.add, body.text)
    return await _questions(request)


@router.post("/questions/restore")
async def restore_questions(request: Request) -> dict[str, Any]:
    """Restore the questions that come with the program."""
    web = await web_state(request)
    await run_in_threadpool(web.questions.restore)
    return await _questions(request)


@router.put("/questions")
async def edit_question(
    request: Request, body: Question, old: Annotated[str, Query(max_length=20_000)]
) -> dict[str, Any]:
    """Replace a question."""
    web = await web_state(request)
    await run_in_threadpool(lambda: web.questions.edit(_place(web.questions.all(), old), body.text))
    return await _questions(request)


@router.delete("/questions")
async def delete_question(request: Request, old: Annotated[str, Query(max_length=20_000)]) -> dict[str, Any]:
    """Delete a question."""
    web = await web_state(request)
    await run_in_threadpool(lambda: web.questions.delete(_place(web.questions.all(), old)))
    return await _questions(request)


async def _questions(request: Request) -> dict[str, Any]:
    return {"questions": await run_in_threadpool((await web_state(request)).questions.all)}


def _place(questions: list[str], text: str) -> int:
    if text not in questions:
        raise ApiError(404, "this question no longer exists: reload the page", "question_not_found")
    return questions.index(text)
