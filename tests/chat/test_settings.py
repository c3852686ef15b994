"""Settings: saved values persist across programs, and damaged files are reported and kept."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest

from llm_edge.chat.settings import THEME, Section, Settings, default_folder, texts
from llm_edge.runtime.errors import MachineError

LIST = Section[list[str]]("questions", list, texts)


def test_saved_values_are_loaded_by_the_next_program(tmp_path: Path) -> None:
    folder = tmp_path / "not" / "there yet"
    settings = Settings(folder)
    assert settings.get(THEME) == ""
    assert settings.get(LIST) == []
    settings.set(THEME, "nord")
    settings.change(LIST, lambda before: [*before, "Why? \ud800 \u202e"])
    again = Settings(folder)
    assert again.trouble == ""
    assert (again.get(THEME), again.get(LIST)) == ("nord", ["Why? \ud800 \u202e"])
    assert [each.name for each in folder.iterdir()] == ["settings.json"]


def test_two_programs_do_not_overwrite_each_others_changes(tmp_path: Path) -> None:
    one, other = Settings(tmp_path), Settings(tmp_path)
    one.set(THEME, "nord")
    other.change(LIST, lambda before: [*before, "a"])
    one.change(LIST, lambda before: [*before, "b"])
    assert one.get(LIST) == ["a", "b"]
    assert Settings(tmp_path).get(THEME) == "nord"


def test_threads_do_not_overwrite_each_others_changes(tmp_path: Path) -> None:
    settings = Settings(tmp_path)

    def add(name: str) -> None:
        for number in range(10):
            settings.change(LIST, lambda before: [*before, f"{name}{number}"])  # noqa: B023 (called immediately)

    threads = [threading.Thread(target=add, args=(name,)) for name in "abc"]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(Settings(tmp_path).get(LIST)) == 30


def test_unknown_sections_are_kept(tmp_path: Path) -> None:
    (tmp_path / "settings.json").write_text('{"of a later version": {"a": [1]}}', encoding="utf-8")
    Settings(tmp_path).set(THEME, "nord")
    kept = json.loads((tmp_path / "settings.json").read_text(encoding="utf-8"))
    assert kept == {"of a later version": {"a": [1]}, "theme": "nord"}


@pytest.mark.parametrize(
    "content",
    [b"{", b"[]", b"\xff\xfe{}", b'{"theme": ' + b"[" * 100_000, b'{"a": ' + b"9" * 5000 + b"}", b""],
    ids=["cut off", "no object", "no text", "deep", "a long number", "empty"],
)
def test_a_damaged_file_is_reported_in_one_line_and_kept(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "settings.json"
    path.write_bytes(content)
    settings = Settings(tmp_path)
    assert str(path) in settings.trouble
    assert "\n" not in settings.trouble
    assert settings.get(THEME) == ""
    assert path.read_bytes() == content  # reading changes nothing
    settings.set(THEME, "nord")
    assert (tmp_path / "settings.damaged-1.json").read_bytes() == content
    assert settings.trouble == ""
    assert Settings(tmp_path).get(THEME) == "nord"


def test_a_second_damaged_file_does_not_replace_the_first(tmp_path: Path) -> None:
    path = tmp_path / "settings.json"
    for content in ("one", "two"):
        path.write_text(content, encoding="utf-8")
        Settings(tmp_path).set(THEME, "nord")
    kept = [(tmp_path / f"settings.damaged-{number}.json").read_text(encoding="utf-8") for number in (1, 2)]
    assert kept == ["one", "two"]


@pytest.mark.parametrize("value", [3, "a", [1], {"a": "b"}, None])
def test_a_damaged_section_does_not_affect_the_others(tmp_path: Path, value: Any) -> None:
    path = tmp_path / "settings.json"
    before = json.dumps({"questions": value, "theme": "nord"})
    path.write_text(before, encoding="utf-8")
    settings = Settings(tmp_path)
    assert settings.get(LIST) == []
    assert "questions: expected a list of strings" in settings.trouble
    assert settings.get(THEME) == "nord"
    settings.set(THEME, "dracula")  # does not touch the damaged section
    assert json.loads(path.read_text(encoding="utf-8")) == {"questions": value, "theme": "dracula"}
    assert not (tmp_path / "settings.damaged-1.json").exists()
    settings.set(LIST, ["a"])
    kept = json.loads((tmp_path / "settings.damaged-1.json").read_text(encoding="utf-8"))
    assert kept == {"questions": value, "theme": "dracula"}
    assert settings.trouble == ""


def test_a_pipe_is_ignored_without_blocking(tmp_path: Path) -> None:
    import os

    if not hasattr(os, "mkfifo"):
        pytest.skip("no pipes of this kind here")
    os.mkfifo(tmp_path / "settings.json")
    assert "not a regular file" in Settings(tmp_path).trouble


def test_an_unwritable_folder_is_reported(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    settings = Settings(tmp_path / "file")
    with pytest.raises(MachineError, match="cannot be written"):
        settings.set(THEME, "nord")
    assert settings.get(THEME) == ""


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "dotfiles").mkdir()
    target = tmp_path / "dotfiles" / "mine.json"
    target.write_text("{}", encoding="utf-8")
    try:
        (tmp_path / "settings.json").symlink_to(target)
    except OSError:
        pytest.skip("no links here")
    Settings(tmp_path).set(THEME, "nord")
    assert (tmp_path / "settings.json").is_symlink()
    assert json.loads(target.read_text(encoding="utf-8")) == {"theme": "nord"}


def test_an_environment_variable_sets_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_EDGE_CONFIG", str(tmp_path / "mine"))
    assert default_folder() == tmp_path / "mine"
    Settings().set(THEME, "nord")
    assert (tmp_path / "mine" / "settings.json").exists()
    monkeypatch.delenv("LLM_EDGE_CONFIG")
    assert default_folder().name == "llm-edge"
