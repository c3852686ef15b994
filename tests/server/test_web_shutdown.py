"""The server's shutdown while the chat page is open: its streams end, and what was answered is saved."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import httpx2

from llm_edge.chat.history.store import Store


def test_sigterm_ends_the_streams_of_open_pages_and_saves_answers(models_folder: Path, tmp_path: Path) -> None:
    code = "from llm_edge.server.cli import main; main()"
    command = [sys.executable, "-c", code, "--models", str(models_folder), "--model", "tiny", "--port", "0"]
    env = {**os.environ, "LLM_EDGE_DATA": str(tmp_path), "LLM_EDGE_CONFIG": str(tmp_path)}
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env)
    try:
        assert server.stdout is not None
        found = re.search(r"http://\S+", server.stdout.readline())
        assert found is not None
        with httpx2.Client(base_url=f"{found[0]}/ui/api", timeout=60) as http:
            params = {"max_tokens": 8, "temperature": 0.0, "min_tokens": 8}
            begun = http.post("/ask", json={"text": "Hello", "params": params}).json()
            with http.stream("GET", f"/chats/{begun['chat']}/events") as events:
                lines = events.iter_lines()
                assert next(lines) == "event: chat"
                server.send_signal(signal.SIGTERM)
                assert any("data" in line for line in lines)  # reads to the end, which would not come by itself
        server.communicate(timeout=20)  # less than the time for which running answers are awaited
    finally:
        server.kill()
        server.communicate()
    with Store(tmp_path / "conversations.sqlite3") as store:
        answer = store.load(begun["chat"]).path()[1]
    assert answer.finished
    assert answer.figures["tokens"] == 8
