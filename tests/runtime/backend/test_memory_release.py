"""Releasing mapped pages: pages that were only read leave memory, modified pages stay."""

from __future__ import annotations

import mmap
import os
import sys
from pathlib import Path

import pytest

from llm_edge.runtime.backend.memory_hints import release

SIZE = 1 << 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/smaps is Linux's")


def test_read_pages_are_released_and_can_be_read_again(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    with path.open("wb") as file:
        file.write(bytes(range(256)) * (SIZE // 256))
        file.flush()
        os.fsync(file.fileno())  # data that is not on disk yet counts as modified
    with path.open("rb") as file, mmap.mmap(file.fileno(), SIZE, access=mmap.ACCESS_COPY) as mapped:
        content = bytes(mapped)
        assert release(path) >= SIZE // 2
        assert release(path) == 0
        assert bytes(mapped) == content


def test_modified_pages_are_kept(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(bytes(SIZE))
    with path.open("rb") as file, mmap.mmap(file.fileno(), SIZE, access=mmap.ACCESS_COPY) as mapped:
        mapped[100] = 7
        assert release(path) == 0
        assert mapped[100] == 7


def test_a_file_that_is_not_mapped_is_ignored(tmp_path: Path) -> None:
    assert release(tmp_path / "missing") == 0
