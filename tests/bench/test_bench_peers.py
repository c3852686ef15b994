"""The comparison with other engines: arithmetic, tables and command line; no other engine is run here."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from calling import call
from sessions import open_file

from llm_edge.bench.driver import COLUMNS, Figures, Worker
from llm_edge.bench.peers import fidelity, long_context, machine, report, run
from llm_edge.bench.peers.engines import PEERS, choose
from llm_edge.runtime.bundle import Bundle
from llm_edge.runtime.errors import InputError, MachineError

FOLDER = Path(run.__file__).parent
WITHOUT_AMX = FOLDER / "without_amx.py"
VOCAB = 50

Peers = Callable[..., tuple[int, str, str]]


@pytest.fixture
def bench_peers(capfd: pytest.CaptureFixture[str]) -> Peers:
    """Runs the command; returns exit code, stdout and stderr, including those of its workers."""
    return lambda *arguments: call(run.main, capfd, "bench-peers", *arguments)


def figures(scale: float) -> Figures:
    """Three samples of each figure."""
    return {key: [scale * (number + 1), scale * 7, scale * 3] for number, key in enumerate(COLUMNS)}


# ---- fidelity


def write(path: Path, logits: torch.Tensor) -> Path:
    path.write_bytes(logits.numpy().astype("<f4").tobytes())
    return path


def test_divergence_matches_torch(tmp_path: Path) -> None:
    torch.manual_seed(0)
    expected = [torch.randn(rows, VOCAB) * 5 for rows in (130, 7)]
    found = [logits + torch.randn_like(logits) for logits in expected]
    found[1] += 1000.0  # the same probabilities
    ours = [write(tmp_path / f"a{i}", logits) for i, logits in enumerate(expected)]
    theirs = [write(tmp_path / f"b{i}", logits) for i, logits in enumerate(found)]
    p, q = (torch.cat(logits).double().log_softmax(-1) for logits in (expected, found))
    divergence = torch.nn.functional.kl_div(q, p, log_target=True, reduction="none").sum(-1)

    result = fidelity.compare(ours, theirs, VOCAB)
    assert result.positions == 137
    assert result.kl_mean == pytest.approx(divergence.mean().item(), rel=1e-4)
    assert result.top1 == (p.argmax(-1) == q.argmax(-1)).double().mean().item()
    same = fidelity.compare(ours, ours, VOCAB)
    assert (same.kl_mean, same.top1) == (0.0, 1.0)


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (torch.zeros(3, VOCAB), "of 3 positions, 4 were asked for"),
        (torch.zeros(4 * VOCAB - 1), "are no rows of 50 logits"),
        (torch.zeros(0), "0 bytes"),
        (torch.full((4, VOCAB), float("nan")), "not numbers"),
    ],
)
def test_logits_that_cannot_be_compared_are_rejected(made: torch.Tensor, reason: str, tmp_path: Path) -> None:
    expected, found = write(tmp_path / "a", torch.ones(4, VOCAB)), write(tmp_path / "b", made)
    with pytest.raises(MachineError, match=reason):
        fidelity.compare([expected], [found], VOCAB)


def test_windows_start_with_an_empty_cache() -> None:
    assert fidelity.windows(range(10), 7, 3) == [[0, 1, 2], [3, 4, 5], [6]]
    assert fidelity.windows(range(4), 7, 4) == [[0, 1, 2, 3]]


# ---- figures


def test_ratios_are_medians_of_paired_measurements() -> None:
    sizes = {"ours/int8": 150, "llama.cpp/Q8_0": 100, "openvino/int8": 300, "ours/int4": 80, "genai/int8": 600}
    measured = {name: figures(1.0) for name in sizes}
    measured["llama.cpp/Q8_0"] = figures(2.0)
    measured["openvino/int8"]["decode_0"] = []  # it produced no figures
    measured["genai/int8"]["prefill_512"] = [1.0, 1.0, 1.0]
    found = report.ratios(sizes, measured)
    assert list(found) == ["ours/int8"]  # int4 was not measured
    assert list(found["ours/int8"]) == ["llama.cpp/Q8_0", "openvino/int8", "genai/int8"]
    assert found["ours/int8"]["llama.cpp/Q8_0"] == {"size_mb": 1.5, **dict.fromkeys(report.SPEED, 0.5)}
    assert found["ours/int8"]["openvino/int8"]["decode_0"] is None
    assert found["ours/int8"]["genai/int8"]["prefill_512"] == 3  # median of 2, 7, 3
    assert found["ours/int8"]["genai/int8"]["size_mb"] == 0.25


def test_every_peer_of_a_pair_is_listed() -> None:
    peers = {f"{engine}/{name}" for engine, names in PEERS.items() for name in names}
    assert {other for others in report.PAIRS.values() for other in others} == peers


def test_markdown_contains_every_figure() -> None:
    sizes = {"ours/int8": 150_000_000, "llama.cpp/Q8_0": 100_000_000}
    measured = {"ours/int8": figures(30.0), "llama.cpp/Q8_0": figures(10.0)}
    measured["ours/int8"]["decode_512"] = []
    fidelities = {name: fidelity.Fidelity(2048, 0.00412, 0.9575) for name in sizes}
    text = report.markdown(
        {
            "bundle": "smol",
            "machine": "a processor, 2 threads",
            "amx": False,
            "threads": 2,
            "rounds": 3,
            "repeats": 5,
            "text": "some.txt",
            "positions": 2048,
            "versions": {"llama.cpp": "llama 1.2"},
            "engines": report.summarise(sizes, measured, fidelities),
            "ratios": report.ratios(sizes, measured),
        }
    )
    for part in (
        "smol; a processor, 2 threads, AMX refused",
        "2 threads for each",
        "llama 1.2",
        "15 samples",
        "some.txt",
    ):
        assert part in text
    rows = [line for line in text.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    table = {row[0]: row[1:] for row in cells}
    head = cells[0][1:]
    assert [len(row) for row in cells] == [len(cells[0])] * 4 + [len(cells[4])] * 3
    ours = dict(zip(head, table["ours/int8"], strict=True))
    assert (ours["size"], ours["prefill 128"], ours["mean KL"], ours["top-1"]) == (
        "150 MB",
        "90 tok/s",
        "0.0041",
        "95.8%",
    )
    assert ours["decode @512"] == ""
    assert table["int8 / llama.cpp/Q8_0"][:2] == ["1.50", "3.00"]


def test_the_table_of_all_models_has_llama_cpps_better_result_in_each_column() -> None:
    sizes = {"ours/int8": 150, "llama.cpp/Q8_0": 100, "llama.cpp/Q8_0-no-flash": 100, "openvino/int8": 300}
    measured = {name: figures(1.0) for name in sizes}
    measured["llama.cpp/Q8_0-no-flash"] = figures(2.0)  # twice as fast, and twice the memory and time to start
    divergences = {"ours/int8": 0.004, "llama.cpp/Q8_0": 0.005, "llama.cpp/Q8_0-no-flash": 0.003, "openvino/int8": 0.1}
    fidelities = {name: fidelity.Fidelity(2048, value, 0.9) for name, value in divergences.items()}
    reports = [
        {
            "bundle": bundle,
            "engines": report.summarise(sizes, measured, fidelities),
            "ratios": report.ratios(sizes, measured),
        }
        for bundle in ("smol", "gemma")
    ]
    title, *rows = report.summary_table(reports)
    assert [row[0] for row in rows] == ["smol int8 / Q8_0", "gemma int8 / Q8_0"]
    cells = dict(zip(title[1:], rows[0][1:], strict=True))
    assert cells == {
        "size": "1.50",
        "prefill 512": "0.50",
        "decode @0, @512": "0.50, 0.50",
        "cold start": "1.00 (5.00 s)",
        "peak memory": "1.00 (6 MB)",
        "mean KL": "0.004 / 0.003",
    }


# ---- measurements


def test_contenders_are_selected_by_engine_or_by_name() -> None:
    held = ["fp32", "int8", "int4"]
    everything = [f"{engine}/{name}" for engine, names in PEERS.items() for name in names]
    assert choose(None, held) == ["ours/int8", "ours/int4", *everything]
    assert choose("openvino, ours/fp32", held) == ["ours/fp32", *(f"openvino/{name}" for name in PEERS["openvino"])]
    assert choose("genai/int8,ours,genai/int8", held) == ["ours/int8", "ours/int4", "genai/int8"]
    for wrong in ("", "int8", "genai/", "ours/int4-mixed", "genai,nobody"):
        with pytest.raises(InputError, match="--only"):
            choose(wrong, held)


def test_a_bundle_alone_is_measured(tiny_bundle: Path, bench_peers: Peers, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("What is the capital of France? " * 200, encoding="utf-8")
    block = tmp_path / "block.md"
    quick = ("--only", "ours/int8", "--rounds", 1, "--repeats", 1, "--threads", 1, "--text", text, "--work", tmp_path)
    code, out, err = bench_peers(tiny_bundle, *quick, "--markdown", block)
    assert code == 0, err
    (found,) = json.loads(out.splitlines()[-1])["models"]
    assert (found["bundle"], found["text"], found["ratios"], found["versions"]) == ("tiny", "text.txt", {}, {})
    (row,) = found["engines"].values()
    assert 512 <= found["positions"] <= 2048
    assert 0 < row["kl_mean"] < 0.5
    assert row["size_mb"] == Bundle.open(tiny_bundle).precision("int8").size / 1e6
    assert "ours/int8" in out
    assert "| ours/int8 |" in block.read_text(encoding="utf-8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["block.md", "text.txt"]  # no logits files remain


def test_several_bundles_are_measured_in_one_run(tiny_bundle: Path, bench_peers: Peers, tmp_path: Path) -> None:
    text = tmp_path / "text.txt"
    text.write_text("What is the capital of France? " * 200, encoding="utf-8")
    quick = ("--rounds", 1, "--repeats", 1, "--threads", 1, "--text", text, "--work", tmp_path / "work")
    code, out, err = bench_peers(tiny_bundle, tiny_bundle, "--only", "ours/int8,ours/int4", *quick)
    assert code == 0, err
    found = json.loads(out.splitlines()[-1])["models"]
    assert [list(each["engines"]) for each in found] == [["ours/int8", "ours/int4"]] * 2


def test_long_prompts_are_measured(tiny_bundle: Path, capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    quick = ("--only", "ours/int8", "--rounds", 1, "--threads", 1, "--lengths", "700,1,2000000", "--work", tmp_path)
    code, out, err = call(long_context.main, capfd, "long-context", tiny_bundle, *quick)
    assert code == 0, err
    engines = json.loads(out.splitlines()[-1])["engines"]
    assert engines["ours/int8"].keys() >= {"prefill 700", "prefill 1", "peak 700", "peak 1"}
    assert "prefill 700" in out
    assert "2000000" not in out  # no room in the context
    for wrong in ("x", "2000000", ""):
        code, out, err = call(long_context.main, capfd, "long-context", tiny_bundle, "--lengths", wrong)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert err.startswith("error: --lengths: ")


def test_tokens_of_our_sequences_are_counted_together(tiny_bundle: Path) -> None:
    worker = Worker([sys.executable, "-m", "llm_edge.bench.peers.engine_worker", str(tiny_bundle), "int8", "1"])
    try:
        one, four = (worker.ask(rows=[[5, 6, 7 + row] for row in range(width)], count=30)["rate"] for width in (1, 4))
    finally:
        worker.close()
    assert min(one, four) > 0


def test_our_logits_equal_those_of_a_session(tiny_bundle: Path, tmp_path: Path) -> None:
    bundle, target = Bundle.open(tiny_bundle), tmp_path / "logits"
    worker = Worker([sys.executable, "-m", "llm_edge.bench.peers.our_logits", str(tiny_bundle), "int8", "1"])
    try:
        worker.ask(logits=[9, 8, 7, 6], to=str(target))  # leaves no state
        assert worker.ask(logits=[5, 6, 7], to=str(target)) == {"rows": 3}
    finally:
        worker.close()
    info = bundle.precision("int8")
    expected = open_file(bundle.file(info.model), bundle.shape, info.share_buffer, "cpu", 1).step(
        [5, 6, 7], num_logits=0
    )
    found = np.fromfile(target, "<f4").reshape(3, -1)
    np.testing.assert_array_equal(found, expected)


ENGINE = """
import sys, time
import serving
replies = serving.private_stdout()
print("chatter")
def generate(tokens, count):
    times = []
    for _ in range(min(count, 3)):
        time.sleep(0.01)
        times.append(time.perf_counter())
    return times
serving.serve(generate, lambda tokens: bytes(range(len(tokens))), replies)
"""


def test_the_engine_worker_answers_requests(tmp_path: Path) -> None:
    worker = Worker([sys.executable, "-c", f"import sys; sys.path.insert(0, {str(FOLDER)!r})\n{ENGINE}"])
    try:
        reply = worker.ask(tokens=[1, 2], count=48)
        assert reply["count"] == 3
        assert 0.01 <= reply["first"] < 1
        assert 0.02 <= reply["rest"] < 1
        assert worker.ask(tokens=[1], count=1)["rest"] == 0
        assert worker.ask(logits=[5, 5, 5], to=str(tmp_path / "x")) == {"rows": 3}
        assert (tmp_path / "x").read_bytes() == b"\0\1\2"
        assert 1 < worker.ask(peak=True)["peak_mb"] < 64  # without the memory of this process
    finally:
        worker.close()


# ---- bad usage


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--only", "nobody"), "--only: 'nobody' is not known"),
        (("--text", "no/such.txt"), "no/such.txt: no such file"),
        (("--text", "{short}"), "512 are needed"),
        (("--source", "no/such.gguf"), "no/such.gguf is no file"),
        (("--source", "{short}"), "was not made of"),
    ],
)
def test_usage_errors_are_one_line(
    arguments: tuple[str, ...], message: str, tiny_bundle: Path, bench_peers: Peers, tmp_path: Path
) -> None:
    short = tmp_path / "short.txt"
    short.write_text("Paris.", encoding="utf-8")
    code, out, err = bench_peers(
        tiny_bundle, *(argument.format(short=short) for argument in arguments), "--work", tmp_path / "work"
    )
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1
    assert not (tmp_path / "work").exists()


def test_a_folder_that_is_not_a_bundle_is_rejected(bench_peers: Peers, tmp_path: Path) -> None:
    code, out, err = bench_peers(tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {tmp_path} has no manifest.json")
    assert err.count("\n") == 1


# ---- without AMX

ASK = """
import ctypes, sys
libc = ctypes.CDLL(None, use_errno=True)
mask = ctypes.c_uint64()
for code, argument in ((0x1023, ctypes.c_long(18)), (0x1025, ctypes.c_long(18)), (0x1022, ctypes.byref(mask))):
    result = libc.syscall(158, ctypes.c_long(code), argument)
    print(result, ctypes.get_errno() if result else 0)
"""  # arch_prctl: request the tile registers, those for a guest, and query the available features (always allowed)

linux_x86 = pytest.mark.skipif(
    sys.platform != "linux" or platform.machine() != "x86_64", reason="AMX is asked for on Linux on x86-64 only"
)


def without_amx(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(WITHOUT_AMX), *command], capture_output=True, text=True, check=False, timeout=60
    )


@linux_x86
def test_amx_is_denied_to_a_command_and_its_children() -> None:
    plain = subprocess.run([sys.executable, "-c", ASK], capture_output=True, text=True, check=True).stdout.splitlines()
    for command in (
        (sys.executable, "-c", ASK),
        ("sh", "-c", f"{sys.executable} -c '{ASK}'; true"),
    ):
        done = without_amx(*command)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines() == ["-1 95", "-1 95", plain[2]]


SAY = "import sys; print(input(), sys.argv[1:]); sys.exit(7)"


@linux_x86
def test_a_command_runs_otherwise_unchanged() -> None:
    done = subprocess.run(
        [sys.executable, str(WITHOUT_AMX), sys.executable, "-c", SAY, "a b", "--c"],
        input="in and out\n",
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (7, "in and out ['a b', '--c']\n", "")


@pytest.mark.parametrize("command", [(), ("no-such-command-here",)])
def test_an_invalid_command_is_one_line(command: tuple[str, ...]) -> None:
    done = without_amx(*command)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize(("system", "machine"), [("darwin", "arm64"), ("linux", "aarch64"), ("win32", "AMD64")])
def test_other_machines_get_a_clear_message(
    system: str, machine: str, tiny_bundle: Path, bench_peers: Peers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    code, out, err = bench_peers(tiny_bundle, "--without-amx")
    assert (code, out) == (2, "")
    assert "64-bit Linux on x86-64 only" in err
    assert err.count("\n") == 1


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_busy_machine_is_detected() -> None:
    hog = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        busy = machine.busy_cpus(0.3)
    finally:
        hog.kill()
        hog.wait()
    assert busy is not None
    assert 0.3 < busy < 1024


def test_a_report_is_json() -> None:
    rows: dict[str, Any] = report.summarise(
        {"a/b": 1_000_000}, {"a/b": figures(1)}, {"a/b": fidelity.Fidelity(1, 0.5, 1.0)}
    )
    assert json.loads(json.dumps(rows)) == rows
    assert rows["a/b"]["size_mb"] == 1
