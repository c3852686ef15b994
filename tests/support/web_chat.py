"""The web page's API with scripted answers, for tests."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from serving import Served

from llm_edge.chat.fake import FakeResponder
from llm_edge.runtime.bundle import Bundle
from llm_edge.server.web import chats


class WebServer:
    """A running server whose answers are scripted by `fake`; `data` holds its store and settings."""

    def __init__(self, models: Path, data: Path, fake: FakeResponder, **config: Any) -> None:
        self.data = data
        self.fake = fake
        self.served = Served(models, models={"default": "tiny", "precision": "fp32"}, **config)
        self.url = self.served.url
        self.http = httpx2.Client(base_url=f"{self.url}/ui/api", timeout=60)

    def get(self, path: str, **query: Any) -> Any:
        return self._checked(self.http.get(path, params=query))

    def send(self, method: str, path: str, body: Any = None, **query: Any) -> Any:
        return self._checked(self.http.request(method, path, json=body, params=query))

    def post(self, path: str, **body: Any) -> Any:
        return self.send("POST", path, body)

    @staticmethod
    def _checked(response: httpx2.Response) -> Any:
        assert response.status_code == 200, response.text
        return response.json()

    def ask(self, text: str, **body: Any) -> dict[str, int]:
        """Ask, and wait for the end; returns the ids of the conversation and the answer."""
        begun: dict[str, int] = self.post("/ask", text=text, **body)
        self.wait(begun["chat"])
        return begun

    def events(self, chat: int) -> Iterator[tuple[str, Any]]:
        """Names and data of the events of a conversation."""
        with self.http.stream("GET", f"/chats/{chat}/events") as response:
            assert response.status_code == 200
            name = ""
            for line in response.iter_lines():
                if line.startswith("event: "):
                    name = line[7:]
                elif line.startswith("data: "):
                    yield name, json.loads(line[6:])

    def chat(self, number: int) -> Any:
        """The conversation as the page gets it first."""
        for name, data in self.events(number):
            assert name == "chat"
            return data
        raise AssertionError("no event")

    def wait(self, number: int) -> None:
        """Wait until no answer is being generated in a conversation."""
        for name, data in self.events(number):
            if name == "chat" and data["running"] is None:
                return

    def stop(self) -> None:
        self.http.close()
        self.served.stop()


def start(models: Path, data: Path, patch: pytest.MonkeyPatch, **config: Any) -> WebServer:
    """Start a server whose store and settings are in `data`."""
    patch.setenv("LLM_EDGE_DATA", str(data))
    patch.setenv("LLM_EDGE_CONFIG", str(data))
    fake = FakeResponder(context_length=1024, name=Bundle.open(models / "tiny").name, detail="fp32")
    patch.setattr(chats, "LocalResponder", lambda _engine: fake)
    return WebServer(models, data, fake, **config)


def until(condition: Any, seconds: float = 30.0) -> None:
    """Wait until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition never held"
        time.sleep(0.02)
