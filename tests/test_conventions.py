"""Conventions of the code: sizes of files and functions, and words that the project no longer uses."""

from __future__ import annotations

import ast
from collections.abc import Iterator
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
# Names that were replaced; CHANGELOG.md has the new ones.
BANNED = {
    *("Knob", "Knobs", "KNOBS", "Turned", "told", "begin_with_room", "Lane", "Making", "Piece", "Passage"),
    *("TextSide", "Front", "Marks", "Borders", "Guesses", "guessed_tokens", "seat", "forget", "survivors"),
    *("_deaf", "Integer", "spread", "Form", "Part", "prove", "_judge", "Kept", "Feed", "News", "Pace", "Nowhere"),
    *("Side", "Wish", "_who", "DECIDED", "RowMemory", "HostRows", "DeviceRows"),
}


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


def identifiers(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Line and name of what a module defines, imports or uses."""
    for node in ast.walk(tree):
        names = [getattr(node, field, None) for field in ("id", "attr", "arg", "name")]
        yield from ((getattr(node, "lineno", 0), each) for each in names if isinstance(each, str))


@pytest.mark.parametrize("path", SOURCES, ids=name)
def test_replaced_names_do_not_return(path: Path) -> None:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    assert [(line, each) for line, each in identifiers(tree) if each in BANNED] == []
