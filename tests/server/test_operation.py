"""The server itself: hosts, origins, keys, sizes, disconnects, queues and models within a budget."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import pytest
from serving import Served

ASKED: list[Any] = [{"role": "user", "content": "Hello"}]
ENDLESS = {"messages": ASKED, "ignore_eos": True, "temperature": 1, "max_tokens": 900, "stream": True}


def metric(served: Served, name: str, headers: dict[str, str] | None = None) -> float:
    text = httpx2.get(f"{served.url}/metrics", headers=headers).text
    lines = [line for line in text.splitlines() if line.startswith(f"llm_edge_{name}{{")]
    return sum(float(line.rpartition(" ")[2]) for line in lines)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_foreign_hosts_are_refused(served: Served) -> None:
    for host in ("evil.example", "evil.example:8000", "", "127.0.0.1.evil.example"):
        assert httpx2.get(f"{served.url}/health", headers={"host": host}).status_code == 400
    for host in ("localhost", f"127.0.0.1:{served.port}", "[::1]:99"):
        assert httpx2.get(f"{served.url}/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/chat", "/api/chat", "/models/switch", "/nowhere"])
def test_writes_of_foreign_pages_are_refused(served: Served, path: str) -> None:
    for origin in ("https://evil.example", "null", "http://localhost:1"):
        response = httpx2.post(served.url + path, json={}, headers={"origin": origin})
        assert response.status_code == 403
    multipart = httpx2.post(served.url + path, files={"f": b"x"}, headers={"origin": "https://evil.example"})
    assert multipart.status_code == 403
    assert httpx2.post(served.url + path, json={}, headers={"origin": served.url}).status_code != 403


def test_reads_of_foreign_pages_get_no_cors_header(served: Served) -> None:
    response = httpx2.get(f"{served.url}/v1/models", headers={"origin": "https://evil.example"})
    assert "access-control-allow-origin" not in response.headers


def test_configured_origins_get_cors_headers(models_folder: Path) -> None:
    server = Served(models_folder, allowed_origins=("https://app.example",))
    try:
        headers = {"origin": "https://app.example"}
        asked = httpx2.options(f"{server.url}/v1/models", headers=headers)
        assert asked.status_code == 204
        for name in ("origin", "methods", "headers"):
            assert asked.headers[f"access-control-allow-{name}"]
        assert httpx2.get(f"{server.url}/v1/models", headers=headers).headers["access-control-allow-origin"]
    finally:
        server.stop()


def test_a_key_is_needed_everywhere_but_for_health(models_folder: Path) -> None:
    server = Served(models_folder, api_keys=("first-secret", "second-secret"))
    try:
        assert httpx2.get(f"{server.url}/health").status_code == 200
        for headers in ({}, {"authorization": "Bearer wrong"}, {"x-api-key": ""}, {"authorization": "first-secret"}):
            response = httpx2.get(f"{server.url}/v1/models", headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["type"] == "authentication_error"
        for headers in (
            {"authorization": "Bearer first-secret"},
            {"authorization": "bearer second-secret"},
            {"x-api-key": "second-secret"},
        ):
            assert httpx2.get(f"{server.url}/v1/models", headers=headers).status_code == 200
    finally:
        server.stop()


def test_large_bodies_are_refused_whether_announced_or_not(served: Served) -> None:
    limit = served.config.max_body
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {limit + 1}\r\n\r\n"
        connection.sendall(head.encode())
        assert b"413" in connection.recv(1000)

    def chunks() -> Any:
        for _ in range(limit // (1 << 20) + 2):
            yield b" " * (1 << 20)

    with pytest.raises(httpx2.TransportError):  # noqa: PT012 (the answer, or the end of the connection)
        response = httpx2.post(f"{served.url}/v1/chat/completions", content=chunks())
        assert response.status_code == 413
        raise httpx2.TransportError("answered")


@pytest.mark.parametrize(
    "body", [b"", b"{", b"[" * 100_000, b'{"messages": ' + b"[" * 5000, b"\xff\xfe", b"null", b"5"]
)
def test_malformed_bodies_are_the_clients_fault(served: Served, body: bytes) -> None:
    for path in ("/v1/chat/completions", "/v1/messages", "/api/chat", "/chat", "/tokenize", "/v1/embeddings"):
        assert 400 <= httpx2.post(served.url + path, content=body).status_code < 500


def test_tokens_and_prompts_round_trip(served: Served) -> None:
    text = "Hello, wörld 🙂"
    tokens = httpx2.post(f"{served.url}/tokenize", json={"content": text}).json()["tokens"]
    assert httpx2.post(f"{served.url}/detokenize", json={"tokens": tokens}).json()["content"] == text
    pieces = httpx2.post(f"{served.url}/tokenize", json={"content": "Hello", "with_pieces": True}).json()["tokens"]
    assert "".join(piece["piece"] for piece in pieces) == "Hello"
    prompt = httpx2.post(f"{served.url}/apply-template", json={"messages": ASKED}).json()["prompt"]
    assert prompt == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert httpx2.post(f"{served.url}/detokenize", json={"tokens": [10**9]}).status_code == 400


def test_clients_that_leave_free_their_slots(served: Served) -> None:
    wanted = httpx2.post(
        f"{served.url}/v1/chat/completions", json={"messages": ASKED, "max_tokens": 200, "temperature": 0}
    ).json()["choices"][0]["message"]["content"]
    cancelled = metric(served, "cancelled_total")

    def leave(number: int) -> None:
        body = {**ENDLESS, "stream": number % 2 == 0, "seed": number}
        try:
            with httpx2.stream("POST", f"{served.url}/v1/chat/completions", json=body, timeout=0.05) as response:
                for _, _line in zip(range(number % 5), response.iter_lines(), strict=False):
                    pass
        except httpx2.TimeoutException:
            pass

    with ThreadPoolExecutor(8) as pool:
        neighbour = pool.submit(
            httpx2.post,
            f"{served.url}/v1/chat/completions",
            json={"messages": ASKED, "max_tokens": 200, "temperature": 0},
            timeout=60,
        )
        list(pool.map(leave, range(40)))
    assert neighbour.result().json()["choices"][0]["message"]["content"] == wanted
    until(lambda: metric(served, "active") == 0 and metric(served, "waiting") == 0)
    assert metric(served, "cancelled_total") > cancelled


def test_clients_that_leave_and_a_shutdown_log_no_traceback(models_folder: Path) -> None:
    logged = io.StringIO()
    handler = logging.StreamHandler(logged)
    logging.getLogger().addHandler(handler)
    server = Served(models_folder, models={"default": "tiny", "precision": "fp32"}, graceful_seconds=1)
    try:
        for stream in (True, False):
            with contextlib.suppress(httpx2.TimeoutException):
                body = {**ENDLESS, "stream": stream}
                httpx2.post(f"{server.url}/v1/chat/completions", json=body, timeout=0.1)
        until(lambda: metric(server, "active") == 0 and metric(server, "cancelled_total") >= 1)
        unfinished = socket.create_connection(("127.0.0.1", server.port))
        unfinished.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
    finally:
        server.stop()
        logging.getLogger().removeHandler(handler)
    assert b" 503 " in unfinished.recv(1000)
    unfinished.close()
    assert "Traceback" not in logged.getvalue()


def test_a_full_queue_answers_429_with_retry_after(models_folder: Path) -> None:
    server = Served(models_folder, models={"parallel": 1, "queue": 1, "precision": "fp32"})
    try:
        url, stop = f"{server.url}/v1/chat/completions", threading.Event()

        def hold() -> None:
            while not stop.is_set():
                with httpx2.stream("POST", url, json=ENDLESS, timeout=60) as response:
                    for _line in response.iter_lines():
                        if stop.is_set():
                            return

        answers = []

        def refuses() -> bool:
            answers.append(httpx2.post(url, json={"messages": ASKED, "max_tokens": 1}, timeout=60))
            return bool(answers[-1].status_code == 429)

        with ThreadPoolExecutor(2) as pool:
            pool.submit(hold)
            pool.submit(hold)
            try:
                until(refuses)
            finally:
                stop.set()
        refused = answers[-1]
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["code"] == "queue_full"
    finally:
        server.stop()


def test_models_are_loaded_on_demand_and_unloaded_for_others(models_folder: Path) -> None:
    server = Served(models_folder, models={"default": "tiny", "precision": "fp32", "memory": 20 << 20})
    try:  # the budget holds one model

        def ask(name: str) -> Any:
            body = {"model": name, "messages": ASKED, "max_tokens": 40, "temperature": 0}
            return httpx2.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)

        def loaded() -> set[str]:
            return {model["name"] for model in httpx2.get(f"{server.url}/api/ps").json()["models"]}

        assert loaded() == {"tiny:fp32"}
        assert ask("other").status_code == 200
        assert loaded() == {"other:fp32"}
        with ThreadPoolExecutor(12) as pool:  # answers are never cut when models take turns
            found = list(pool.map(ask, ["tiny", "other"] * 10))
        assert [response.status_code for response in found] == [200] * 20
        assert len({response.json()["choices"][0]["message"]["content"] for response in found}) == 1
        assert {response.json()["usage"]["completion_tokens"] for response in found} == {40}
    finally:
        server.stop()


def test_a_model_beyond_the_budget_is_refused(models_folder: Path) -> None:
    server = Served(models_folder, models={"memory": 1 << 20})
    try:
        response = httpx2.post(f"{server.url}/v1/chat/completions", json={"messages": ASKED})
        assert response.status_code == 503
        assert response.json()["error"]["code"] == "insufficient_memory"
    finally:
        server.stop()


def test_a_damaged_bundle_fails_its_requests_and_no_others(models_folder: Path, tmp_path: Path) -> None:
    shutil.copytree(models_folder / "tiny", tmp_path / "damaged")
    shutil.copytree(models_folder / "tiny", tmp_path / "good")
    weights = next((tmp_path / "damaged" / "onnx").glob("*_data"))
    weights.write_bytes(bytes(weights.stat().st_size))
    server = Served(tmp_path, models={"default": "good", "precision": "fp32"})
    try:
        for _ in range(2):
            body = {"model": "damaged", "messages": ASKED, "max_tokens": 2}
            response = httpx2.post(f"{server.url}/v1/chat/completions", json=body)
            assert response.status_code == 503
            assert str(tmp_path) not in response.text  # the log has the path
        body = {"model": "good", "messages": ASKED, "max_tokens": 2}
        assert httpx2.post(f"{server.url}/v1/chat/completions", json=body).status_code == 200
    finally:
        server.stop()


def test_the_openapi_document_is_served_without_scripts_from_elsewhere(served: Served) -> None:
    document = httpx2.get(f"{served.url}/openapi.json").json()
    assert "/v1/chat/completions" in document["paths"]
    assert httpx2.get(f"{served.url}/docs").status_code == 404


def test_metrics_count_requests(served: Served) -> None:
    before = metric(served, "requests_total")
    httpx2.post(f"{served.url}/v1/chat/completions", json={"messages": ASKED, "max_tokens": 2})
    assert metric(served, "requests_total") == before + 1
