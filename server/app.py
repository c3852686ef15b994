"""`create_app`: the ASGI application with all protocols."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator
from importlib import metadata

from fastapi import FastAPI

from llm_edge.runtime.errors import LlmEdgeError
from llm_edge.server.access_log import AccessLog
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
from llm_edge.server.web import api, page, settings_api
from llm_edge.server.web.state import WebOpener

_log = logging.getLogger("llm_edge.server")
PROTOCOLS = (
    openai_chat, openai_completions, openai_responses, openai_models, anthropic, ollama, original, native, model_jobs
)  # fmt: skip
"""Modules with a `router`; to add a protocol, add its module here."""
PAGE = (page, api, settings_api)


def create_app(config: ServerConfig, closing: asyncio.Event | None = None) -> App:
    """The application; the default model is loaded once it starts.

    Args:
        config: the configuration.
        closing: set when the server begins to shut down: new requests are refused, and streams that would never end do.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        jobs = ExportJobs(config.jobs, config.models.folder, [upstream.key_env for upstream in config.upstreams])
        pool = ModelPool(config.models, Upstreams(config.upstreams))
        state = ServerState(config, pool, jobs, closing or asyncio.Event())
        app.state.server, app.state.web = state, WebOpener(state)
        loading, draining = asyncio.create_task(_preload(state)), asyncio.create_task(_drain(state))
        yield
        loading.cancel()
        state.closing.set()
        await draining
        await app.state.web.close()

    app = FastAPI(
        title="llm-edge",
        version=metadata.version("llm-edge"),
        description="Serves llm-edge bundles to OpenAI, Anthropic and Ollama clients.",
        lifespan=lifespan,
        docs_url=None,  # its page loads scripts from elsewhere
        redoc_url=None,
    )
    for module in (*PROTOCOLS, *PAGE):
        app.include_router(module.router)
    guarded = Guard(app, config)
    return AccessLog(guarded) if config.access_log else guarded


async def _drain(state: ServerState) -> None:
    """Once the server shuts down, let running answers end, cancel those that take too long, and close the models."""
    await state.closing.wait()
    await state.jobs.close()
    await state.pool.drain(state.config.drain_seconds)


async def _preload(state: ServerState) -> None:
    """Load the default model, so that the first request does not wait for it."""
    folder = state.config.models.folder
    try:
        if not folder.is_dir():
            _log.warning(
                "%s: no such folder: create a bundle there with llm-export, or name another with --models", folder
            )
            return
        await state.pool.preload("")
    except (ApiError, LlmEdgeError) as error:
        _log.warning("no model is loaded: %s", error.message if isinstance(error, ApiError) else error)
    finally:
        state.ready = True
