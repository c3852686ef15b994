"""Requests to the server without a client library, for tests of what is on the wire."""

from __future__ import annotations

import json
from typing import Any

import httpx2
from serving import Served


def post(served: Served, path: str, **fields: Any) -> httpx2.Response:
    """The response to a JSON body with these fields."""
    return httpx2.post(served.url + path, json=fields, timeout=60)


def chat(served: Served, messages: Any, **fields: Any) -> Any:
    """The choice of a chat completion."""
    response = post(served, "/v1/chat/completions", messages=messages, **fields)
    assert response.status_code == 200, response.text
    return response.json()["choices"][0]


def events(response: httpx2.Response) -> list[Any]:
    """The data of server-sent events, without `[DONE]`."""
    assert response.status_code == 200, response.text
    lines = [line[6:] for line in response.text.splitlines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines if line != "[DONE]"]
