"""All conversations in one zip: what is written can be imported, and damaged or hostile zips are refused."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from llm_edge.chat.history import archive, transcript
from llm_edge.chat.history.archive import write_archive
from llm_edge.chat.history.chatgpt import Imported
from llm_edge.chat.history.importing import import_file
from llm_edge.chat.history.store import Store
from llm_edge.runtime.errors import InputError


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "first.sqlite3") as opened:
        for number in range(5):
            conversation = opened.new(f"Title {number}", system="Be brief.")
            question = opened.add(conversation, "user", f"Question {number}")
            opened.add(conversation, "assistant", "Answer", finished=True)
            opened.add(conversation, "assistant", "Other answer", parent=question.id, finished=True)
        yield opened


def test_an_archive_can_be_imported_with_all_branches(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "all.zip"
    assert write_archive(path, store) == 5
    with Store(tmp_path / "second.sqlite3") as second:
        assert import_file(str(path), second) == Imported(5, 0)
        assert sorted(each.title for each in second.recent()) == [f"Title {number}" for number in range(5)]
        loaded = second.load(second.recent()[0].id)
    assert len(loaded.messages) == 3
    assert loaded.system == "Be brief."
    assert [message.content for message in loaded.path()][1] == "Other answer"


def test_more_conversations_than_are_listed_at_a_time(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(archive, "_PAGE", 2)
    assert write_archive(tmp_path / "all.zip", store) == 5


def test_an_import_can_be_cancelled(store: Store, tmp_path: Path) -> None:
    write_archive(tmp_path / "all.zip", store)
    with Store(tmp_path / "second.sqlite3") as second:
        with pytest.raises(InputError, match="cancelled; 1 conv"):
            import_file(str(tmp_path / "all.zip"), second, lambda count: count < 2)
        assert len(second.recent()) == 1


@pytest.mark.parametrize("content", [b"{}", b"\xff", b"[", b"null", json.dumps({"format": transcript.FORMAT}).encode()])
def test_damaged_documents_are_named(store: Store, tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "all.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("conversation-7.json", content)
    with pytest.raises(InputError, match=r"all\.zip: conversation-7\.json: "):
        import_file(str(path), store)


def test_a_truncated_or_overwritten_zip_is_refused_in_one_line(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "all.zip"
    write_archive(path, store)
    data = bytearray(path.read_bytes())
    data[60:90] = b"\0" * 30
    path.write_bytes(data)
    with pytest.raises(InputError) as caught:
        import_file(str(path), store)
    assert "\n" not in str(caught.value)


def test_a_document_that_unpacks_to_too_much_is_refused(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transcript, "MAX_FILE", 1000)
    with zipfile.ZipFile(tmp_path / "all.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("conversation-1.json", " " * 2000)
    with pytest.raises(InputError, match="too large"):
        import_file(str(tmp_path / "all.zip"), store)
