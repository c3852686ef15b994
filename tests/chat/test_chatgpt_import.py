"""Importing ChatGPT archives: conversation trees, and damaged or malicious archives."""

from __future__ import annotations

import io
import json
import os
import random
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llm_edge.chat.history import chatgpt
from llm_edge.chat.history.chatgpt import Imported, import_archive
from llm_edge.chat.history.conversation import Conversation
from llm_edge.chat.history.store import Store
from llm_edge.runtime.errors import InputError


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "data" / "conversations.sqlite3") as opened:
        yield opened


def node(name: str, parent: str | None, role: str = "", *parts: Any, **message: Any) -> dict[str, Any]:
    """A node of a tree as in the archive; without a role it holds no message."""
    content: dict[str, Any] | None = None
    if role:
        metadata = {"model_slug": "gpt-4o"} if role == "assistant" else {}
        content = {
            "id": name,
            "author": {"role": role, "name": None, "metadata": {}},
            "create_time": 1_700_000_000.5,
            "content": {"content_type": "text", "parts": list(parts)},
            "status": "finished_successfully",
            "metadata": metadata,
            "recipient": "all",
        } | message
    return {"id": name, "message": content, "parent": parent, "children": []}


def archived(*nodes: dict[str, Any], name: str = "c-1", **fields: Any) -> dict[str, Any]:
    """A conversation of an archive; `children` is derived from `parent`."""
    mapping = {each["id"]: each for each in nodes}
    for each in nodes:
        if each["parent"] in mapping:
            mapping[each["parent"]]["children"].append(each["id"])
    return {
        "title": "Animals",
        "create_time": 1_700_000_000.0,
        "update_time": 1_700_000_100.0,
        "mapping": mapping,
        "current_node": nodes[-1]["id"],
        "conversation_id": name,
        "id": name,
    } | fields


def simple(name: str = "c-1", **fields: Any) -> dict[str, Any]:
    return archived(
        node("root", None),
        node("s", "root", "system", ""),
        node("q", "s", "user", "What is the fastest animal?"),
        node("a", "q", "assistant", "The falcon."),
        name=name,
        **fields,
    )


def write(folder: Path, document: Any, name: str = "conversations.json") -> Path:
    path = folder / name
    text = document if isinstance(document, str) else json.dumps(document)
    if name.endswith(".zip"):
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("conversations.json", text)
    else:
        path.write_text(text, encoding="utf-8")
    return path


def imported(store: Store, folder: Path, *entries: dict[str, Any]) -> Conversation:
    """The first of these conversations, loaded from the store after the import."""
    import_archive(write(folder, list(entries)), store)
    return store.load(1)


def shown(conversation: Conversation) -> list[tuple[str, str]]:
    return [(message.role, message.content) for message in conversation.path()]


# Trees


@pytest.mark.parametrize("name", ["conversations.json", "archive.zip"])
def test_a_conversation_is_imported_with_its_metadata(store: Store, tmp_path: Path, name: str) -> None:
    assert import_archive(write(tmp_path, [simple()], name), store) == Imported(1, 0)
    conversation = store.load(1)
    assert shown(conversation) == [("user", "What is the fastest animal?"), ("assistant", "The falcon.")]
    assert (conversation.title, conversation.created, conversation.updated) == ("Animals", 1.7e9, 1.7e9 + 100)
    answer = conversation.path()[-1]
    assert (answer.model, answer.created, answer.finished) == ("gpt-4o", 1_700_000_000.5, True)
    assert [summary.id for summary in store.search("falcon")] == [1]


def test_an_archive_may_be_split_into_parts_and_folders(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "archive.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("export/conversations-000.json", json.dumps([simple("c-1"), simple("c-2")]))
        archive.writestr("export/conversations-001.json", "\ufeff" + json.dumps([simple("c-3")], indent=4))
        archive.writestr("export/shared_conversations.json", "{}")
        archive.writestr("__MACOSX/export/._conversations.json", b"\0\x05\x16\x07")
    assert import_archive(path, store) == Imported(3, 0)
    assert len(store.recent()) == 3


def test_branches_are_kept_and_the_current_one_is_selected(store: Store, tmp_path: Path) -> None:
    entry = archived(
        node("root", None),
        node("q1", "root", "user", "Capital of France?"),
        node("a1", "q1", "assistant", "Lyon."),
        node("a2", "q1", "assistant", "Paris."),
        node("q2", "a2", "user", "And of Spain?"),
        node("q1b", "root", "user", "Capital of Italy?"),
        node("a3", "q1b", "assistant", "Rome."),
        current_node="a1",
    )
    conversation = imported(store, tmp_path, entry)
    assert shown(conversation) == [("user", "Capital of France?"), ("assistant", "Lyon.")]
    question, wrong = conversation.path()
    right = conversation.siblings(wrong.id)[1]
    conversation.select(right)
    assert [content for _role, content in shown(conversation)] == ["Capital of France?", "Paris.", "And of Spain?"]
    conversation.select(conversation.siblings(question.id)[1])
    assert [content for _role, content in shown(conversation)] == ["Capital of Italy?", "Rome."]


def test_an_answer_of_several_nodes_becomes_one_message(store: Store, tmp_path: Path) -> None:
    thoughts = [{"summary": "Looking", "content": "Birds dive."}, {"summary": "", "content": "Fast."}, "?"]
    entry = archived(
        node("root", None),
        node("hidden", "root", "user", "Be brief.", metadata={"is_visually_hidden_from_conversation": True}),
        node("about", "hidden", "user", content={"content_type": "user_editable_context", "user_profile": "I am"}),
        node("q", "about", "user", "Which?"),
        node("t", "q", "assistant", content={"content_type": "thoughts", "thoughts": thoughts}),
        node("r", "t", "assistant", content={"content_type": "reasoning_recap", "content": "Thought for 5 s"}),
        node("p", "r", "assistant", "Let me see."),
        node("call", "p", "assistant", content={"content_type": "code", "text": "search()"}, recipient="browser"),
        node("result", "call", "tool", "1 result"),
        node("c", "result", "assistant", content={"content_type": "code", "language": "py", "text": "dive()"}),
        node("a", "c", "assistant", "The \ue200cite\ue202turn0search1\ue201falcon."),
        node("q2", "a", "user", "Thanks"),
    )
    conversation = imported(store, tmp_path, entry)
    answer = "Let me see.\n\n```py\ndive()\n```\n\nThe falcon."
    assert shown(conversation) == [("user", "Which?"), ("assistant", answer), ("user", "Thanks")]
    assert conversation.path()[1].reasoning == "**Looking**\n\nBirds dive.\n\nFast."
    assert len(conversation.messages) == 3


def test_an_answer_that_branches_in_the_middle_becomes_two_messages(store: Store, tmp_path: Path) -> None:
    entry = archived(
        node("q", None, "user", "Which?"),
        node("p", "q", "assistant", "Let me see."),
        node("a1", "p", "assistant", "The falcon."),
        node("a2", "p", "assistant", "The cheetah."),
        node("q2", "p", "user", "Go on"),
    )
    conversation = imported(store, tmp_path, entry)
    answers = [conversation.messages[number].content for number in conversation.children(1)]
    assert sorted(answers) == ["Let me see.", "Let me see.\n\nThe cheetah.", "Let me see.\n\nThe falcon."]
    assert shown(conversation) == [("user", "Which?"), ("assistant", "Let me see."), ("user", "Go on")]


def test_a_final_answer_is_imported(store: Store, tmp_path: Path) -> None:
    entry = archived(
        node("q", None, "user", "Which?"),
        node("a", "q", "assistant", "The falcon."),
        node("t1", "a", "tool", "saved"),
        node("t2", "a", "tool", "saved again"),
    )
    conversation = imported(store, tmp_path, entry)
    assert shown(conversation) == [("user", "Which?"), ("assistant", "The falcon.")]
    assert len(conversation.messages) == 2


def test_branches_keep_the_order_of_the_archive(store: Store, tmp_path: Path) -> None:
    entry = archived(
        node("q", None, "user", "Which?"),
        node("third", "q", "assistant", "3"),
        node("first", "q", "assistant", "1"),
        node("second", "q", "assistant", "2"),
    )
    entry["mapping"]["q"]["children"] = ["first", "second", "third"]
    conversation = imported(store, tmp_path, entry)
    assert [conversation.messages[number].content for number in conversation.children(1)] == ["1", "2", "3"]
    assert shown(conversation)[-1] == ("assistant", "2")  # the current node


def test_other_content_is_replaced_by_a_note(store: Store, tmp_path: Path) -> None:
    parts = [
        {"content_type": "image_asset_pointer", "asset_pointer": "file://1", "width": 5},
        {"content_type": "audio_transcription", "text": "Hello there"},
        {"content_type": "audio_asset_pointer", "asset_pointer": "file://2"},
        {},
        None,
        5,
        "What is this?",
    ]
    question = node("q", None, "user", content={"content_type": "multimodal_text", "parts": parts})
    conversation = imported(store, tmp_path, archived(question, title=None))
    assert shown(conversation) == [("user", "[image]\n\nHello there\n\n[audio]\n\nWhat is this?")]
    assert conversation.title == "[image]"


def test_importing_again_adds_only_what_is_new(store: Store, tmp_path: Path) -> None:
    path = write(tmp_path, [simple("c-1"), simple("c-2")])
    assert import_archive(path, store) == Imported(2, 0)
    assert import_archive(path, store) == Imported(0, 0)
    assert [summary.count for summary in store.recent()] == [2, 2]
    more = simple("c-2")
    more["mapping"]["q2"] = node("q2", "a", "user", "And the slowest?")
    more["current_node"] = "q2"
    assert import_archive(write(tmp_path, [simple("c-1"), more]), store) == Imported(1, 0)
    assert [content for _role, content in shown(store.load(2))][1:] == ["The falcon.", "And the slowest?"]
    assert len(store.load(1).messages) == 2


def test_importing_again_keeps_local_changes(store: Store, tmp_path: Path) -> None:
    path = write(tmp_path, [simple("c-1"), simple("c-2")])
    import_archive(path, store)
    conversation = store.load(1)
    store.set_title(conversation, "Mine")
    store.add(conversation, "user", "Said here")
    store.delete(2)
    grown = simple("c-1", title="Theirs")
    grown["mapping"]["q2"] = node("q2", "a", "user", "Said there")
    deleted = simple("c-2")
    deleted["mapping"]["q2"] = node("q2", "a", "user", "Said there")
    assert import_archive(write(tmp_path, [grown, deleted]), store) == Imported(1, 0)
    conversation = store.load(1)
    assert conversation.title == "Mine"
    assert shown(conversation)[-1] == ("user", "Said here")
    assert len(conversation.messages) == 4
    assert [summary.id for summary in store.recent()] == [1]


def test_conversations_without_an_id_are_recognized_by_their_content(store: Store, tmp_path: Path) -> None:
    entry = simple()
    del entry["id"], entry["conversation_id"]
    assert import_archive(write(tmp_path, [entry, simple("c-2")]), store) == Imported(2, 0)
    assert import_archive(write(tmp_path, [entry]), store) == Imported(0, 0)


def test_conversations_without_messages_are_not_stored(store: Store, tmp_path: Path) -> None:
    empty = archived(node("root", None), node("s", "root", "system", "Hi"), node("q", "s", "user", "", " "))
    assert import_archive(write(tmp_path, [empty]), store) == Imported(0, 0)
    assert import_archive(write(tmp_path, "[ ]"), store) == Imported(0, 0)
    assert store.recent() == []


# Untrusted archives


DEEP = json.loads("[" * 700 + "]" * 700)
ABSURD: list[Any] = [None, 5, -1e308, 10**400, "text", [], {}, {"a": 1}, True, "\ud800", "\0", "x\ny" * 200, DEEP]


def test_invalid_values_anywhere_are_harmless(store: Store, tmp_path: Path) -> None:
    """Each value of a conversation is replaced by invalid ones, one at a time."""

    def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        yield path
        for key in value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
            yield from places(value[key], (*path, key))

    entries: list[Any] = []
    for place in list(places(simple()))[1:]:
        for value in ABSURD:
            entry: Any = simple(f"c-{len(entries)}")
            holder = entry
            for key in place[:-1]:
                holder = holder[key]
            holder[place[-1]] = value
            entries.append(entry)
    result = import_archive(write(tmp_path, entries), store)
    stored = store.recent(len(entries))
    assert result.unreadable > 0
    assert 0 < len(stored) <= result.conversations <= len(entries)
    for summary in stored:
        conversation = store.load(summary.id)
        assert len(conversation.path()) > 0
        assert "\n" not in summary.title
        assert 0 <= summary.updated < 1e11


def test_invalid_trees_are_counted(store: Store, tmp_path: Path) -> None:
    circle = simple("circle")
    circle["mapping"]["q"]["parent"] = "a"
    itself = simple("itself")
    itself["mapping"]["root"]["parent"] = "root"
    orphan = simple("orphan")
    orphan["mapping"]["a"]["parent"] = "nobody"
    shared = simple("shared")
    shared["mapping"]["root"]["children"] = ["a", "a", "q", "nobody", {}]
    path = write(tmp_path, [circle, {"mapping": []}, {}, itself, orphan, shared])
    assert import_archive(path, store) == Imported(2, 4)
    assert [summary.count for summary in store.recent()] == [2, 2]


def test_a_deep_tree_is_imported(store: Store, tmp_path: Path) -> None:
    nodes = [node("0", None, "user", "Start")]
    nodes += [node(str(n), str(n - 1), ("user", "assistant")[n % 2], f"Text {n}") for n in range(1, 5_000)]
    assert len(imported(store, tmp_path, archived(*nodes)).path()) == 5_000


def test_branches_that_repeat_a_long_text_are_rejected(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(chatgpt, "MAX_TEXT", 100_000)
    nodes = [node("q", None, "user", "Hi"), node("a", "q", "assistant", "long " * 1_000)]
    nodes += [node(str(n), "a", "assistant", "x") for n in range(50)]
    assert import_archive(write(tmp_path, [archived(*nodes), simple("c-2")]), store) == Imported(1, 1)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "expected an array of conversations"),
        ("{}", "expected an array of conversations"),
        ('"text"', "expected an array of conversations"),
        ("[1, 2]", "expected an array of objects"),
        ("[[", "expected an array of objects"),
        ("[", "expected an array of objects"),
        ("[{}}]", "after a conversation"),
        ("[{} {}]", "after a conversation"),
        ("[{}", "after a conversation"),
        ('[{"mapping": {', "truncated"),
        ('[{"a": 1,}]', "damaged or truncated JSON"),
        ('[{"a": ' + "[" * 200_000 + "]" * 200_000 + "}]", "unusable JSON"),
        ('[{"a": ' + "9" * 10_000 + "}]", "unusable JSON"),
    ],
)
def test_other_text_is_rejected_in_one_line(store: Store, tmp_path: Path, text: str, reason: str) -> None:
    for name in ("conversations.json", "archive.zip"):
        with pytest.raises(InputError, match=reason) as raised:
            import_archive(write(tmp_path, text, name), store)
        assert str(raised.value).startswith(str(tmp_path / name))
        assert "\n" not in str(raised.value)
        assert len(str(raised.value)) < 400


def test_conversations_before_the_damage_are_imported(store: Store, tmp_path: Path) -> None:
    text = json.dumps([simple("c-1"), simple("c-2"), simple("c-3")])
    with pytest.raises(InputError, match=r"truncated.*2 conversations before that were imported"):
        import_archive(write(tmp_path, text[:-30]), store)
    assert len(store.recent()) == 2


def test_large_archives_are_read_in_chunks(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chatgpt, "_CHUNK", 1_000)  # less than a conversation; splits multi-byte characters
    entries = [simple(f"c-{n}", title="Tiere · 动物 😀") for n in range(100)]
    path = tmp_path / "conversations.json"
    path.write_text(json.dumps(entries, ensure_ascii=False, indent=1), encoding="utf-8")
    assert import_archive(path, store) == Imported(100, 0)
    assert {summary.title for summary in store.recent(200)} == {"Tiere · 动物 😀"}


def test_zip_bombs_are_rejected(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chatgpt, "MAX_CONVERSATION", 1 << 21)
    monkeypatch.setattr(chatgpt, "MAX_ARCHIVE", 1 << 23)
    path = write(tmp_path, '[{"a": "' + "x" * (4 << 20) + '"}]', "large.zip")
    assert path.stat().st_size < 10_000
    with pytest.raises(InputError, match="a conversation of more than 2 MB"):
        import_archive(path, store)
    with pytest.raises(InputError, match="more than the 8 MB of conversations"):
        import_archive(write(tmp_path, "[" + " " * (9 << 20) + "]", "spaces.zip"), store)
    for method in (zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA):  # 1 MB of these can become terabytes in one read
        with zipfile.ZipFile(tmp_path / "dense.zip", "w", method) as archive:
            archive.writestr("conversations.json", "[" + " " * (2 << 20) + "]")
        with pytest.raises(InputError, match="unsupported compression"):
            import_archive(tmp_path / "dense.zip", store)
    with zipfile.ZipFile(tmp_path / "many.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        for number in range(5):
            archive.writestr(f"conversations-{number}.json", "[" + " " * (2 << 20) + "]")
    with pytest.raises(InputError, match="more than the 8 MB of conversations"):
        import_archive(tmp_path / "many.zip", store)


def test_invalid_zip_files_are_rejected(store: Store, tmp_path: Path) -> None:
    path = write(tmp_path, [simple(f"c-{n}") for n in range(50)], "archive.zip")
    data = path.read_bytes()
    (tmp_path / "empty.zip").write_bytes(b"PK\x05\x06" + b"\0" * 18)
    with pytest.raises(InputError, match="without conversations"):
        import_archive(tmp_path / "empty.zip", store)
    (tmp_path / "other.zip").write_bytes(data.replace(b"conversations.json", b"conversations.html"))
    with pytest.raises(InputError, match="without conversations"):
        import_archive(tmp_path / "other.zip", store)
    draw = random.Random(2)
    for _damage in range(200):
        damaged = bytearray(data)
        for _byte in range(draw.choice([1, 1, 3, 20])):
            damaged[draw.randrange(len(data))] = draw.randrange(256)
        path.write_bytes(damaged if draw.random() < 0.8 else damaged[: draw.randrange(len(data))])
        try:
            import_archive(path, store)
        except InputError as e:
            assert "\n" not in str(e)  # noqa: PT017 (some damage does not show)
    locked = bytearray(data)
    locked[6] |= 1
    locked[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(locked)
    with pytest.raises(InputError, match="encrypted"):
        import_archive(path, store)


def test_paths_without_an_archive_are_rejected(store: Store, tmp_path: Path) -> None:
    for path, reason in ((tmp_path, "a folder"), (tmp_path / "no.zip", "No such file"), (Path("a\0b"), "cannot be")):
        with pytest.raises(InputError, match=reason):
            import_archive(path, store)
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(InputError, match="not a regular file"):
            import_archive(tmp_path / "pipe", store)
    (tmp_path / "latin.json").write_bytes(b'[{"title": "\xe9"}]')
    with pytest.raises(InputError, match="not UTF-8"):
        import_archive(tmp_path / "latin.json", store)


def test_memory_stays_bounded(tmp_path: Path) -> None:
    """Only a part of a long array is held in memory: reads stay close to 1 MiB."""

    class Spaces(io.RawIOBase):
        asked = 0

        def read(self, size: int = -1) -> bytes:
            assert 0 < size <= 1 << 20
            self.asked += size
            return b"[" if self.asked == size else b" " * size if self.asked < 64 << 20 else b"]"

    spaces = Spaces()
    assert list(chatgpt._array(spaces, "", 1 << 30)) == []  # type: ignore[arg-type]
    assert spaces.asked >= 64 << 20
