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
from llm_edge.server.models import ModelPool
from llm_edge.server.protocols import (
    anthropic,
    native,
    ollama,
    openai_chat,
    openai_completions,
    openai_models,
    openai_responses,
    original,
)
from llm_edge.server.state import ServerState
from llm_edge.server.web import api, page, settings_api
from llm_edge.server.web.state import WebOpener

_log = logging.getLogger("llm_edge.server")
PROTOCOLS = (openai_chat, openai_completions, openai_responses, openai_models, anthropic, ollama, original, native)
"""Modules with a `router`; to add a protocol, add its module here."""
PAGE = (page, api, settings_api)


def create_app(config: ServerConfig, closing: asyncio.Event | None = None) -> App:
    """The application; the default model is loaded once it starts.

    Args:
        config: the configuration.
        closing: set when the server begins to shut down, so that streams that would never end do.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        state = ServerState(config, ModelPool(config.models), closing or asyncio.Event())
        app.state.server, app.state.web = state, WebOpener(state)
        loading = asyncio.create_task(_preload(state))
        yield
        loading.cancel()
        await state.pool.drain(config.drain_seconds)
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
    return Guard(app, config)


async def _preload(state: ServerState) -> None:
    """Load the default model, so that the first request does not wait for it."""
    try:
        await state.pool.preload("")
    except (ApiError, LlmEdgeError) as error:
        _log.warning("no model is loaded: %s", error.message if isinstance(error, ApiError) else error)
    state.ready = True
