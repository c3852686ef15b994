"""Conventions: sizes of files and functions, replaced names, and plain wording of tests, benchmarks and documents."""

from __future__ import annotations

import ast
import re
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

# Wording to avoid in tests, benchmarks, examples and documents -> what to write instead. Whole words, any case.
WORDING = {
    r"guess(es|ed|ing)?": "draft tokens, propose",
    r"(is|are|was|were) told": "is reported, is read",
    r"nobody vouches|vouch(es)? for": "untrusted",
    r"strangers?": "untrusted, unrelated",
    r"whoever": "the caller, the user, or the passive voice",
    r"seats?|lanes?": "slot, sequence",
    r"mend(s|ed|ing)?": "fix, correct",
    r"held against": "compared with",
    r"comes? to (lie|its end|nothing)": "is stored, finishes, fails",
    r"of (its|their|our|one's) own (making|accord|mind)": "created here, by itself",
    r"(forgets|believes|believed)": "clears, ignores, trusts",
    r"products of whole numbers": "integer matmuls",
    r"behind (a|the|its|each|every) (prompt|token|tokens|past|cache|budget|tag|test)": "after",
    r"(lies|lie|lay) (beside|about|in the way)": "is next to, is wrong, exists",
}
UNCLEAR_TEST_NAME = re.compile(
    r"_(is|are)_told(_|$)|_that_(is|are)_(none|no)(_|$)|_that_cannot_be$|_nobody_|_whoever_|_behind_"
    r"|_mended|_guess|_as_it_was|_stays?_as_(it|they)_|_(comes|goes)_(and|on)_"
)
NOT_CHECKED = {
    ROOT / "tests" / "test_conventions.py",
    ROOT / "bench" / "copying.py",  # prompts and answers
}
DOCUMENTS = sorted(
    path
    for folder in ("bench", "compat", "docs", "examples", "tests")
    for path in (ROOT / folder).rglob("*")
    if path.suffix in (".py", ".md") and path not in NOT_CHECKED
)
DOCUMENTS.append(ROOT / "README.md")


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


@pytest.mark.parametrize("path", DOCUMENTS, ids=name)
def test_tests_and_documents_use_plain_wording(path: Path) -> None:
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        for pattern, better in WORDING.items():
            found = re.search(rf"\b(?:{pattern})\b", line, re.IGNORECASE)
            assert found is None, f"{name(path)}:{number}: instead of {found[0]!r} write: {better}"


@pytest.mark.parametrize("path", [path for path in DOCUMENTS if path.name.startswith("test_")], ids=name)
def test_test_names_state_the_expected_behaviour(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.name.startswith("test_"):
            assert not UNCLEAR_TEST_NAME.search(node.name), (
                f"{name(path)}: {node.name}: name it test_<subject>_<expected behaviour> in plain English"
            )
