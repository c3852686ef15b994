"""Models of upstreams on the chat page."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path

import openai_server
import pytest
import web_chat
from openai_server import Server
from web_chat import WebServer, until

from llm_edge.server.upstream_config import UpstreamConfig


@pytest.fixture(scope="module")
def upstream() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture(scope="module")
def web(models_folder: Path, tmp_path_factory: pytest.TempPathFactory, upstream: Server) -> Iterator[WebServer]:
    with pytest.MonkeyPatch.context() as patch:
        configs = (
            UpstreamConfig("up", upstream.url, ("small",), "", "", True),
            UpstreamConfig("gone", "http://127.0.0.1:9/v1", ("away",), "", "", True),
        )
        server = web_chat.start(models_folder, tmp_path_factory.mktemp("data"), patch, upstreams=configs)
        yield server
        server.stop()


@pytest.fixture(autouse=True)
def fresh(upstream: Server) -> None:
    upstream.reset()


def test_models_of_upstreams_are_in_the_menu(web: WebServer) -> None:
    models = {each["name"]: each for each in web.get("/models")["models"]}
    assert models["up/small"]["state"] == "loaded"
    details = web.get("/models/details", model="up/small")
    assert details["loaded"]
    assert web.send("POST", "/models/load", model="up/small")["loaded"]
    web.send("POST", "/presets", {"name": "mine", "params": {"temperature": 0.3}}, model="up/small")
    names = [each["name"] for each in web.get("/models/details", model="up/small")["presets"]]
    assert "mine" in names


def test_an_upstream_answers_with_the_parameters_of_the_page(web: WebServer, upstream: Server) -> None:
    begun = web.ask("Hi", model="up/small", params={"temperature": 0.5, "logprobs": 3}, system="Be brief.")
    chat = web.chat(begun["chat"])
    answer = chat["messages"][-1]
    assert (answer["text"], answer["model"], answer["error"]) == ("Hello there", "up/small", "")
    assert answer["blocks"] == ["<p>Hello there</p>\n"]
    (asked,) = upstream.requests
    assert asked["model"] == "small"
    assert asked["temperature"] == 0.5
    assert [message["role"] for message in asked["messages"]] == ["system", "user"]
    begun = web.ask("And you?", chat=begun["chat"], model="tiny:fp32")  # conversations go on with another model
    assert web.chat(begun["chat"])["messages"][-1]["model"] != "up/small"


def test_an_answer_of_an_upstream_can_be_stopped(web: WebServer, upstream: Server) -> None:
    waiting = threading.Event()

    def endless() -> Iterator[bytes]:
        yield openai_server.chunk(content="First")
        waiting.wait(30)

    upstream.events = endless
    begun = web.post("/ask", text="Hi", model="up/small")
    for _, data in web.events(begun["chat"]):
        if "First" in json.dumps(data):
            break
    web.post(f"/chats/{begun['chat']}/stop")
    web.wait(begun["chat"])
    waiting.set()
    until(upstream.gone.is_set)
    answer = web.chat(begun["chat"])["messages"][-1]
    assert (answer["text"], answer["error"]) == ("First", "")


@pytest.mark.parametrize(("model", "reason"), [("gone/away", "cannot be reached"), ("up/small", "rejects the key")])
def test_failures_of_an_upstream_are_shown_below_the_answer(
    web: WebServer, upstream: Server, model: str, reason: str
) -> None:
    upstream.refuse = lambda _asked: (401, {"message": "no"})
    begun = web.ask("Hi", model=model)
    assert reason in web.chat(begun["chat"])["messages"][-1]["error"]


def test_an_answer_of_an_upstream_cannot_be_continued(web: WebServer, upstream: Server) -> None:
    upstream.events = lambda: openai_server.text_events("Half", finish="length")
    begun = web.ask("Hi", model="up/small")
    web.post(f"/chats/{begun['chat']}/continue", message=begun["message"], model="up/small")
    web.wait(begun["chat"])
    answer = web.chat(begun["chat"])["messages"][-1]
    assert (answer["text"], "regenerate" in answer["error"]) == ("Half", True)
