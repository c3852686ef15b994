"""`serve_forever`: runs the application with uvicorn until a signal ends it.

The first SIGINT or SIGTERM drains the server, the second ends it at once.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys
import time
from types import FrameType

import uvicorn

from llm_edge.runtime.errors import InputError
from llm_edge.server.app import create_app
from llm_edge.server.config import ServerConfig

_BACKLOG = 2048
_GRACE_SECONDS = 2  # for cancelled streams to end, after running answers had their time
_INTERRUPTED = 130


class _Server(uvicorn.Server):
    """Keeps answering while it drains, so that new requests get 503 rather than no connection."""

    def __init__(self, config: uvicorn.Config, closing: asyncio.Event, drain_seconds: float) -> None:
        super().__init__(config)
        self._closing = closing
        self._drain_seconds = drain_seconds
        self._deadline: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 (uvicorn's signature)
        if self._deadline is not None:
            os._exit(_INTERRUPTED)  # a model that is being loaded could not be interrupted otherwise
        self._deadline = time.monotonic() + self._drain_seconds + _GRACE_SECONDS

    async def on_tick(self, counter: int) -> bool:
        if self._deadline is not None:
            self._closing.set()
            self.should_exit = not self.server_state.tasks or time.monotonic() > self._deadline
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._closing.set()
        await super().shutdown(sockets)


def serve_forever(config: ServerConfig) -> None:
    """Listen, print the URL, and serve until SIGINT or SIGTERM; running answers may end first.

    Raises:
        InputError: the address cannot be used.
    """
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", stream=sys.stderr)
    logging.getLogger("llm_edge").setLevel(config.log_level.upper())
    logging.getLogger("uvicorn.access").disabled = True  # its lines would contain query strings
    listening = _listen(config)
    host, port = listening.getsockname()[:2]
    shown = f"[{host}]" if ":" in host else "localhost" if host == "127.0.0.1" else host
    closing = asyncio.Event()
    settings = uvicorn.Config(
        create_app(config, closing),
        log_config=None,
        log_level="warning",
        ws="none",
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=1,
        h11_max_incomplete_event_size=64 << 10,
    )
    print(f"llm-edge serves {config.models.folder} on http://{shown}:{port}", flush=True)
    _Server(settings, closing, config.drain_seconds).run(sockets=[listening])


def _listen(config: ServerConfig) -> socket.socket:
    host = config.host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, config.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        reason = (error.strerror or str(error)).partition(" (")[0]  # asyncio and socket add the address
        raise InputError(f"{config.host}:{config.port}: {reason}: choose another --host or --port") from error
