"""Upstreams: models of OpenAI-compatible servers, reached by all protocols, and by nothing that the configuration does
not name."""

from __future__ import annotations

import io
import json
import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import anthropic
import httpx2
import openai
import pytest
from openai_server import Server, chunk, event, text_events
from serving import Served

from llm_edge.runtime.errors import InputError
from llm_edge.server.upstream_config import UpstreamConfig, parse_upstreams, read_upstreams

CANARY = "sk-canary-1234567890"
ASKED: list[Any] = [{"role": "user", "content": "Hello"}]
CHAT = {"model": "up/small", "messages": ASKED}


@pytest.fixture(scope="module")
def fake() -> Iterator[Server]:
    server = Server()
    yield server
    server.stop()


@pytest.fixture(autouse=True)
def fresh(fake: Server) -> None:
    fake.reset()


def config(
    url: str, models: tuple[str, ...] = ("small",), *, private: bool = True, key: str = CANARY
) -> UpstreamConfig:
    return UpstreamConfig("up", url, models, key, "", private)


@pytest.fixture(scope="module")
def relay(served: Served, fake: Server, models_folder: Path) -> Iterator[Served]:
    """A server with two upstreams: a fake one, and another server of ours."""
    ours = UpstreamConfig("ours", f"{served.url}/v1", ("tiny", "missing"), "", "", True)
    server = Served(models_folder, models={"default": "tiny", "precision": "fp32"}, upstreams=(config(fake.url), ours))
    yield server
    server.stop()


@pytest.fixture
def logged() -> Iterator[io.StringIO]:
    """What is logged."""
    stream = io.StringIO()
    handler = logging.StreamHandler(stream)
    logging.getLogger().addHandler(handler)
    yield stream
    logging.getLogger().removeHandler(handler)


def post(server: Served, **body: Any) -> httpx2.Response:
    return httpx2.post(f"{server.url}/v1/chat/completions", json={**CHAT, **body}, timeout=30, trust_env=False)


def test_models_are_listed_with_the_name_of_the_upstream(relay: Served) -> None:
    ids = [each["id"] for each in httpx2.get(f"{relay.url}/v1/models").json()["data"]]
    assert {"tiny", "up/small", "ours/tiny"} <= set(ids)
    assert httpx2.get(f"{relay.url}/v1/models/up/small").json()["owned_by"] == "up"


def test_every_list_of_models_has_those_of_upstreams(relay: Served) -> None:
    def get(path: str) -> Any:
        return httpx2.get(relay.url + path).json()

    assert {"tiny:fp32", "up/small"} <= {each["name"] for each in get("/api/tags")["models"]}
    assert {"name": "up/small", "type": "openai", "description": "OpenAI-compatible model: up/small"} in get(
        "/models/available"
    )
    shown = httpx2.post(f"{relay.url}/api/show", json={"model": "up/small"}).json()
    assert shown["capabilities"] == ["completion", "tools"]
    assert httpx2.post(f"{relay.url}/api/chat", json={"model": "up/small"}).json()["done_reason"] == "load"


def test_the_original_service_can_switch_to_an_upstream(relay: Served) -> None:
    def switch(name: str) -> Any:
        return httpx2.post(f"{relay.url}/models/switch", json={"model_name": name}).json()["success"]

    assert switch("ours/tiny")
    try:
        assert httpx2.get(f"{relay.url}/models/current").json()["type"] == "openai"
        assert httpx2.get(f"{relay.url}/model/info").json()["model_name"] == "ours/tiny"
        answer = httpx2.post(f"{relay.url}/chat", json={"messages": ASKED, "max_length": 3}, timeout=30).json()
        assert answer["usage"]["output_tokens"] == 3
        assert answer["model_info"]["model"] == "ours/tiny"
        assert httpx2.post(f"{relay.url}/generate", params={"prompt": "x"}).status_code == 400
    finally:
        assert switch("tiny")


def test_all_protocols_give_the_text_of_the_upstream(relay: Served, served: Served) -> None:
    settings: dict[str, Any] = {"temperature": 0, "max_tokens": 8}
    direct = post(served, model="tiny", **settings).json()["choices"][0]["message"]["content"]
    with openai.OpenAI(base_url=f"{relay.url}/v1", api_key="-") as client:
        whole = client.chat.completions.create(model="ours/tiny", messages=ASKED, **settings)
        assert whole.choices[0].message.content == direct
        assert whole.choices[0].finish_reason == "length"
        assert whole.usage is not None
        assert (whole.usage.completion_tokens, whole.usage.prompt_tokens > 0) == (8, True)
        stream = client.chat.completions.create(model="ours/tiny", messages=ASKED, stream=True, **settings)
        assert "".join(each.choices[0].delta.content or "" for each in stream if each.choices) == direct
        response = client.responses.create(model="ours/tiny", input=ASKED, temperature=0, max_output_tokens=8)
        assert response.output_text == direct
    with anthropic.Anthropic(base_url=relay.url, api_key="-") as other:
        message = other.messages.create(model="ours/tiny", messages=ASKED, max_tokens=8, extra_body={"temperature": 0})
    assert [block.text for block in message.content if block.type == "text"] == [direct]
    body = {"model": "ours/tiny", "messages": ASKED, "stream": False, "options": {"temperature": 0, "num_predict": 8}}
    assert httpx2.post(f"{relay.url}/api/chat", json=body, timeout=30).json()["message"]["content"] == direct


def test_requests_carry_parameters_and_tools(relay: Served, fake: Server) -> None:
    def called() -> Iterator[bytes]:
        function = {"name": "look_up", "arguments": '{"word":'}
        yield chunk(tool_calls=[{"index": 0, "id": "c1", "type": "function", "function": function}])
        yield chunk(tool_calls=[{"index": 0, "function": {"arguments": ' "x"}'}}])
        yield chunk("tool_calls")
        yield b"data: [DONE]\n\n"

    fake.events = called
    tool = {"type": "function", "function": {"name": "look_up", "parameters": {"type": "object"}}}
    call = {"id": "c0", "type": "function", "function": {"name": "look_up", "arguments": '{"word": "a"}'}}
    history = [
        *ASKED,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "c0", "content": "b"},
    ]
    body = {"messages": history, "tools": [tool], "tool_choice": "required", "temperature": 0.5, "top_k": 3}
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    found = post(relay, **body, stop=["x"], seed=1, response_format=schema).json()["choices"][0]
    assert found["finish_reason"] == "tool_calls"
    assert found["message"]["tool_calls"][0]["function"] == {"name": "look_up", "arguments": '{"word": "x"}'}
    sent = fake.requests[-1]
    assert (sent["model"], sent["temperature"], sent["top_k"], sent["stop"], sent["seed"]) == (
        "small",
        0.5,
        3,
        ["x"],
        1,
    )
    assert sent["tool_choice"] == "required"
    assert sent["response_format"]["json_schema"]["schema"] == {"type": "object"}
    assert json.loads(sent["messages"][1]["tool_calls"][0]["function"]["arguments"]) == {"word": "a"}
    assert fake.headers[-1]["authorization"] == f"Bearer {CANARY}"
    assert fake.headers[-1]["host"] == fake.url.split("/")[2]


def test_reasoning_and_usage_are_passed_on(relay: Served, fake: Server) -> None:
    def thought() -> Iterator[bytes]:
        yield chunk(reasoning_content="Hm.")
        yield from text_events("Yes", prompt_tokens=7, completion_tokens=2)

    fake.events = thought
    found = post(relay, reasoning_effort="low").json()
    assert found["choices"][0]["message"]["reasoning_content"] == "Hm."
    assert (found["usage"]["prompt_tokens"], found["usage"]["completion_tokens"]) == (7, 2)
    assert fake.requests[-1]["reasoning_effort"] == "low"


@pytest.mark.parametrize("body", [{"logprobs": True}, {"temperature": -1}, {"regex": "a+"}, {"temperature": "x"}])
def test_what_an_upstream_cannot_do_is_refused(relay: Served, body: dict[str, Any]) -> None:
    assert post(relay, **body).status_code == 400


def test_other_endpoints_say_that_there_are_only_chats(relay: Served) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "x"}), ("/tokenize", {"content": "x"}), ("/v1/embeddings", {"input": "x"}),
    ):  # fmt: skip
        response = httpx2.post(relay.url + path, json={"model": "ours/tiny", **body})
        assert (response.status_code, "upstream" in response.text) == (400, True)


def test_errors_of_an_upstream_are_one_line_without_the_key(relay: Served, fake: Server, logged: io.StringIO) -> None:
    for status, expected in ((400, 400), (422, 400), (401, 502), (403, 502), (404, 502), (429, 429), (500, 502)):
        answer = (status, {"message": f"bad\n{CANARY}\x1b[31m", "code": "some_code"})
        fake.refuse = lambda _, answer=answer: answer
        for stream in (False, True):
            response = post(relay, stream=stream)
            assert response.status_code == expected
            assert CANARY not in response.text
            assert "\\n" not in response.json()["error"]["message"]
    assert post(relay, model="ours/missing").status_code == 502
    assert CANARY not in logged.getvalue()
    assert CANARY not in repr(relay.config)
    for path in ("/metrics", "/v1/models", "/openapi.json", "/props", "/api/tags"):
        assert CANARY not in httpx2.get(relay.url + path).text


@pytest.mark.parametrize(
    "data",
    [
        b"", b"data: nonsense\n\n", b"data: [1]\n\n", b"data: {\"choices\": 1}\n\n", chunk(content="x"),
        event({"error": {"message": f"broken {CANARY}"}}), event({"error": CANARY}), b"x" * (5 << 20),
        event({"choices": [{"index": 7, "delta": {"content": "x"}, "finish_reason": "stop"}]}),
        event({"choices": [None, {"delta": {"tool_calls": [1, {"function": 1}]}}]}),
        b"data: " + b"[" * 100_000 + b"\n\n",
    ],
)  # fmt: skip
def test_malformed_answers_are_errors(relay: Served, fake: Server, data: bytes) -> None:
    fake.events = lambda: iter([data] if data else [])
    response = post(relay)
    assert response.status_code == 502, response.text
    assert CANARY not in response.text
    streamed = post(relay, stream=True)
    assert '"error"' in streamed.text
    assert CANARY not in streamed.text


def test_leaving_an_answer_closes_the_connection_to_the_upstream(relay: Served, fake: Server) -> None:
    def endless() -> Iterator[bytes]:
        while True:
            time.sleep(0.01)
            yield chunk(content="x")

    fake.events = endless
    with httpx2.stream("POST", f"{relay.url}/v1/chat/completions", json={**CHAT, "stream": True}) as response:
        next(response.iter_lines())
    assert fake.gone.wait(20)


# ---- where requests may go

PRIVATE = [
    "http://127.0.0.1/v1", "http://localhost/v1", "http://[::1]/v1", "http://169.254.169.254/v1", "http://10.0.0.1/v1",
    "http://192.168.1.1/v1", "http://172.16.0.1/v1", "http://[fe80::1]/v1", "http://[fd00::1]/v1", "http://0.0.0.0/v1",
    "http://[::]/v1", "http://[::ffff:127.0.0.1]/v1", "http://[::ffff:169.254.169.254]/v1", "http://2130706433/v1",
    "http://0x7f000001/v1", "http://127.1/v1", "http://100.64.0.1/v1", "http://[64:ff9b::7f00:1]/v1",
    "http://[2002:7f00:1::]/v1", "http://224.0.0.1/v1", "http://017700000001/v1", "https://127.0.0.1/v1",
]  # fmt: skip


@pytest.fixture
def relay_to(models_folder: Path) -> Iterator[Callable[[UpstreamConfig], Served]]:
    started: list[Served] = []

    def start(*upstreams: UpstreamConfig) -> Served:
        started.append(Served(models_folder, models={"default": "tiny", "precision": "fp32"}, upstreams=upstreams))
        return started[-1]

    yield start
    for server in started:
        server.stop()


def test_private_addresses_need_permission(models_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    connected: list[Any] = []
    connect = socket.socket.connect
    upstreams = tuple(UpstreamConfig(f"up{n}", url, ("small",)) for n, url in enumerate(PRIVATE))
    server = Served(models_folder, models={"default": "tiny", "precision": "fp32"}, upstreams=upstreams)

    def noted(self: socket.socket, address: Any) -> None:
        connected.append(address)
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", noted)
    try:
        for number in range(len(PRIVATE)):
            response = post(server, model=f"up{number}/small")
            assert (response.status_code, PRIVATE[number]) == (502, PRIVATE[number])
            assert response.json()["error"]["code"] in ("upstream_forbidden", "upstream_unreachable")
    finally:
        server.stop()
    assert {address[1] for address in connected} <= {server.port}


def test_a_name_with_a_public_and_a_private_address_is_refused(
    fake: Server, relay_to: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = socket.getaddrinfo
    port = int(fake.url.split(":")[2].partition("/")[0])

    def two(host: Any, *rest: Any, **named: Any) -> Any:
        if host != "two.example":
            return resolve(host, *rest, **named)
        kind = (socket.AF_INET, socket.SOCK_STREAM, 6, "")
        return [(*kind, ("93.184.216.34", port)), (*kind, ("127.0.0.1", port))]

    monkeypatch.setattr(socket, "getaddrinfo", two)
    server = relay_to(config(f"http://two.example:{port}/v1", private=False))
    response = post(server)
    assert (response.status_code, response.json()["error"]["code"]) == (502, "upstream_forbidden")
    assert fake.requests == []


def test_a_name_is_resolved_once_and_the_connection_goes_there(
    fake: Server, relay_to: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    resolve = socket.getaddrinfo
    port = int(fake.url.split(":")[2].partition("/")[0])
    asked: list[str] = []

    def changing(host: Any, *rest: Any, **named: Any) -> Any:
        if host != "changing.example":
            return resolve(host, *rest, **named)
        asked.append(host)
        address = "127.0.0.1" if len(asked) == 1 else "127.0.0.9"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port))]

    monkeypatch.setattr(socket, "getaddrinfo", changing)
    server = relay_to(config(f"http://changing.example:{port}/v1"))
    assert post(server).status_code == 200
    assert len(asked) == 1
    assert fake.headers[-1]["host"] == f"changing.example:{port}"


def test_redirects_and_proxies_are_not_followed(
    fake: Server, relay_to: Callable[..., Served], monkeypatch: pytest.MonkeyPatch
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as trap:
        trap.settimeout(0.2)
        target = f"http://127.0.0.1:{trap.getsockname()[1]}"
        with socket.create_server(("127.0.0.1", 0)) as redirecting:
            server = relay_to(config(f"http://127.0.0.1:{redirecting.getsockname()[1]}/v1"))
            monkeypatch.setenv("HTTP_PROXY", target)
            monkeypatch.setenv("ALL_PROXY", target)
            redirecting.settimeout(20)

            def answer() -> None:
                connection, _ = redirecting.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(f"HTTP/1.1 307 X\r\nLocation: {target}/\r\nContent-Length: 0\r\n\r\n".encode())

            thread = threading.Thread(target=answer)
            thread.start()
            response = post(server)
            thread.join()
        assert (response.status_code, response.json()["error"]["code"]) == (502, "upstream_redirects")
        with pytest.raises(TimeoutError):
            trap.accept()


# ---- the file


GOOD = {"name": "up", "url": "https://api.example.com/v1", "models": ["a"]}


@pytest.mark.parametrize(
    "change",
    [
        {"url": "file:///etc/passwd"}, {"url": "ftp://host/v1"}, {"url": "https://user:password@host/v1"}, {"url": ""},
        {"url": "http://"}, {"url": "http://host/v1?x=1"}, {"url": "http://host/v1#x"}, {"url": 1},
        {"url": "gopher://x"},
        {"url": "http://host:99999/v1"}, {"url": "http://ho st/v1"}, {"url": "//host/v1"}, {"url": "host"},
        {"name": "a/b"}, {"name": ""}, {"name": None}, {"models": []}, {"models": "a"}, {"models": [1]}, {"other": 1},
        {"allow_private": "yes"}, {"key_env": "NOT_SET_ANYWHERE"}, {"key_file": "/nowhere/at/all"}, {"key_file": 1},
    ],
)  # fmt: skip
def test_bad_entries_are_refused_in_one_line(change: dict[str, Any]) -> None:
    with pytest.raises(InputError) as caught:
        parse_upstreams([{**GOOD, **change}], "upstreams.yaml")
    assert str(caught.value).startswith("upstreams.yaml: upstream 1: ")
    assert "\n" not in str(caught.value)


def test_keys_come_from_the_environment_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UP_KEY", CANARY)
    (tmp_path / "key").write_text(f"{CANARY}\n")
    for given in ({"key_env": "UP_KEY"}, {"key_file": str(tmp_path / "key")}):
        (found,) = parse_upstreams([{**GOOD, **given}], "f")
        assert found.key == CANARY
        assert CANARY not in repr(found)
    monkeypatch.setenv("UP_KEY", f"{CANARY} two")
    with pytest.raises(InputError) as caught:
        parse_upstreams([{**GOOD, "key_env": "UP_KEY"}], "f")
    assert CANARY not in str(caught.value)
    (tmp_path / "bad.yaml").write_text(f"- {{name: [{CANARY}")
    with pytest.raises(InputError):
        read_upstreams(tmp_path / "bad.yaml")
    with pytest.raises(InputError):
        read_upstreams(tmp_path / "missing.yaml")


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_keys_appear_in_no_process_list_and_no_log(
    models_folder: Path, tiny_checkpoint: Path, fake: Server, tmp_path: Path
) -> None:
    models = tmp_path / "models"
    shutil.copytree(models_folder / "tiny", models / "tiny")
    (tmp_path / "keys").write_text(f"{CANARY}-own\n")
    entry = {**GOOD, "url": fake.url, "models": ["small"], "key_env": "UP_KEY", "allow_private": True}
    (tmp_path / "upstreams.yaml").write_text(json.dumps({"upstreams": [entry]}))
    command = [
        sys.executable,
        "-c",
        "from llm_edge.server.cli import main; main()",
        "--models",
        str(models),
        "--port=0",
    ]
    command += ["--api-key-file", str(tmp_path / "keys"), "--upstreams", str(tmp_path / "upstreams.yaml")]
    command += ["--allow-uploads", "--precision=fp32", "--threads=1"]
    environment = {**os.environ, "UP_KEY": CANARY, "PYTHONUNBUFFERED": "1"}
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)
    try:
        assert process.stdout is not None
        url = process.stdout.readline().split()[-1]
        client = httpx2.Client(base_url=url, headers={"authorization": f"Bearer {CANARY}-own"}, timeout=60)
        fake.refuse = lambda _: (500, {"message": CANARY})
        assert CANARY not in client.post("/v1/chat/completions", json=CHAT).text
        files = [("files", (path.name, path.read_bytes())) for path in tiny_checkpoint.iterdir() if path.is_file()]
        job = client.post("/models/jobs", files=files, data={"validation": "no"}).json()
        exporting: list[Path] = []
        deadline = time.monotonic() + 60
        while not exporting and time.monotonic() < deadline:
            lists = [path for path in Path("/proc").glob("[0-9]*/cmdline") if "export_command" in _read(path)]
            exporting = [path for path in lists if str(models) in _read(path)]
        (path, *_) = exporting
        for each in (path, Path(f"/proc/{process.pid}/cmdline"), path.with_name("environ")):
            assert CANARY not in _read(each)
        client.delete(f"/models/jobs/{job['id']}")
        client.post("/v1/chat/completions", json={"model": CANARY, "messages": []})
        client.close()
    finally:
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=60)
    assert CANARY not in output


def _read(path: Path) -> str:
    try:
        return path.read_bytes().decode("utf-8", "replace")
    except OSError:
        return ""
