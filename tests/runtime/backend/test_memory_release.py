"""Releasing mapped pages: pages that were only read leave memory, modified pages and older mappings stay."""

from __future__ import annotations

import mmap
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from llm_edge.runtime.backend.memory_hints import releasing

SIZE = 1 << 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc/self/smaps is Linux's")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "weights"
    with path.open("wb") as file:
        file.write(bytes(range(256)) * (SIZE // 256))
        file.flush()
        os.fsync(file.fileno())  # data that is not on disk yet counts as modified
    return path


def mapping_of(path: Path) -> mmap.mmap:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), SIZE, access=mmap.ACCESS_COPY)


def resident(path: Path) -> int:
    """Bytes of a mapped file in memory."""
    smaps = Path("/proc/self/smaps").read_text()
    return 1024 * sum(int(rss) for rss in re.findall(rf"{re.escape(str(path))}\n(?:.+\n)*?Rss: +(\d+) kB", smaps))


def test_read_pages_are_released_and_can_be_read_again(path: Path) -> None:
    with releasing(path):
        mapped = mapping_of(path)
        content = bytes(mapped)
        assert resident(path) == SIZE
    assert resident(path) < SIZE
    assert bytes(mapped) == content


def test_modified_pages_are_kept(path: Path) -> None:
    with releasing(path):
        mapped = mapping_of(path)
        mapped[100] = 7
    assert mapped[100] == 7


def test_older_mappings_are_left_alone(path: Path) -> None:
    older = mapping_of(path)
    content = bytes(older)
    with releasing(path):
        newer = mapping_of(path)
        assert bytes(newer) == content
        assert resident(path) == 2 * SIZE
    assert SIZE <= resident(path) < 2 * SIZE


def test_a_file_that_is_not_mapped_is_ignored(tmp_path: Path) -> None:
    with releasing(tmp_path / "missing"):
        pass


LOADING = """
import sys, threading
from llm_edge.runtime import Model, SamplingParams

def load() -> None:
    for _ in range(20):
        model = Model.load(sys.argv[1], threads=1)
        list(model.chat([{"role": "user", "content": "Hi"}], SamplingParams(max_tokens=3)))

threads = [threading.Thread(target=load) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
"""


def test_models_are_loaded_and_freed_in_several_threads(tiny_bundle: Path) -> None:
    result = subprocess.run([sys.executable, "-c", LOADING, tiny_bundle], capture_output=True, text=True, timeout=120)
    assert (result.returncode, result.stderr) == (0, "")
