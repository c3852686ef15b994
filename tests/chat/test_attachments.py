"""Attached files: reading, the question's text with them, mentions and dropped paths."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from llm_edge.chat.attachments import (
    MAX_SIZE,
    Attachment,
    attach_mentioned,
    dropped_files,
    mention_of,
    mentions_file,
    read_attachment,
    split_attachments,
    with_attachments,
)
from llm_edge.runtime.errors import InputError


@pytest.mark.parametrize("text", ["a\nb", "```\ncode\n```", "`````\n", "", "File: x\n\n```\ny\n```\n\n"])
def test_attachments_can_be_separated_from_the_question_again(text: str) -> None:
    files = [Attachment("a.txt", text.rstrip()), Attachment("", "standard input")]
    for question in ("Why?", "", "```\ncode\n```"):
        assert split_attachments(with_attachments(question, files)) == (files, question)


def test_a_question_without_files_is_unchanged() -> None:
    for question in ("Why?", "File: a.txt", "File: a.txt\n\n```\nno end"):
        assert split_attachments(question) == ([], question)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes")
def test_unusable_files_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "binary").write_bytes(b"a\0")
    (tmp_path / "latin").write_bytes("é".encode("latin-1"))
    (tmp_path / "large").write_bytes(b"a" * (MAX_SIZE + 1))
    reasons = {
        "pipe": "not a regular file",
        "binary": "is binary",
        "latin": "not UTF-8",
        "large": "longer than 2 MiB",
        "": "a folder",
        "missing": "cannot be read",
        "nul\0": "cannot be read",
        "n" * 300: "cannot be read",
    }
    for name, reason in reasons.items():
        with pytest.raises(InputError, match=reason):
            read_attachment(f"{tmp_path}/{name}")


def test_mentions_of_existing_files_are_attached(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("\ufeffone\r\ntwo")
    (tmp_path / "b c.txt").write_text("three")
    text, files, missing = attach_mentioned(f'Compare @{tmp_path}/a.txt, and @"{tmp_path}/b c.txt": @nobody @no/file')
    assert text == "Compare a.txt, and b c.txt: @nobody @no/file"
    assert files == [Attachment("a.txt", "one\ntwo"), Attachment("b c.txt", "three")]
    assert missing == ["no/file"]
    for question in ("me@example.com", "@decorator\ndef f(): pass", "a @ b", "@"):
        assert attach_mentioned(question) == (question, [], [])


def test_dropped_files_are_recognized(tmp_path: Path) -> None:
    plain, spaced = tmp_path / "a.txt", tmp_path / "b c.txt"
    for path in (plain, spaced):
        path.write_text("x")
    escaped = str(spaced).replace(" ", "\\ ")
    for pasted in (str(plain), f"'{plain}' ", plain.as_uri()):
        assert list(dropped_files(pasted)) == [str(plain)]
    for pasted in (str(spaced), f'"{spaced}"', escaped, spaced.as_uri()):
        assert list(dropped_files(pasted)) == [str(spaced)]
    assert list(dropped_files(f"{plain} {escaped}")) == [str(plain), str(spaced)]
    for pasted in ("", "a.txt", f"see {plain}", str(tmp_path), "/nowhere", "'", f"{plain}\n{plain}"):
        assert not dropped_files(pasted)
    for path in (plain, spaced):
        assert mentions_file(mention_of(str(path)))
