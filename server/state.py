"""`ServerState`: what the handlers of all protocols share."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any

from fastapi import Request

from llm_edge.server.config import ServerConfig
from llm_edge.server.jobs import ExportJobs
from llm_edge.server.models import ModelPool


@dataclass
class ServerState:
    """What the handlers share.

    Attributes:
        config: the server's configuration.
        pool: the models.
        jobs: exports that clients have requested.
        closing: set when the server begins to shut down.
        current: name of the model that the original service's endpoints use; "" = the default.
        uploading: number of uploads that are being received.
        ready: the default model has been loaded, or there is none.
        started: Unix time.
    """

    config: ServerConfig
    pool: ModelPool
    jobs: ExportJobs
    closing: asyncio.Event
    current: str = ""
    uploading: int = 0
    ready: bool = False
    started: float = field(default_factory=time.time)
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)

    def spawn(self, work: Coroutine[Any, Any, Any]) -> None:
        """Run something in the background."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def server_state(request: Request) -> ServerState:
    """The state of the application that a request belongs to."""
    state = request.app.state.server
    assert isinstance(state, ServerState)
    return state
