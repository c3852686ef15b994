"""An uploaded model with a hostile chat template: it costs little, and the server keeps answering."""

from __future__ import annotations

import os
import shutil
import sys
import threading
from pathlib import Path

import httpx2
import pytest
from serve_process import ServeProcess

ATTACKS = {
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "hoard": "{% set n = namespace(x=[]) %}"
    "{% for i in range(99999) %}{% set n.x = n.x + ['x' * 100000 ~ i] %}{% endfor %}",
    "slices": "{% set a = 'x' * 8000000 %}{% for i in range(99999) %}{% set c = a[1:] %}{% endfor %}",
    "repeat": "{{ 'a' * 10**10 }}",
}
CHAT = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 2}


def processor_seconds(process: int) -> float:
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def peak_memory(process: int) -> int:
    line = next(line for line in Path(f"/proc/{process}/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_hostile_templates_of_uploads_are_stopped_while_the_server_answers(
    tiny_bundle: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "models" / "tiny")
    words = ("--models", tmp_path / "models", "--model", "tiny", "--precision", "fp32", "--allow-uploads")
    with ServeProcess(*words, cwd=tmp_path) as server, httpx2.Client(base_url=server.url, timeout=120) as client:
        client.post("/v1/chat/completions", json={**CHAT, "model": "tiny"})
        for name, template in ATTACKS.items():
            contents = {path.name: path.read_bytes() for path in tiny_checkpoint.iterdir() if path.is_file()}
            contents["chat_template.jinja"] = template.encode()
            files = [("files", (file, data)) for file, data in contents.items()]
            fields = {"name": name, "precision": "fp32", "validation": "no"}
            job = client.post("/models/jobs", files=files, data=fields).json()
            events = client.get(f"/models/jobs/{job['id']}/events").text
            assert '"status":"finished"' in events, events[-500:]
            # The model is loaded, and nothing but the template is left to be handled.
            assert client.post("/tokenize", json={"model": name, "content": "x"}).status_code == 200
            memory, seconds = peak_memory(server.process.pid), processor_seconds(server.process.pid)
            answered: list[int] = []
            ended = threading.Event()

            def look(answered: list[int] = answered, ended: threading.Event = ended) -> None:
                with httpx2.Client(base_url=server.url, timeout=10) as other:
                    answered.append(other.get("/health").status_code)
                    while not ended.wait(0.05):
                        answered.append(other.get("/health").status_code)

            watcher = threading.Thread(target=look)
            watcher.start()
            response = client.post("/v1/chat/completions", json={**CHAT, "model": name})
            ended.set()
            watcher.join()
            assert (response.status_code, "chat template" in response.text) == (400, True), response.text
            assert set(answered) == {200}
            assert processor_seconds(server.process.pid) - seconds < 3
            assert peak_memory(server.process.pid) - memory < 512 << 20
