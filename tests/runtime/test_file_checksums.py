"""Checksums from the cache: used only for a file that has not changed since, and never needed."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from pathlib import Path

import pytest

from llm_edge.runtime import Model, file_checksums, loading
from llm_edge.runtime.errors import BundleError
from llm_edge.runtime.file_checksums import cached_sha256

CONTENT = bytes(range(256)) * 100

pytestmark = pytest.mark.skipif(os.name != "posix", reason="elsewhere nothing is kept")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of checksums, and a clock an hour ahead, so that files written now have been left alone for long."""
    monkeypatch.setenv("LLM_EDGE_CACHE", str(tmp_path / "cache"))
    now = time.time
    monkeypatch.setattr(file_checksums.time, "time", lambda: now() + 3600)
    return tmp_path / "cache" / "checksums"


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    path.write_bytes(CONTENT)
    return path


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def entry_of(cache: Path) -> Path:
    (entry,) = cache.iterdir()
    return entry


def test_an_unchanged_file_is_not_read_again(cache: Path, file: Path) -> None:
    assert cached_sha256(file) == sha256(CONTENT)
    entry = entry_of(cache)
    entry.write_text(json.dumps(json.loads(entry.read_text()) | {"sha256": "kept"}))
    assert cached_sha256(file) == "kept"


@pytest.mark.parametrize("how", ["in place", "replaced"])
def test_a_change_is_noticed_though_size_and_time_are_the_same(cache: Path, file: Path, how: str) -> None:
    cached_sha256(file)
    before, changed = file.stat(), b"x" + CONTENT[1:]
    time.sleep(0.02)  # the resolution of the file system's clock
    if how == "replaced":
        file.unlink()
    file.write_bytes(changed)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert cached_sha256(file) == sha256(changed)
    assert len(list(cache.iterdir())) == 1


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b"{}", b'{"identity": 1}', b"\xff"])
def test_a_damaged_entry_is_ignored(cache: Path, file: Path, content: bytes) -> None:
    cached_sha256(file)
    entry_of(cache).write_bytes(content)
    assert cached_sha256(file) == sha256(CONTENT)
    assert json.loads(entry_of(cache).read_bytes())["sha256"] == sha256(CONTENT)


def test_a_file_that_was_just_written_is_not_remembered(
    cache: Path, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.undo()
    monkeypatch.setenv("LLM_EDGE_CACHE", str(cache.parent))
    assert cached_sha256(file) == sha256(CONTENT)
    assert not cache.exists()


def test_old_entries_are_removed(cache: Path, tmp_path: Path) -> None:
    for number in range(70):
        path = tmp_path / str(number)
        path.touch()
        cached_sha256(path)
    assert len(list(cache.iterdir())) == 64


@pytest.mark.parametrize("folder", ["", "/proc/none", "file"])
def test_the_cache_is_not_needed(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: str) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLM_EDGE_CACHE", str(tmp_path / folder) if folder == "file" else folder)
    assert cached_sha256(file) == sha256(CONTENT)


def test_a_bundle_that_changes_after_it_was_loaded_is_rejected(
    cache: Path, tiny_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loading, "_LARGE", 0)
    bundle = Path(shutil.copytree(tiny_bundle, tmp_path / "bundle"))
    Model.load(bundle, "int8")
    assert any(cache.iterdir())
    Model.load(bundle, "int8")
    weights = bundle / "onnx" / "model_quantized.onnx_data"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(BundleError, match="does not match its checksum"):
        Model.load(bundle, "int8")
