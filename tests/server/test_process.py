"""The command `llm-serve` as a process: signals, exit codes, and what it logs."""

from __future__ import annotations

import contextlib
import json
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from calling import call
from serve_process import ServeProcess

from llm_edge.server import cli

ASKED: list[Any] = [{"role": "user", "content": "Hello"}]
LONG = {"messages": ASKED, "ignore_eos": True, "temperature": 1, "seed": 1, "max_tokens": 400, "stream": True}
CANARY = "canary-0123456789"


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def status(url: str) -> int:
    try:
        return httpx2.get(f"{url}/health").status_code
    except httpx2.TransportError:
        return 0


class Stream:
    """A streamed answer, read on a thread; `events` are the data of its events."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        self.events: list[str] = []
        self.failed = False
        self._thread = threading.Thread(target=self._read, args=(url, body))
        self._thread.start()

    def _read(self, url: str, body: dict[str, Any]) -> None:
        try:
            with httpx2.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
                for line in response.iter_lines():
                    if line.startswith("data: "):
                        self.events.append(line.removeprefix("data: "))
        except httpx2.TransportError:
            self.failed = True

    def wait(self) -> None:
        self._thread.join(60)
        assert not self._thread.is_alive()


@pytest.fixture
def process(models_folder: Path, tmp_path: Path) -> Iterator[Callable[..., ServeProcess]]:
    """Starts `llm-serve` with the tiny model and waits until it is loaded."""
    started: list[ServeProcess] = []

    def start(*words: object) -> ServeProcess:
        options = ("--models", models_folder, "--model", "tiny", "--precision", "fp32")
        started.append(ServeProcess(*options, *words, cwd=tmp_path))
        until(lambda: status(started[-1].url) == 200)
        return started[-1]

    yield start
    for each in started:
        each.__exit__()


def test_sigterm_lets_streams_end_and_refuses_new_requests(process: Callable[..., ServeProcess]) -> None:
    server = process()
    stream = Stream(server.url, {**LONG, "max_tokens": 900})
    until(lambda: len(stream.events) > 2)
    server.process.send_signal(signal.SIGTERM)
    until(lambda: status(server.url) in (503, 0) or stream.events[-1] == "[DONE]")
    with contextlib.suppress(httpx2.TransportError):  # the stream has ended meanwhile, and so has the server
        refused = httpx2.post(f"{server.url}/v1/chat/completions", json={"messages": ASKED})
        assert refused.status_code == 503
        assert refused.json()["error"]["code"] == "shutting_down"
        assert int(refused.headers["retry-after"]) >= 1
    stream.wait()
    assert not stream.failed
    assert stream.events[-1] == "[DONE]"
    assert json.loads(stream.events[-2])["choices"][0]["finish_reason"] == "length"
    assert server.wait()[0] == 0


def test_streams_that_take_too_long_are_ended_properly(process: Callable[..., ServeProcess]) -> None:
    server = process("--drain-seconds", "0")
    stream = Stream(server.url, {**LONG, "max_tokens": 900})
    until(lambda: len(stream.events) > 2)
    server.process.send_signal(signal.SIGTERM)
    stream.wait()
    assert stream.events[-1] == "[DONE]"
    assert json.loads(stream.events[-2])["choices"][0]["finish_reason"] is not None
    assert server.wait()[0] == 0


def test_a_second_signal_ends_the_server_at_once(process: Callable[..., ServeProcess]) -> None:
    server = process("--drain-seconds", "600")
    with socket.create_connection(("127.0.0.1", int(server.url.rpartition(":")[2]))) as client:
        body = json.dumps({**LONG, "max_tokens": 900, "n": 16}).encode()
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
        client.sendall(head.encode() + body)
        client.recv(1)  # and reads no more
        server.process.send_signal(signal.SIGTERM)
        until(lambda: status(server.url) != 200)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait()[0] in (0, 130)


def test_access_lines_contain_no_query_body_or_key(process: Callable[..., ServeProcess]) -> None:
    server = process("--log-level", "access", "--api-key", CANARY)
    headers = {"authorization": f"Bearer {CANARY}"}
    httpx2.get(f"{server.url}/v1/models?secret=query-canary", headers=headers)
    httpx2.post(f"{server.url}/v1/chat/completions", json={"messages": ASKED, "max_tokens": 1}, headers=headers)
    httpx2.post(f"{server.url}/tokenize", json={"content": "body-canary"}, headers={"x-api-key": "wrong-canary"})
    httpx2.get(f"{server.url}/a%0Ab%1b", headers=headers)
    code, err = server.stop()
    assert code == 0
    assert "canary" not in err
    assert re.search(r"127\.0\.0\.1 GET /v1/models 200 \d+ B \d+\.\d{3} s\n", err)
    assert "POST /v1/chat/completions 200" in err
    assert "POST /tokenize 401" in err
    assert "GET /a%0Ab%1B 404" in err


def test_requests_are_not_logged_by_default(process: Callable[..., ServeProcess]) -> None:
    server = process()
    httpx2.get(f"{server.url}/v1/models")
    assert "/v1/models" not in server.stop()[1]


def test_an_address_in_use_gets_one_line(models_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, out, err = call(cli.main, capsys, "llm-serve", "--models", models_folder, "--port", port)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert f"127.0.0.1:{port}: Address already in use: choose another --host or --port" in err


@pytest.mark.parametrize("exists", [True, False])
def test_a_server_without_models_starts_and_logs_the_remedy(tmp_path: Path, exists: bool) -> None:
    folder = tmp_path / "models"
    if exists:
        folder.mkdir()
    with ServeProcess("--models", folder, cwd=tmp_path) as server:
        until(lambda: status(server.url) == 200)
        response = httpx2.post(f"{server.url}/v1/chat/completions", json={"messages": ASKED})
        assert response.status_code == 404
        assert "llm-export" in response.json()["error"]["message"]
        code, err = server.stop()
    assert code == 0
    assert err.count("\n") == 1
    assert "llm-export" in err


@pytest.mark.parametrize("option", ["--version", "-h", "--help"])
def test_version_and_help_need_no_model(capsys: pytest.CaptureFixture[str], option: str) -> None:
    code, out, err = call(cli.main, capsys, "llm-serve", option)
    assert (code, err) == (0, "")
    assert out.startswith("llm-edge ") or "--config" in out


@pytest.mark.parametrize("words", [["--port", "70000"], ["--provider", "gpu"], ["--nonsense"], ["--host", "0.0.0.0"]])
def test_wrong_options_exit_with_2(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert call(cli.main, capsys, "llm-serve", *words)[0] == 2


def test_clients_that_never_read_and_half_open_connections_hold_up_nobody(
    process: Callable[..., ServeProcess],
) -> None:
    server = process("--parallel", "4")
    port = int(server.url.rpartition(":")[2])
    body = json.dumps({**LONG, "max_tokens": 200}).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n".encode()
    connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(220)]
    try:
        for connection in connections[:20]:
            connection.sendall(head + body)
        for connection in connections[20:]:
            connection.sendall(head[:40])
        for _ in range(3):
            answer = httpx2.post(
                f"{server.url}/v1/chat/completions", json={"messages": ASKED, "max_tokens": 2}, timeout=60
            )
            assert answer.status_code == 200
    finally:
        for connection in connections:
            connection.close()
    assert server.stop()[0] == 0
