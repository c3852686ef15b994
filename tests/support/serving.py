"""Runs the server's application on a free port, for tests with real clients."""

from __future__ import annotations

import socket
import threading
import time
from pathlib import Path
from typing import Any

import uvicorn

from llm_edge.server.app import create_app
from llm_edge.server.config import ModelConfig, ServerConfig

GIB = 1 << 30


class Served:
    """The application, listening on `url`; `stop` ends it."""

    def __init__(
        self,
        folder: Path,
        *,
        models: dict[str, Any] | None = None,
        port: int = 0,
        graceful_seconds: int = 10,
        **config: Any,
    ) -> None:
        listening = socket.create_server(("127.0.0.1", port))
        self.port: int = listening.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        limits = {"memory": 8 * GIB, "threads": 1, "cache_bytes": 1 << 24, **(models or {})}
        self.config = ServerConfig(ModelConfig(folder=folder, **limits), port=self.port, **config)
        settings: dict[str, Any] = {"log_config": None, "ws": "none", "timeout_graceful_shutdown": graceful_seconds}
        self._server = uvicorn.Server(uvicorn.Config(create_app(self.config), **settings))
        self._thread = threading.Thread(target=self._server.run, args=([listening],), daemon=True)
        self._thread.start()
        self._wait()

    def _wait(self) -> None:
        import httpx2

        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                if httpx2.get(f"{self.url}/health").status_code == 200:
                    return
            except httpx2.TransportError:
                pass
            time.sleep(0.02)
        raise AssertionError("the server did not start")

    def stop(self) -> None:
        self._server.should_exit = True
        self._thread.join(30)
        assert not self._thread.is_alive()
