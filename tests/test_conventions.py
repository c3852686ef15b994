"""Conventions of the code: sizes of files and functions, and words that the project no longer uses."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from project import ROOT

MAX_FILE = 400
MAX_FUNCTION = 60
FOLDERS = [path for path in ROOT.iterdir() if path.is_dir() and not path.name.startswith(".")]
SOURCES = sorted(
    path
    for folder in FOLDERS
    if folder.name not in ("tests", "build", "dist") and not folder.name.endswith(".egg-info")
    for path in folder.rglob("*.py")
)
# Names that were replaced (see CHANGELOG.md), as whole words in code, docstrings and comments.
BANNED = (
    *(
        "Knob",
        "Knobs",
        "KNOBS",
        "Turned",
        "begin_with_room",
        "Lane",
        "Making",
        "Passage",
        "TextSide",
        "Marks",
        "Borders",
    ),
    *("Guesses", "guessed_tokens", "_deaf", "Wish", "Pace", "Nowhere", "Feed", "News", "_who"),
    *("survivors", "prove", "_judge", "DECIDED", "RowMemory", "HostRows", "DeviceRows", "Front"),
)


def name(path: Path) -> str:
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_files_and_functions_stay_short(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    assert text.count("\n") <= MAX_FILE
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            length = node.end_lineno - node.lineno + 1
            assert length <= MAX_FUNCTION, f"{name(path)}: {node.name} has {length} lines"


def test_replaced_names_do_not_return() -> None:
    pattern = re.compile(rf"\b(?:{'|'.join(BANNED)})\b")
    for path in SOURCES:
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            found = pattern.search(line)
            assert found is None, f"{name(path)}:{number}: {found[0] if found else ''}"
