"""Adding models: uploads and ids of the Hugging Face Hub become exports, with progress, limits and a report."""

from __future__ import annotations

import json
import shutil
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from fake_hub import FakeHub
from serving import Served

from llm_edge.server.config import JobConfig
from llm_edge.server.uploads import stored_name

FAST = {"precision": "fp32", "validation": "false"}
HOSTILE_NAMES = [
    "../escaped.safetensors", "../../escaped.bin", "../../../../../../tmp/escaped.pt", "/tmp/escaped.gguf",
    "..\\escaped.bin", "..\\..\\escaped.pth", "C:\\escaped.bin", "C:escaped.bin", "\\\\host\\share\\escaped.bin",
    "//host/share/escaped.bin", "....//escaped.bin", "..%2fescaped.bin", "%2e%2e%2fescaped.bin", "a/../../escaped.bin",
    "./escaped.bin", "~/escaped.bin", "$HOME/escaped.bin", "`touch escaped`.bin", "; touch escaped;.bin",
    "escaped.bin\x00.txt", "escaped\x00.bin", "escaped\n.bin", "escaped\r\nX: y.bin", "\u202enib.depacse.bin",
    "-o escaped.bin", "--output=escaped.bin", "--config=../escaped.bin", "con.bin", "nul.pt", "aux.safetensors",
    ".bin", "..", ".", "", "/", "../tokenizer.json", "..\\config.json", "/etc/config.yaml", "a" * 5000 + ".bin",
    "\udcff/../escaped.bin".encode("utf-8", "replace").decode(), "../.uploads/escaped.bin", "tiny/manifest.json",
]  # fmt: skip
FOREIGN_SOURCES = [
    "http://169.254.169.254/latest/meta-data", "https://169.254.169.254/a", "169.254.169.254/latest",
    "file:///etc/passwd",
    "file:/etc/passwd", "/etc/passwd", "./tiny", "../tiny", "owner/../name", "owner/..", "../..", "owner/name/extra",
    "https://huggingface.co/owner/name", "http://user:password@host/a", "user@host/name", "owner/name?x=1",
    "owner/name#x",
    "owner/name@../../x", "owner\\name", "owner/name\n", "--output=/tmp/x/y", "-o/x", "owner/na me", "owner//name",
    "[::1]/name", "localhost:8000/name", "owner/model.gguf", "own\u0435r/name", "", "smollm2/", "owner/name@a b",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tiny_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("parent") / "models"
    shutil.copytree(tiny_bundle, folder / "tiny")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Served]:
    server = Served(folder, models={"default": "tiny", "precision": "fp32"}, jobs=JobConfig(True, True))
    yield server
    server.stop()


@pytest.fixture
def start(folder: Path) -> Iterator[Callable[[JobConfig], Served]]:
    """Starts servers with other limits."""
    started: list[Served] = []

    def start(config: JobConfig) -> Served:
        started.append(Served(folder, models={"default": "tiny", "precision": "fp32"}, jobs=config))
        return started[-1]

    yield start
    for server in started:
        server.stop()


def files_of(checkpoint: Path, weights: str = "Any Name.SafeTensors", field: str = "files") -> list[Any]:
    contents = {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.is_file()}
    return [(field, (weights if name == "model.safetensors" else name, data)) for name, data in contents.items()]


def upload(server: Served, files: list[Any], **fields: str) -> httpx2.Response:
    return httpx2.post(f"{server.url}/models/jobs", files=files, data=fields, timeout=60)


def events(server: Served, job: dict[str, Any]) -> list[dict[str, Any]]:
    with httpx2.stream("GET", f"{server.url}/models/jobs/{job['id']}/events", timeout=300) as response:
        return [json.loads(line[6:]) for line in response.iter_lines() if line.startswith("data: ")]


def answers(server: Served, model: str) -> bool:
    body = {"model": model, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 3}
    answer = httpx2.post(f"{server.url}/v1/chat/completions", json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()["usage"]["completion_tokens"] > 0


def leftovers(folder: Path) -> list[Path]:
    return sorted((folder / ".uploads").glob("upload-*"))


def until(condition: Callable[[], bool], seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


# ---- from upload to model


def test_an_upload_becomes_a_model_with_a_report(server: Served, folder: Path, tiny_checkpoint: Path) -> None:
    response = upload(server, files_of(tiny_checkpoint), precision="fp32")
    assert response.status_code == 202, response.text
    job = response.json()
    assert response.headers["location"] == f"/models/jobs/{job['id']}"
    assert job["model"] == "any-name"
    seen = events(server, job)
    assert seen[-1]["status"] == "finished", seen[-1]
    assert {each["stage"] for each in seen} > {"reading", "validating"}
    (precision,) = seen[-1]["report"]["precisions"]
    assert precision["name"] == "fp32"
    assert 0 <= precision["max_difference"] < 1e-3
    assert answers(server, "any-name")
    assert leftovers(folder) == []
    assert httpx2.get(f"{server.url}/models/jobs/{job['id']}").json() == seen[-1]
    assert job["id"] in [each["id"] for each in httpx2.get(f"{server.url}/models/jobs").json()["data"]]
    httpx2.delete(f"{server.url}/models/jobs/{job['id']}")
    assert httpx2.get(f"{server.url}/models/jobs/{job['id']}").status_code == 404


def test_the_original_service_uploads_and_switches(server: Served, tiny_checkpoint: Path) -> None:
    url = f"{server.url}/models/upload"
    fields = {**FAST, "name": "switched"}
    response = httpx2.post(url, files=files_of(tiny_checkpoint, field="model_file"), data=fields, timeout=300)
    assert (response.status_code, response.json()) == (
        200, {"success": True, "message": "Successfully loaded switched"},
    )  # fmt: skip
    assert httpx2.get(f"{server.url}/models/current").json()["name"] == "switched"
    refused = httpx2.post(url, files={"model_file": ("model.exe", b"x")})
    assert refused.status_code == 200
    assert refused.json()["success"] is False


def test_a_model_of_the_hub_is_pulled_as_by_ollama(
    start: Callable[[JobConfig], Served], tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    hub = FakeHub()
    hub.add(
        "owner/Pulled.Model", {path.name: path.read_bytes() for path in tiny_checkpoint.iterdir() if path.is_file()}
    )
    hub.start()
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    try:
        server = start(JobConfig(downloads=True))
        asked = {"model": "hf.co/owner/Pulled.Model:fp32"}
        with httpx2.stream("POST", f"{server.url}/api/pull", json=asked, timeout=300) as response:
            lines = [json.loads(line) for line in response.iter_lines()]
        assert lines[0] == {"status": "pulling manifest"}
        assert lines[-1] == {"status": "success"}, lines[-1]
        assert answers(server, "pulled-model")
        again = httpx2.post(f"{server.url}/api/pull", json={**asked, "stream": False})
        assert again.json() == {"status": "success"}
        taken = httpx2.post(f"{server.url}/models/jobs", json={"source": "owner/Pulled.Model"})
        assert taken.status_code == 409
    finally:
        hub.stop()


# ---- what is refused


def test_adding_models_is_off_unless_allowed(start: Callable[[JobConfig], Served]) -> None:
    server = start(JobConfig())
    uploaded = upload(server, [("files", ("model.safetensors", b"x"))])
    assert (uploaded.status_code, "--allow-uploads" in uploaded.text) == (403, True)
    for path, body in (("/models/jobs", {"source": "owner/name"}), ("/api/pull", {"model": "owner/name"})):
        response = httpx2.post(server.url + path, json=body)
        assert (response.status_code, "--allow-downloads" in response.text) == (403, True)
    original = httpx2.post(f"{server.url}/models/upload", files={"model_file": ("model.bin", b"x")})
    assert original.status_code == 200
    assert original.json()["success"] is False
    allowed = httpx2.get(f"{server.url}/models/jobs").json()["allowed"]
    assert allowed == {"uploads": False, "downloads": False}


def test_names_of_clients_decide_on_no_path(server: Served, folder: Path) -> None:
    before = sorted(folder.parent.rglob("*"))
    assert len(HOSTILE_NAMES) >= 40
    for name in HOSTILE_NAMES:
        # The last file is refused, so that no export starts after the first has been written.
        response = upload(server, [("files", (name, b"x")), ("files", ("refused.exe", b"x"))])
        assert response.status_code == 400, (name, response.text)
        assert stored_name(name) is None or "/" not in str(stored_name(name))
    created = set(folder.parent.rglob("*")) - set(before)
    assert created <= {folder / ".uploads", folder / ".uploads" / "empty"}
    assert not list(Path("/tmp").glob("escaped*"))
    assert not list(Path.cwd().glob("escaped*"))


def test_files_get_names_of_ours() -> None:
    assert stored_name("../../My Model.SAFETENSORS") == "model.safetensors"
    assert stored_name("x\\Foo-00002-of-00012.bin") == "pytorch_model-00002-of-00012.bin"
    assert stored_name("Q-00001-of-00002.GGUF") == "model-00001-of-00002.gguf"
    assert stored_name("dir/Tokenizer.JSON") == "tokenizer.json"
    for name in ("manifest.json", "a.py", "tokenizer.json.exe", "model.bin/..", "adapter_config.json"):
        assert stored_name(name) is None


@pytest.mark.parametrize("name", ["../x", "tiny", ".hidden", "A", "a b", "a/b", "x" * 200, "-", "a.", "ü"])
def test_names_of_models_are_checked(server: Served, folder: Path, name: str) -> None:
    response = upload(server, [("files", ("model.safetensors", b"x"))], name=name)
    assert response.status_code in (400, 409), response.text
    assert leftovers(folder) == []


def test_sources_other_than_hub_ids_are_refused(server: Served) -> None:
    before = httpx2.get(f"{server.url}/models/jobs").json()["data"]
    for source in FOREIGN_SOURCES:
        response = httpx2.post(f"{server.url}/models/jobs", json={"source": source})
        assert response.status_code == 400, source
    for body in ({}, {"source": 1}, {"source": "a/b", "precision": "../x"}, {"source": "a/b", "other": 1}, [], None):
        assert httpx2.post(f"{server.url}/models/jobs", json=body).status_code == 400
    assert httpx2.get(f"{server.url}/models/jobs").json()["data"] == before


def test_malformed_forms_are_refused_and_leave_nothing(server: Served, folder: Path) -> None:
    part = b'--b\r\nContent-Disposition: form-data; name="files"; filename="model.bin"\r\n\r\nx\r\n'
    headers = {"content-type": "multipart/form-data; boundary=b"}
    long_field = b'--b\r\nContent-Disposition: form-data; name="name"\r\n\r\n' + b"x" * 10_000 + b"\r\n"
    long_header = b"--b\r\nX: " + b"x" * 100_000 + b"\r\n\r\nx\r\n"
    for body in (
        b"",
        b"nonsense",
        part,
        part + part + b"--b--\r\n",
        long_field,
        long_header,
        b"--b--\r\n",
        part * 3000,
    ):
        response = httpx2.post(f"{server.url}/models/jobs", content=body, headers=headers)
        assert response.status_code == 400, body[:100]
    for kind in ("multipart/form-data", "multipart/mixed; boundary=b", "multipart/form-data; boundary="):
        response = httpx2.post(f"{server.url}/models/jobs", content=part, headers={"content-type": kind})
        assert response.status_code == 400
    assert leftovers(folder) == []


def test_an_upload_over_the_limit_is_refused(start: Callable[[JobConfig], Served], folder: Path) -> None:
    server = start(JobConfig(uploads=True, max_upload=200_000))
    body = [("files", ("model.bin", b"x" * 300_000))]
    assert upload(server, body).status_code == 413

    def chunks() -> Iterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="files"; filename="model.bin"\r\n\r\n'
        for _ in range(10):
            yield b"x" * 100_000

    headers = {"content-type": "multipart/form-data; boundary=b"}
    try:
        status = httpx2.post(f"{server.url}/models/jobs", content=chunks(), headers=headers).status_code
    except httpx2.TransportError:
        status = 413  # the connection was closed before the rest was sent
    assert status == 413
    until(lambda: leftovers(folder) == [])


# ---- while it happens


def test_the_server_answers_during_an_upload_that_then_breaks_off(server: Served, folder: Path) -> None:
    head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="model.bin"\r\n\r\n'
    with socket.create_connection(("127.0.0.1", server.port)) as connection:
        request = "POST /models/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000000\r\n"
        connection.sendall(f"{request}Content-Type: multipart/form-data; boundary=b\r\n\r\n".encode() + head)
        for _ in range(5):
            connection.sendall(b"x" * 500_000)
            assert httpx2.get(f"{server.url}/health").status_code == 200
        until(lambda: len(leftovers(folder)) == 1)
    until(lambda: leftovers(folder) == [])


def test_a_running_export_is_cancelled(server: Served, folder: Path, tiny_checkpoint: Path) -> None:
    job = upload(server, files_of(tiny_checkpoint), name="cancelled").json()
    waiting = upload(server, files_of(tiny_checkpoint), name="waiting").json()
    assert upload(server, files_of(tiny_checkpoint), name="waiting").status_code == 409
    until(lambda: httpx2.get(f"{server.url}/models/jobs/{job['id']}").json()["stage"] is not None)
    for each in (waiting, job):
        ended = httpx2.delete(f"{server.url}/models/jobs/{each['id']}", timeout=30).json()
        assert ended["status"] == "cancelled"
    assert not (folder / "cancelled").exists()
    assert leftovers(folder) == []


def test_damaged_weights_fail_in_one_line(server: Served, folder: Path) -> None:
    job = upload(server, [("files", ("broken.safetensors", b"nonsense"))]).json()
    last = events(server, job)[-1]
    assert last["status"] == "failed"
    assert last["error"]
    assert "\n" not in last["error"]
    assert not (folder / "broken").exists()


def test_exports_have_limits_of_time_and_memory(
    start: Callable[[JobConfig], Served], folder: Path, tiny_checkpoint: Path
) -> None:
    late = start(JobConfig(uploads=True, seconds=0.3))
    last = events(late, upload(late, files_of(tiny_checkpoint), name="late").json())[-1]
    assert (last["status"], "longer than" in last["error"]) == ("failed", True)
    small = start(JobConfig(uploads=True, memory=30_000_000))
    last = events(small, upload(small, files_of(tiny_checkpoint), name="small").json())[-1]
    assert last["status"] == "failed"
    assert "\n" not in last["error"]
    assert leftovers(folder) == []


def test_only_some_uploads_are_received_at_the_same_time(server: Served, folder: Path) -> None:
    head = b'--b\r\nContent-Disposition: form-data; name="files"; filename="model.bin"\r\n\r\n'
    request = "POST /models/jobs HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9000000\r\n"
    whole = f"{request}Content-Type: multipart/form-data; boundary=b\r\n\r\n".encode() + head
    connections = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(4)]
    for connection in connections:
        connection.sendall(whole)
    until(lambda: len(leftovers(folder)) == 4)
    refused = upload(server, [("files", ("model.bin", b"x"))])
    assert (refused.status_code, int(refused.headers["retry-after"]) > 0) == (429, True)
    for connection in connections:
        connection.close()
    until(lambda: leftovers(folder) == [])
