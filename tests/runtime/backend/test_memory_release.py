"""Mapped pages are given back: what was read leaves memory and stays readable, what was written stays as it is."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import pytest

from llm_edge.runtime.backend.memory_hints import release

SIZE = 1 << 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/smaps is Linux's")


def test_pages_that_were_read_go_and_come_back(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    with path.open("wb") as file:
        file.write(bytes(range(256)) * (SIZE // 256))
        file.flush()
        os.fsync(file.fileno())  # what is not on the disk yet counts as changed
    with path.open("rb") as file, mmap.mmap(file.fileno(), SIZE, access=mmap.ACCESS_COPY) as mapped:
        content = bytes(mapped)
        assert release(path) >= SIZE // 2
        assert release(path) == 0
        assert bytes(mapped) == content


def test_pages_that_were_written_stay(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(SIZE))
    with path.open("rb") as file, mmap.mmap(file.fileno(), SIZE, access=mmap.ACCESS_COPY) as mapped:
        mapped[100] = 7
        assert release(path) == 0
        assert mapped[100] == 7


def test_a_file_that_is_not_mapped(tmp_path: Path) -> None:
    assert release(tmp_path / "missing") == 0
