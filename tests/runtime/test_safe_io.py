"""Reading untrusted files: every failure is a one-line error of the requested type; atomic writes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import IO

import pytest

from llm_edge.runtime.errors import BundleError, CheckpointError
from llm_edge.runtime.safe_io import inside, read_bytes, read_json, read_text, write_atomically


def test_files_are_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b'{"a": "\xc3\xa4"}\r\n')
    assert read_bytes(tmp_path / "a", 13) == b'{"a": "\xc3\xa4"}\r\n'
    assert read_text(tmp_path / "a", 100) == '{"a": "ä"}\r\n'
    assert read_json(tmp_path / "a") == {"a": "ä"}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b'{"a": 1}' + b" " * 100, "larger than the limit of 100 bytes"),
        (b'{"a": "\xff"}', r"not UTF-8 text \(byte 7\)"),
        (b'{\n "a": }', r"not JSON: Expecting value \(line 2, column 7\)"),
        (b"", r"not JSON: .*line 1"),
        (b"[1]", "expected a JSON object, not an array"),
        (b"null", "expected a JSON object, not null"),
        (b"true", "expected a JSON object, not true or false"),
        (b"1.5", "expected a JSON object, not a number"),
        (b'\xef\xbb\xbf{"a": 1}', "BOM"),
    ],
)
def test_invalid_json_is_rejected(content: bytes, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=reason) as caught:
        read_json(path, limit=100, error=CheckpointError)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_json_that_is_too_large_or_deep_is_rejected(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text('{"a": ' + "[" * 200_000 + "]" * 200_000 + "}")
    with pytest.raises(BundleError, match="nested too deeply"):
        read_json(path)
    path.write_text('{"a": ' + "9" * 5000 + "}")
    with pytest.raises(BundleError, match="unusable JSON"):
        read_json(path)


def test_paths_that_are_not_regular_files_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such file"):
        read_bytes(tmp_path / "missing", 1)
    with pytest.raises(BundleError, match=r"regular file|folder"):
        read_bytes(tmp_path, 1)
    with pytest.raises(BundleError, match="cannot be read"):
        read_bytes(tmp_path / "a\0b", 1)
    with pytest.raises(BundleError, match="cannot be read"):
        read_bytes(tmp_path / ("x" * 5000), 1)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes in the file system here")
def test_a_pipe_does_not_block(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BundleError, match="not a regular file"):
        read_bytes(tmp_path / "pipe", 1)


def test_paths_outside_a_folder_are_detected(tmp_path: Path) -> None:
    folder = tmp_path / "bundle"
    (folder / "onnx").mkdir(parents=True)
    (folder / "real").write_text("")
    (folder / "near").symlink_to(folder / "real")
    (folder / "far").symlink_to(tmp_path / "elsewhere")
    (folder / "loop").symlink_to(folder / "loop")
    assert inside(folder, "onnx/model.onnx") == folder / "onnx" / "model.onnx"
    assert inside(folder, "near") == folder / "near"
    (tmp_path / "link").symlink_to(folder)
    assert inside(tmp_path / "link", "real") == tmp_path / "link" / "real"
    for name in ("", "/etc/passwd", "../x", "onnx/../../x", "a//b", "a/", "C:x", "a\\b", "a\0b", "..", "far", "loop"):
        with pytest.raises(BundleError) as caught:
            inside(folder, name)
        assert "\n" not in str(caught.value)
    with pytest.raises(CheckpointError, match="to outside of"):
        inside(folder, "far/x", error=CheckpointError)


def test_writes_are_atomic(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_atomically(path, b"one", overwrite=False)
    with pytest.raises(FileExistsError):
        write_atomically(path, b"two", overwrite=False)
    assert path.read_bytes() == b"one"
    write_atomically(path, lambda file: file.write(b"three"), private=True)
    assert path.read_bytes() == b"three"
    assert os.name == "nt" or path.stat().st_mode & 0o777 == 0o600

    def fail(file: IO[bytes]) -> None:
        file.write(b"half")
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        write_atomically(path, fail)
    assert path.read_bytes() == b"three"
    assert list(tmp_path.iterdir()) == [path]
