"""`ServerState`: what the handlers of all protocols share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from fastapi import Request

from llm_edge.server.config import ServerConfig
from llm_edge.server.models import ModelPool


@dataclass
class ServerState:
    """What the handlers share.

    Attributes:
        config: the server's configuration.
        pool: the models.
        ready: the default model has been loaded, or there is none.
        started: Unix time.
    """

    config: ServerConfig
    pool: ModelPool
    ready: bool = False
    started: float = field(default_factory=time.time)


def server_state(request: Request) -> ServerState:
    """The state of the application that a request belongs to."""
    state = request.app.state.server
    assert isinstance(state, ServerState)
    return state
