"""Compare the text of each screen, at two sizes, with tests/tui/snapshots.

After an intended change, update the snapshots and review the diff:
LLM_EDGE_UPDATE_SNAPSHOTS=1 python -m pytest tests/tui/test_snapshots.py
"""

from __future__ import annotations

import asyncio
import os
import re
from pathlib import Path

import pytest
from screenshots import SCENES, SIZES, play_scene
from tui_driving import screen

from llm_edge.chat.fake import FakeResponder

SNAPSHOTS = Path(__file__).parent / "snapshots"


@pytest.mark.parametrize("size", SIZES, ids=lambda size: f"{size[0]}x{size[1]}")
@pytest.mark.parametrize("name", SCENES)
def test_screen_matches_snapshot(
    name: str, size: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # a folder without bundles
    found = asyncio.run(play_scene(SCENES[name], FakeResponder(), size, screen)) + "\n"
    found = re.sub(r"\b\d\d:\d\d\b", "12:00", found)
    file = SNAPSHOTS / f"{name}-{size[0]}x{size[1]}.txt"
    if os.environ.get("LLM_EDGE_UPDATE_SNAPSHOTS"):
        SNAPSHOTS.mkdir(exist_ok=True)
        file.write_text(found, encoding="utf-8")
    assert found == file.read_text(encoding="utf-8")
