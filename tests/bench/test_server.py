"""`python -m llm_edge.bench.server`: a table for people and one JSON document as the last line."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from serving import Served

from llm_edge.bench.server import CLIENTS, Sample, summary


def test_a_table_and_a_json_document_are_printed(tiny_bundle: Path) -> None:
    peer = Served(tiny_bundle.parent, models={"default": tiny_bundle.name, "precision": "fp32", "parallel": 16})
    try:
        command = [sys.executable, "-m", "llm_edge.bench.server", str(tiny_bundle), "--precision", "fp32"]
        command += ["--rounds", "1", "--threads", "1", "--peer", peer.url, "--peer-model", tiny_bundle.name]
        command += ["--drift", "0.02"]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    finally:
        peer.stop()
    assert done.returncode == 0, done.stderr
    *table, last = done.stdout.splitlines()
    report = json.loads(last)
    assert len(table) == 1 + 2 * len(CLIENTS) + 1
    assert report["drift"]["answers"] > 0
    assert report["drift"]["errors"] == []
    assert report["servers"].keys() == {"llm-serve", "peer"}
    for by_clients in report["servers"].values():
        assert list(by_clients) == [str(clients) for clients in CLIENTS]
        for figures in by_clients.values():
            assert figures["tokens_per_second"] > 0
            assert figures["first_token_p95_s"] > 0
            assert 0 < figures["python_share"] < 1


def test_a_server_that_cannot_start_gets_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "llm_edge.bench.server", str(tmp_path / "missing"), "--precision", "fp32"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode != 0
    assert "Traceback" not in done.stderr


def test_the_summary_has_medians_and_the_95th_percentile() -> None:
    samples = [
        Sample(10.0, [0.1 * n for n in range(10)], 0.1),
        Sample(30.0, [1.0] * 10, None),
        Sample(20.0, [0.0], 0.3),
    ]
    found = summary(samples)
    assert found["tokens_per_second"] == 20.0
    assert found["first_token_p95_s"] == 1.0
    assert found["python_share"] == pytest.approx(0.2)
