"""Huge pages for weights: which memory regions are collapsed, and that their content is preserved."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import numpy as np
import pytest

from llm_edge.runtime.backend import memory_hints
from llm_edge.runtime.backend.memory_hints import PAGE, _regions

REGION = "{start:x}-{end:x} rw-p 00000000 00:00 0 {name}\nSize: 1 kB\nRss: {rss} kB\n"


def smaps(start: int, pages: float, share: float = 1.0, name: str = "") -> str:
    size = int(pages * PAGE)
    return REGION.format(start=start, end=start + size, rss=int(size * share) // 1024, name=name)


def test_regions_in_use_are_collapsed_in_whole_pages() -> None:
    assert _regions(smaps(8 * PAGE, 3)) == [(8 * PAGE, 3 * PAGE)]
    assert _regions(smaps(8 * PAGE + 4096, 3)) == [(9 * PAGE, 2 * PAGE)]
    assert _regions(smaps(8 * PAGE, 3, name="[heap]")) == [(8 * PAGE, 3 * PAGE)]


@pytest.mark.parametrize(
    "text",
    [
        smaps(8 * PAGE, 3, share=0.5),  # collapsing would commit the unused rest
        smaps(8 * PAGE, 3, name="[stack]"),
        smaps(8 * PAGE + 4096, 1),  # no whole page
        smaps(8 * PAGE, 3).replace("rw-p", "r--p"),
        smaps(8 * PAGE, 3).replace(" 00:00 0 ", " fe:00 77 /some/file"),
        "",
        "nonsense\nRss: 5 kB\n",
    ],
)
def test_other_regions_are_left_alone(text: str) -> None:
    assert _regions(text) == []


@pytest.mark.skipif(sys.platform != "linux", reason="a hint to Linux")
def test_collapsed_memory_keeps_its_content() -> None:
    if "[never]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text():
        pytest.skip("large pages are switched off on this machine")
    array = np.arange(16 * PAGE // 8)
    expected = array.sum()
    gathered = memory_hints.collapse_pages()
    if not gathered:
        pytest.skip("this kernel gathers nothing (older than 6.1, or out of large pages)")
    total = re.search(r"AnonHugePages: +(\d+) kB", Path("/proc/self/smaps_rollup").read_text())
    assert total is not None
    assert int(total[1]) * 1024 >= PAGE
    assert array.sum() == expected
