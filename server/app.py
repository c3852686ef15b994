"""`create_app`: the ASGI application with all protocols."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from importlib import metadata

from fastapi import FastAPI

from llm_edge.runtime.errors import LlmEdgeError
from llm_edge.server.config import ServerConfig
from llm_edge.server.errors import ApiError
from llm_edge.server.guard import App, Guard
from llm_edge.server.jobs import ExportJobs
from llm_edge.server.models import ModelPool
from llm_edge.server.protocols import (
    anthropic,
    model_jobs,
    native,
    ollama,
    openai_chat,
    openai_completions,
    openai_models,
    openai_responses,
    original,
)
from llm_edge.server.state import ServerState
from llm_edge.server.upstream import Upstreams

_log = logging.getLogger("llm_edge.server")
PROTOCOLS = (
    openai_chat, openai_completions, openai_responses, openai_models, anthropic, ollama, original, native, model_jobs
)  # fmt: skip
"""Modules with a `router`; to add a protocol, add its module here."""


def create_app(config: ServerConfig) -> App:
    """The application; the default model is loaded once it starts."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        jobs = ExportJobs(config.jobs, config.models.folder, [upstream.key_env for upstream in config.upstreams])
        state = ServerState(config, ModelPool(config.models, Upstreams(config.upstreams)), jobs)
        app.state.server = state
        loading = asyncio.create_task(_preload(state))
        yield
        loading.cancel()
        await jobs.close()
        await state.pool.drain(config.drain_seconds)

    app = FastAPI(
        title="llm-edge",
        version=metadata.version("llm-edge"),
        description="Serves llm-edge bundles to OpenAI, Anthropic and Ollama clients.",
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
    )
    for protocol in PROTOCOLS:
        app.include_router(protocol.router)
    return Guard(app, config)


async def _preload(state: ServerState) -> None:
    """Load the default model, so that the first request does not wait for it."""
    try:
        await state.pool.preload("")
    except (ApiError, LlmEdgeError) as error:
        _log.warning("no model is loaded: %s", error.message if isinstance(error, ApiError) else error)
    state.ready = True
