"""OpenAI's `/v1/models` and `/v1/embeddings`.

https://platform.openai.com/docs/api-reference/models, https://platform.openai.com/docs/api-reference/embeddings
"""

from __future__ import annotations

import base64
from typing import Any, Literal

import numpy as np
from fastapi import APIRouter, Request
from pydantic import BaseModel, ConfigDict
from starlette.concurrency import run_in_threadpool

from llm_edge.server.embeddings import embed
from llm_edge.server.errors import error_route, invalid
from llm_edge.server.models import ModelEntry
from llm_edge.server.protocols.openai_common import error_body
from llm_edge.server.state import server_state
from llm_edge.server.streaming import unless_disconnected

router = APIRouter(route_class=error_route(error_body), tags=["OpenAI"])
_MAX_INPUTS = 2048


def _card(entry: ModelEntry) -> dict[str, Any]:
    return {
        "id": entry.name,
        "object": "model",
        "created": entry.created,
        "owned_by": "llm-edge",
        "max_model_len": entry.bundle.shape.max_position_embeddings,
        "precisions": list(entry.bundle.precisions),
    }


def _upstream_card(name: str) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": 0, "owned_by": name.partition("/")[0]}


@router.get("/v1/models")
@router.get("/models", include_in_schema=False)
async def models(request: Request) -> dict[str, Any]:
    """The models that can be requested, loaded or not; `name:precision` requests another precision."""
    pool = server_state(request).pool
    entries = await run_in_threadpool(pool.entries)
    return {"object": "list", "data": [*map(_card, entries), *map(_upstream_card, pool.upstreams.names())]}


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> dict[str, Any]:
    """One model."""
    if server_state(request).pool.upstreams.find(name) is not None:
        return _upstream_card(name)
    entry, _ = await run_in_threadpool(server_state(request).pool.find, name)
    return {**_card(entry), "id": name}


class Embeddings(BaseModel):
    """The body of a request for embeddings."""

    model_config = ConfigDict(extra="allow")

    input: str | list[str] | list[int] | list[list[int]]
    model: str = ""
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    pooling: Literal["mean", "last"] = "mean"


@router.post("/v1/embeddings")
@router.post("/embeddings", include_in_schema=False)
async def embeddings(body: Embeddings, request: Request) -> dict[str, Any]:
    """Texts or token lists as vectors of length 1; needs a bundle exported with --hidden-states."""
    if body.dimensions is not None and body.dimensions < 1:
        raise invalid(f"dimensions is {body.dimensions}: use 1 or more", "dimensions")
    pool, inputs = server_state(request).pool, _inputs(body.input)
    found = await unless_disconnected(request, embed(pool, body.model, inputs, body.pooling))
    data = []
    for index, whole in enumerate(found.vectors):
        vector = whole
        if body.dimensions is not None and body.dimensions < vector.size:
            vector = vector[: body.dimensions] / max(float(np.linalg.norm(vector[: body.dimensions])), 1e-12)
        vector = vector.astype("<f4")
        written = base64.b64encode(vector.tobytes()).decode() if body.encoding_format == "base64" else vector.tolist()
        data.append({"object": "embedding", "index": index, "embedding": written})
    used = {"prompt_tokens": found.tokens, "total_tokens": found.tokens}
    return {"object": "list", "data": data, "model": found.model, "usage": used}


def _inputs(value: Any) -> list[str | list[int]]:
    if isinstance(value, str) or (value and isinstance(value[0], int)):
        value = [value]
    if not 1 <= len(value) <= _MAX_INPUTS:
        raise invalid(f"input: give 1 to {_MAX_INPUTS} texts", "input")
    return list(value)
