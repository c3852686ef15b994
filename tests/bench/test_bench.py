"""`llm-bench`: a table for people and one JSON document as the last line; figures are checked for form, not size."""

from __future__ import annotations

import importlib
import json
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from calling import call

from llm_edge.bench import cli
from llm_edge.bench.driver import COLUMNS, MIN_CONTEXT, Worker, median, median_ratio
from llm_edge.exporter.export import export
from llm_edge.exporter.options import ExportOptions
from llm_edge.runtime.errors import MachineError

KEYS = {"prefill_128", "prefill_512", "decode_0", "decode_512", "cold_start_s", "peak_mb", "python_share"}
QUICK = ("--rounds", "1", "--repeats", "1", "--threads", "1")

Bench = Callable[..., tuple[int, str, str]]


@pytest.fixture
def llm_bench(capfd: pytest.CaptureFixture[str]) -> Bench:
    """Runs the command; returns exit code, stdout and stderr, including those of its workers."""
    return lambda *arguments: call(cli.main, capfd, "llm-bench", *arguments)


def check_figures(figures: dict[str, Any]) -> None:
    assert figures.keys() == KEYS
    for key, value in figures.items():
        if value is None:  # the model ended its text immediately, so there is no rate
            assert key.startswith(("decode", "python"))
        else:
            assert value > 0, key
    share = figures["python_share"]
    assert share is None or share < 1


def test_a_table_and_a_json_document_are_printed(tiny_bundle: Path, llm_bench: Bench) -> None:
    code, out, err = llm_bench(tiny_bundle, *QUICK)
    assert code == 0, err
    *table, last = out.splitlines()
    report = json.loads(last)
    assert report.keys() == {"bundle", "machine", "threads", "rounds", "repeats", "precisions"}
    assert (report["bundle"], report["threads"], report["rounds"], report["repeats"]) == ("tiny", 1, 1, 1)
    assert report["machine"].endswith("threads")
    assert list(report["precisions"]) == ["fp32", "int8", "int4"]
    for figures in report["precisions"].values():
        check_figures(figures)
    assert COLUMNS.keys() == KEYS
    head, *rows = table
    for title, _ in COLUMNS.values():
        assert title in head
    by_name = {row.split()[0]: row for row in rows if row.strip()}
    for name, figures in report["precisions"].items():
        assert f"{figures['prefill_128']:,.0f} tok/s" in by_name[name]
        assert f"{figures['peak_mb']:,.0f} MB" in by_name[name]
    assert all(line.startswith("round 1 of 1: ") for line in err.splitlines())


def test_chosen_precisions_beside_another_engine(tiny_bundle: Path, llm_bench: Bench) -> None:
    other = shlex.join([sys.executable, "-m", "llm_edge.bench.worker", str(tiny_bundle), "fp32", "1"])
    code, out, err = llm_bench(tiny_bundle, "--precision", "int4, int8", *QUICK, "--against", other)
    assert code == 0, err
    report = json.loads(out.splitlines()[-1])
    assert set(report["precisions"]) == set(report["ratios"]) == {"int4", "int8"}
    assert report["against"] == other
    check_figures(report["other"])
    for name, ratios in report["ratios"].items():
        assert ratios.keys() == KEYS
        ours = report["precisions"][name]
        assert ratios["prefill_128"] == pytest.approx(ours["prefill_128"] / report["other"]["prefill_128"])


def test_ratios_are_medians_of_pairs() -> None:
    assert median([3.0, 1.0, 2.0]) == 2
    assert median([]) is None
    assert (
        median_ratio([2.0, 9.0, 8.0], [1.0, 3.0, 2.0]) == 3
    )  # median of the ratios 2, 3, 4, not the ratio of the medians
    assert median_ratio([], []) is None


def test_a_failing_engine_is_reported_in_one_line(tiny_bundle: Path, llm_bench: Bench) -> None:
    for command in ("false", "true", "echo not-json"):
        code, out, err = llm_bench(tiny_bundle, "--precision", "int8", *QUICK, "--against", command)
        assert (code, out) == (3, "")
        *progress, last = err.splitlines()
        assert last.startswith("error: ")
        assert all(line.startswith("round 1 of 1: ") for line in progress)


def test_an_engine_that_dies_during_a_request_is_reported_and_closed() -> None:
    worker = Worker(["sleep", "0.2"])
    with pytest.raises(MachineError, match=r"failed \(exit code 0\)"):
        worker.ask(tokens=[0] * 100_000)  # exceeds the pipe buffer, so the engine dies during the write
    worker.close()


@pytest.mark.parametrize("command", ["", " ", "/no/such/engine", "'"])
def test_an_invalid_engine_command_is_rejected(command: str, tiny_bundle: Path, llm_bench: Bench) -> None:
    code, out, err = llm_bench(tiny_bundle, "--precision", "int8", *QUICK, "--against", command)
    assert (code, out) == (2, "")
    assert err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err


def test_a_context_too_short_to_measure_is_rejected(tmp_path: Path, llm_bench: Bench) -> None:
    source = tiny.save_checkpoint(tmp_path / "short", max_position_embeddings=MIN_CONTEXT - 1)
    export(str(source), ExportOptions(tmp_path / "bundle", precision="int8", validate=False))
    code, out, err = llm_bench(tmp_path / "bundle", *QUICK)
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert f"its context of {MIN_CONTEXT - 1} is shorter than {MIN_CONTEXT}" in err


@pytest.mark.parametrize("name", ["engine", "draft", "chat", "peers.rows"])
def test_an_invalid_bundle_is_reported_in_one_line(
    name: str, capfd: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    main = importlib.import_module(f"llm_edge.bench.{name}").main
    folders = [tmp_path / "nowhere"] * (2 if name == "draft" else 1)
    code, out, err = call(main, capfd, name, *folders)
    assert (code, out) == (2, "")
    assert err == f"error: {tmp_path}/nowhere: no such bundle folder: create one with llm-export\n"
