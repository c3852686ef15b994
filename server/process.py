"""`serve_forever`: runs the application with uvicorn until a signal ends it."""

from __future__ import annotations

import asyncio
import logging
import socket
import sys

import uvicorn

from llm_edge.runtime.errors import InputError
from llm_edge.server.app import create_app
from llm_edge.server.config import ServerConfig

_BACKLOG = 2048


class _Server(uvicorn.Server):
    """Announces its shutdown before it waits for open connections."""

    def __init__(self, config: uvicorn.Config, closing: asyncio.Event) -> None:
        super().__init__(config)
        self._closing = closing

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        self._closing.set()
        await super().shutdown(sockets)


def serve_forever(config: ServerConfig) -> None:
    """Listen, print the URL, and serve until SIGINT or SIGTERM; running answers may end first.

    Raises:
        InputError: the address cannot be used.
    """
    logging.basicConfig(level=logging.INFO, format="%(levelname)s: %(message)s", stream=sys.stderr)
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
        timeout_graceful_shutdown=int(config.drain_seconds),
        h11_max_incomplete_event_size=64 << 10,
    )
    print(f"llm-edge serves {config.models.folder} on http://{shown}:{port}", flush=True)
    _Server(settings, closing).run(sockets=[listening])


def _listen(config: ServerConfig) -> socket.socket:
    host = config.host.strip("[]")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, config.port), family=family, backlog=_BACKLOG)
    except OSError as error:
        reason = error.strerror or str(error)
        raise InputError(f"{config.host}:{config.port}: {reason}: choose another --host or --port") from error
