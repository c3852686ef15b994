"""`/models/jobs`: adds models, from an upload or from the Hugging Face Hub; each is an export with progress."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, ValidationError

from llm_edge.server.adding import add_download, add_upload
from llm_edge.server.errors import error_route
from llm_edge.server.jobs import Job
from llm_edge.server.protocols.openai_common import error_body
from llm_edge.server.state import server_state
from llm_edge.server.streaming import event_stream, sse

router = APIRouter(route_class=error_route(error_body), tags=["Models"])


class Download(BaseModel):
    """The body of a request to add a model of the Hub."""

    model_config = ConfigDict(extra="forbid")

    source: str
    name: str = ""
    precision: str = ""
    validation: bool = True


def upload_schema(files: str) -> dict[str, Any]:
    """The OpenAPI description of a form with files in this field, and further ones."""
    file = {"type": "string", "format": "binary"}
    text = {"type": "string"}
    fields = {files: {"type": "array", "items": file}, "name": text, "precision": text, "validation": text}
    form = {"type": "object", "properties": fields, "required": [files]}
    return {"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": form}}}}


def _body_schema() -> dict[str, Any]:
    described = upload_schema("files")
    described["requestBody"]["content"]["application/json"] = {"schema": Download.model_json_schema()}
    return described


@router.post("/models/jobs", status_code=202, openapi_extra=_body_schema())
async def create_job(request: Request) -> Response:
    """Add a model: its files as multipart/form-data, or the id of one on the Hub as JSON."""
    state = server_state(request)
    if request.headers.get("content-type", "").startswith("multipart/"):
        job = await add_upload(request, state)
    else:
        asked = _download(await request.body())
        job = add_download(state, asked.source, asked.name, asked.precision, validate=asked.validation)
    return JSONResponse(job.to_json(), 202, {"Location": f"/models/jobs/{job.id}"})


def _download(body: bytes) -> Download:
    try:
        return Download.model_validate_json(body)
    except ValidationError as error:
        raise RequestValidationError(error.errors(include_url=False, include_context=False)) from None


@router.get("/models/jobs")
async def list_jobs(request: Request) -> dict[str, Any]:
    """All jobs, the latest first, and which kinds are allowed."""
    state = server_state(request)
    allowed = {"uploads": state.config.jobs.uploads, "downloads": state.config.jobs.downloads}
    return {"object": "list", "data": [job.to_json() for job in state.jobs.list()], "allowed": allowed}


@router.get("/models/jobs/{identifier}")
async def get_job(identifier: str, request: Request) -> dict[str, Any]:
    """One job."""
    return server_state(request).jobs.get(identifier).to_json()


@router.get("/models/jobs/{identifier}/events")
async def job_events(identifier: str, request: Request) -> Response:
    """The job now and after each change, as server-sent events, until it has ended."""
    state = server_state(request)
    return event_stream(_events(state.jobs.get(identifier)), state.config.keepalive)


async def _events(job: Job) -> AsyncIterator[bytes]:
    async for seen in job.watch():
        yield sse(seen)


@router.delete("/models/jobs/{identifier}")
async def delete_job(identifier: str, request: Request) -> dict[str, Any]:
    """Cancel a job, or remove one that has ended from the list."""
    return (await server_state(request).jobs.cancel(identifier)).to_json()
