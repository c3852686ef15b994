"""The store: conversation trees, search, concurrent programs, damaged files, import and export."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import random
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_edge.chat.history import database, transcript
from llm_edge.chat.history.conversation import Conversation, Message, title_of
from llm_edge.chat.history.search import Summary
from llm_edge.chat.history.store import KEPT_DAYS, Store, default_path
from llm_edge.chat.text import one_line, snippet
from llm_edge.runtime.errors import InputError, MachineError


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "data" / "conversations.sqlite3"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    with Store(path) as opened:
        yield opened


@pytest.fixture(params=["index", "no index"])
def either(request: pytest.FixtureRequest, path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Store]:
    """A store, with and without SQLite's full-text search."""
    if request.param == "no index":
        monkeypatch.setattr(database, "_has_trigrams", lambda _connection: False)
    with Store(path) as opened:
        yield opened


def talk(store: Store, *texts: str, title: str = "", model: str = "tiny") -> Conversation:
    """A conversation of alternating questions and answers."""
    conversation = store.new(title)
    for place, text in enumerate(texts):
        if place % 2 == 0:
            store.add(conversation, "user", text)
        else:
            store.add(conversation, "assistant", text, model=model, finished=True)
    return conversation


def texts(conversation: Conversation) -> list[str]:
    return [message.content for message in conversation.path()]


def found(store: Store, text: str) -> list[int]:
    return [summary.id for summary in store.search(text)]


# Storing and loading


def test_a_conversation_is_loaded_as_saved(store: Store, path: Path) -> None:
    conversation = store.new(system="Be brief.")
    store.add(conversation, "user", "What is the fastest animal?")
    answer = store.add(conversation, "assistant", model="tiny (int8)", params={"temperature": 0.3, "stop": ["x"]})
    assert not answer.finished
    answer.content, answer.reasoning = "The falcon.\n", "Birds dive…"
    answer.figures = {"tokens": 3, "changes": [{"at": 1, "name": "top_p", "value": 0.5}]}
    answer.finished = True
    store.update(answer)
    with Store(path) as other:
        loaded = other.load(conversation.id)
    assert loaded.messages == conversation.messages
    assert (loaded.system, loaded.leaf, loaded.title) == ("Be brief.", answer.id, "What is the fastest animal?")
    assert loaded.messages[answer.id].params == {"temperature": 0.3, "stop": ["x"]}


def test_conversations_without_messages_are_not_stored(store: Store) -> None:
    conversation = store.new("Plans", system="Be brief.")
    store.set_title(conversation, "Other plans")
    store.pin(conversation)
    store.set_system(conversation, "Be long.")
    assert store.recent() == []
    store.add(conversation, "user", "Hi")
    loaded = store.load(conversation.id)
    assert (loaded.title, loaded.pinned, loaded.system) == ("Other plans", True, "Be long.")


@pytest.mark.parametrize(
    "text", ["a\0b", "\ud83d\ude00 and \ud800", "\x1b]52;c;aGk=\x07", "'; DROP TABLE messages; --"]
)
def test_any_text_can_be_stored(store: Store, text: str) -> None:
    conversation = talk(store, text, text, title=text, model=text)
    answer = conversation.messages[conversation.path()[1].id]
    answer.reasoning = text
    answer.params = {"stop": [text]}
    store.update(answer)
    loaded = store.load(conversation.id).messages[answer.id]
    expected = text.replace("\ud83d\ude00", "😀").replace("\ud800", "\ufffd")
    assert (loaded.content, loaded.reasoning, loaded.model) == (expected,) * 3
    assert loaded.params == {"stop": [text.replace("\ud83d\ude00", "😀")]}
    assert found(store, "DROP TABLE") in ([], [conversation.id])


def test_titles_pins_and_prompts_can_be_changed(store: Store) -> None:
    first, second = talk(store, "One", "1"), talk(store, "Two", "2")
    assert [summary.id for summary in store.recent()] == [second.id, first.id]
    store.pin(first.id)
    store.set_title(first.id, "  A new\n\tname ")
    store.set_system(first, "Be kind.")
    assert [(each.id, each.title, each.pinned) for each in store.recent()] == [
        (first.id, "A new name", True),
        (second.id, "Two", False),
    ]
    store.add(first, "user", "Three")  # this object still has the old title
    assert first.title == store.load(first.id).title == "A new name"
    store.add(second, "user", "Four")
    store.pin(first.id, False)
    assert [summary.id for summary in store.recent()] == [second.id, first.id]
    assert store.load(first.id).system == "Be kind."


def test_recent_conversations_are_paged_with_their_metadata(store: Store) -> None:
    talks = [talk(store, f"Question {number}", "Answer", model=f"model {number}") for number in range(7)]
    pages = [store.recent(3, offset) for offset in (0, 3, 6, 9)]
    assert [[summary.id for summary in page] for page in pages] == [
        [talks[6].id, talks[5].id, talks[4].id],
        [talks[3].id, talks[2].id, talks[1].id],
        [talks[0].id],
        [],
    ]
    updated = talks[6].updated
    assert pages[0][0] == Summary(talks[6].id, "Question 6", False, updated, 2, "model 6")
    store.add(talks[2], "user", "More")
    assert store.recent(1)[0].id == talks[2].id


def test_deleting_can_be_undone_until_it_is_permanent(
    store: Store, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, gone = talk(store, "Stay", "Yes"), talk(store, "A very secret word: xylophone", "Oh")
    store.delete(gone.id)
    assert [summary.id for summary in store.recent()] == [kept.id]
    assert found(store, "xylophone") == []
    with pytest.raises(InputError, match=f"conversation {gone.id}"):
        store.load(gone.id)
    store.restore(gone.id)
    assert texts(store.load(gone.id)) == ["A very secret word: xylophone", "Oh"]
    assert found(store, "xylophone") == [gone.id]
    store.delete(gone.id)
    monkeypatch.setattr("llm_edge.chat.history.store.KEPT_DAYS", -1)
    Store(path).close()  # purges conversations deleted long ago
    with pytest.raises(InputError, match="permanently deleted"):
        store.restore(gone.id)
    with pytest.raises(InputError, match="permanently deleted"):
        store.add(gone, "user", "Are you there?")
    with pytest.raises(InputError, match="permanently deleted"):
        store.update(gone.path()[-1])
    assert [summary.id for summary in store.recent()] == [kept.id]
    assert found(store, "stay") == [kept.id]


def test_a_new_message_restores_a_deleted_conversation(store: Store) -> None:
    conversation = talk(store, "Hi", "Hello")
    store.delete(conversation.id)
    store.add(conversation, "user", "Still there?")
    assert texts(store.load(conversation.id)) == ["Hi", "Hello", "Still there?"]


def test_conversations_deleted_long_ago_are_purged(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store(path) as store:
        conversations = [talk(store, "Old", "Yes"), talk(store, "Newer", "Yes")]
        now = time.time()
        for conversation, days in zip(conversations, (KEPT_DAYS + 1, KEPT_DAYS - 1), strict=True):
            monkeypatch.setattr("llm_edge.chat.history.store.time.time", lambda days=days: now - days * 86_400)
            store.delete(conversation.id)
        monkeypatch.undo()
    with Store(path) as store:
        with pytest.raises(InputError, match="permanently deleted"):
            store.restore(conversations[0].id)
        store.restore(conversations[1].id)


# Branches


def test_an_edited_question_and_a_second_answer_are_branches(store: Store) -> None:
    conversation = talk(store, "What is the capital of France?", "Lyon.")
    question, wrong = conversation.path()
    right = store.add(conversation, "assistant", "Paris.", parent=question.id, finished=True)
    assert conversation.siblings(wrong.id) == conversation.siblings(right.id) == [wrong.id, right.id]
    thanks = store.add(conversation, "user", "Thanks")
    other = store.add(conversation, "user", "And of Spain?", parent=None)
    assert texts(conversation) == ["And of Spain?"]
    assert conversation.siblings(question.id) == [question.id, other.id]
    store.select(conversation, question.id)
    assert texts(conversation) == ["What is the capital of France?", "Paris.", "Thanks"]
    store.select(conversation, wrong.id)
    assert texts(store.load(conversation.id)) == ["What is the capital of France?", "Lyon."]
    store.set_leaf(conversation, right.id)
    assert texts(store.load(conversation.id)) == ["What is the capital of France?", "Paris."]
    assert conversation.children(right.id) == [thanks.id]


@pytest.mark.parametrize(("role", "parent"), [("system", None), ("user", 99), ("", None)])
def test_a_message_with_an_invalid_parent_is_rejected(store: Store, role: str, parent: int | None) -> None:
    conversation = talk(store, "Hi", "Hello")
    with pytest.raises(ValueError, match="does not fit"):
        store.add(conversation, role, "What?", parent=parent)
    assert store.load(conversation.id).messages == conversation.messages


TREES = st.lists(st.tuples(st.integers(0, 30), st.text(max_size=5)), min_size=1, max_size=30)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def grown(tree: list[tuple[int, str]]) -> Conversation:
    """A conversation with one message per pair of parent number (0: none) and text."""
    conversation = Conversation(title="Tree", created=1.5, updated=2.5, system="Be a tree.")
    for number, (choice, text) in enumerate(tree, start=1):
        parent = choice % number
        conversation.attach(Message(number, parent or None, ("user", "assistant")[number % 2], text))
    conversation.leaf = max(conversation.messages)
    return conversation


@given(tree=TREES, choice=st.integers(0, 30))
@settings(deadline=None)
def test_a_selected_branch_ends_at_its_newest_message(tree: list[tuple[int, str]], choice: int) -> None:
    conversation = grown(tree)
    chosen = 1 + choice % len(tree)
    conversation.select(chosen)
    path = [message.id for message in conversation.path()]
    assert chosen in path
    assert path[0] in conversation.children(None)
    assert all(after in conversation.children(before) for before, after in itertools.pairwise(path))
    below = [number for number in conversation.messages if chosen in [m.id for m in conversation.path_to(number)]]
    assert path[-1] == max(below)
    assert conversation.children(path[-1]) == []
    for number, message in conversation.messages.items():
        assert number in conversation.siblings(number)
        assert all(conversation.messages[other].parent == message.parent for other in conversation.siblings(number))


@given(tree=TREES, params=st.dictionaries(st.text(max_size=5), JSON, max_size=3))
@settings(deadline=None, max_examples=50)
def test_a_tree_is_unchanged_by_json_and_the_store(tree: list[tuple[int, str]], params: dict[str, Any]) -> None:
    conversation = grown(tree)
    conversation.messages[1].params = params
    assert transcript.from_json(transcript.to_json(conversation)) == conversation
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder, "conversations.sqlite3")) as store:
        assert store.import_conversation(conversation)
        loaded = store.load(1)
    loaded.id = 0
    assert loaded == conversation


# Search


def test_search_finds_any_part_of_titles_answers_and_reasoning(either: Store) -> None:
    berries = talk(either, "How many Rs are there in strawberry?", "Three of them.")
    animals = talk(either, "What is the FASTEST animal?", "The falcon.", title="Zoology")
    thought = animals.path()[-1]
    thought.reasoning = "Cheetahs run, falcons dive."
    either.update(thought)
    assert found(either, "strawb") == [berries.id]
    assert found(either, "straw rs MANY") == [berries.id]
    assert found(either, "fastest") == [animals.id]
    assert found(either, "zool") == [animals.id]
    assert found(either, "cheetah") == [animals.id]
    assert found(either, "falcon dive") == [animals.id]
    assert found(either, "strawberry falcon") == []
    assert found(either, "zo") == [animals.id]
    assert found(either, "in zz") == []
    assert found(either, "  ") == [animals.id, berries.id]


def test_search_finds_languages_without_spaces(either: Store) -> None:
    chinese = talk(either, "中国的首都是哪里\uff1f", "北京是中国的首都。")
    japanese = talk(either, "日本の首都はどこですか", "東京です。")
    greek = talk(either, "Ποια είναι η ΠΡΩΤΕΎΟΥΣΑ;", "Αθήνα")
    assert found(either, "首都") == [japanese.id, chinese.id]
    assert found(either, "中国的首都") == [chinese.id]
    assert found(either, "东") == []
    assert found(either, "東京です") == [japanese.id]
    assert found(either, "京") == [japanese.id, chinese.id]
    assert found(either, "πρωτεύουσα") == [greek.id]


@pytest.mark.parametrize(
    "text",
    [
        *('"', '""', "'", "*", "NOT", "OR", "content:x", "NEAR(", "(", "-", "^x", "a*", "%", "_", "\\", 'x"OR"y', ";"),
        *("{0}", "{summary}", "[a-z]", ".*", "\0", "\ud800", "a\0b"),
        *("a OR b", 'x" OR "y', "; DROP TABLE messages", "x" * 100_000, "word " * 10_000),
    ],
)
def test_a_search_is_plain_text_without_query_syntax(either: Store, text: str) -> None:
    talk(either, "Plum?", "Quite.")
    conversation = talk(either, f"This has {text[:1000]} in it", "Sure")
    if text.strip("\0"):
        assert found(either, text[:1000]) == [conversation.id]
    assert len(either.search(text)) <= 2


def test_search_reflects_changes(either: Store) -> None:
    conversation = talk(either, "Hi", "A giraffe")
    answer = conversation.path()[-1]
    answer.content, answer.finished = "A zebr", False
    either.update(answer)
    assert (found(either, "giraffe"), found(either, "zeb")) == ([], [conversation.id])
    answer.content, answer.finished = "A zebra", True
    either.update(answer)
    assert (found(either, "zebr"), found(either, "zebra")) == ([conversation.id], [conversation.id])
    answer.content = "A gnu"
    either.update(answer)
    assert (found(either, "zebra"), found(either, "gnu")) == ([], [conversation.id])
    either.set_title(conversation, "Lions")
    assert found(either, "lion") == [conversation.id]


def test_title_hits_come_first_and_hits_have_snippets(either: Store) -> None:
    titled = talk(either, "Hi", "Hello", title="All about falcons")
    hit = talk(either, "Hi again", "It is known to all that the " + "very " * 40 + "fast Falcon " + "dives " * 40)
    first, second = either.search("falcon")
    assert [first.id, second.id] == [titled.id, hit.id]
    assert "fast Falcon dives" in second.snippet
    assert len(second.snippet) < 110
    assert second.snippet.startswith("…")
    assert second.snippet.endswith("…")


def test_an_outdated_index_is_rebuilt(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with Store(path) as store:
        talk(store, "Strawberries", "Yes")
    with monkeypatch.context() as patch:
        patch.setattr(database, "_has_trigrams", lambda _connection: False)
        with Store(path) as store:
            talk(store, "Raspberries", "Yes")
            assert len(found(store, "berries")) == 2
            with contextlib.closing(sqlite3.connect(path)) as other:  # the triggers would fail there
                assert other.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'").fetchall() == []
    with Store(path) as store:
        assert len(found(store, "berries")) == 2


def test_twenty_thousand_messages_are_handled_quickly(either: Store) -> None:
    conversation = Conversation(title="Long")
    words = ["ocean", "mountain", "river", "forest", "desert", "island"]
    draw = random.Random(1)
    for number in range(1, 20_001):
        text = " ".join(draw.choices(words, k=12)) + (" needle" if number == 777 else "")
        conversation.attach(Message(number, number - 1 or None, ("assistant", "user")[number % 2], text, created=1.0))
    conversation.leaf = 20_000
    assert either.import_conversation(conversation)
    other = talk(either, "Hi", "A needle")
    assert [(each.id, each.count) for each in either.recent()] == [(other.id, 2), (1, 20_000)]
    assert found(either, "need") == [other.id, 1]
    assert found(either, "of") == []
    loaded = either.load(1)
    assert len(loaded.path()) == 20_000
    assert loaded.siblings(777) == [777]


# Several programs, crashes


def test_threads_share_a_store(store: Store) -> None:
    conversations = [talk(store, f"Thread {number}", "0") for number in range(4)]

    def stream(conversation: Conversation) -> None:
        answer = conversation.path()[-1]
        for count in range(50):
            answer.content = str(count)
            store.update(answer)
            store.search("thread")

    threads = [threading.Thread(target=stream, args=[conversation]) for conversation in conversations]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert [texts(store.load(conversation.id))[1] for conversation in conversations] == ["49"] * 4


PROGRAM = """
    import sys
    from pathlib import Path
    from llm_edge.chat.history.store import Store

    path, name = Path(sys.argv[1]), sys.argv[2]
    with Store(path) as store:
"""


def program(path: Path, name: str, body: str) -> subprocess.Popen[str]:
    """Another program with the store."""
    code = textwrap.dedent(PROGRAM) + textwrap.indent(textwrap.dedent(body), "    ")
    return subprocess.Popen([sys.executable, "-c", code, str(path), name], stdout=subprocess.PIPE, text=True)


def test_programs_can_start_and_write_concurrently(path: Path) -> None:
    body = """
        for number in range(20):
            conversation = store.new()
            store.add(conversation, "user", f"{name} {number}")
    """
    programs = [program(path, name, body) for name in ("one", "two", "three")]
    assert [each.communicate(timeout=60)[0] for each in programs] == [""] * 3
    assert [each.returncode for each in programs] == [0, 0, 0]
    with Store(path) as store:
        titles = {summary.title for summary in store.recent(100)}
        assert titles == {f"{name} {number}" for name in ("one", "two", "three") for number in range(20)}
        assert len(store.search("three", limit=100)) == 20


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no program can be killed outright here")
def test_nothing_is_lost_when_the_program_is_killed(path: Path) -> None:
    body = """
        conversation = store.new()
        for turn in range(1_000):
            store.add(conversation, "user", f"Question {turn}")
            answer = store.add(conversation, "assistant")
            for word in range(20):
                answer.content += f"word {word} " * 50
                store.update(answer)
                print(conversation.id, answer.id, len(answer.content), 0, flush=True)
            answer.finished = True
            store.update(answer)
            print(conversation.id, answer.id, len(answer.content), 1, flush=True)
    """
    draw = random.Random(3)
    for _moment in range(50):
        running = program(path, "killed", body)
        assert running.stdout is not None
        lines = [running.stdout.readline() for _line in range(draw.randint(1, 40))]
        time.sleep(draw.random() / 200)
        os.kill(running.pid, signal.SIGKILL)
        lines += running.communicate(timeout=60)[0].splitlines()
        reported = [[int(word) for word in line.split()] for line in lines if len(line.split()) == 4]
        with Store(path) as store:
            loaded = store.load(reported[0][0])
            assert store.search("word 1")
        longest = {answer: length for _conversation, answer, length, _finished in reported}
        for answer, length in longest.items():
            assert len(loaded.messages[answer].content) >= length
        for _conversation, answer, length, finished in reported:
            if finished:
                assert loaded.messages[answer].finished
                assert len(loaded.messages[answer].content) == length
        open_ones = [message for message in loaded.messages.values() if not message.finished]
        assert len(open_ones) <= 1
        assert all(message.id == loaded.leaf for message in open_ones)


def test_a_locked_file_is_reported(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(database, "BUSY_TIMEOUT", 0.05)
    with Store(path) as store:
        conversation = talk(store, "Hi", "Hello")
        with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
            other.execute("BEGIN IMMEDIATE")
            assert store.recent()[0].id == conversation.id  # reading still works
            with pytest.raises(MachineError, match=r"conversations\.sqlite3: locked by another program"):
                store.add(conversation, "user", "More")
            assert len(conversation.messages) == 2
        store.add(conversation, "user", "More")


# Invalid files


def test_a_newer_file_is_rejected_and_unchanged(path: Path) -> None:
    with Store(path) as store:
        talk(store, "Hi", "Hello")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA user_version = 2")
    before = path.read_bytes()
    with pytest.raises(InputError, match=r"conversations\.sqlite3: written by a newer llm-edge .*upgrade llm-edge"):
        Store(path)
    assert path.read_bytes() == before


def test_a_database_of_another_program_is_rejected_and_unchanged(path: Path) -> None:
    path.parent.mkdir()
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.execute("CREATE TABLE bookmarks (id)")
    before = path.read_bytes()
    with pytest.raises(InputError, match="a database of another program"):
        Store(path)
    assert path.read_bytes() == before


def read_all(path: Path) -> None:
    with Store(path) as store:
        for summary in store.recent(1000):
            store.load(summary.id)
        store.search("answer")


@pytest.mark.parametrize("damage", ["text", "header", "half", "pages"])
def test_a_damaged_file_is_reported_in_one_line_and_unchanged(path: Path, damage: str) -> None:
    with Store(path) as store:
        for number in range(200):
            talk(store, f"Question {number} " * 20, "Answer " * 50)
    data = bytearray(path.read_bytes())
    if damage == "text":
        data = bytearray(b"Dear diary, today I learnt what a database is. " * 100)
    elif damage == "header":
        data[:16] = b"\0" * 16
    elif damage == "half":
        del data[len(data) // 2 + 100 :]
    else:
        data[4096 : len(data) - 4096] = random.Random(5).randbytes(len(data) - 8192)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"conversations\.sqlite3: damaged") as raised:
        read_all(path)
    assert "\n" not in str(raised.value)
    assert path.read_bytes() == data


ENDLESS = "WITH RECURSIVE n (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT"
TITLE = f"UPDATE conversations SET title = ({ENDLESS} max(x) FROM n)"


@pytest.mark.parametrize(
    "change",
    [
        f"CREATE TRIGGER t AFTER INSERT ON messages BEGIN {TITLE}; END",
        f"CREATE TRIGGER t AFTER UPDATE ON conversations BEGIN {ENDLESS} max(x) FROM n; END",
        f"DROP VIEW finished_messages; CREATE VIEW finished_messages AS {ENDLESS} x id, 1 content, 2 reasoning FROM n",
        f"DROP TABLE conversations; CREATE VIEW conversations AS {ENDLESS} x AS id, 0 AS deleted FROM n",
        f"CREATE VIEW more AS {ENDLESS} x FROM n",
    ],
)
def test_foreign_views_and_triggers_are_rejected_before_they_run(path: Path, change: str) -> None:
    with Store(path) as store:
        talk(store, "Hi", "Hello")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(change)
    before = path.read_bytes()
    with pytest.raises(
        InputError, match=r"conversations\.sqlite3: changed by another program \((view|trigger) '\w+'\)"
    ):
        Store(path)
    assert path.read_bytes() == before


def test_a_changed_trigger_of_the_index_is_replaced(path: Path) -> None:
    with Store(path) as store:
        talk(store, "Hi", "Hello")
    with contextlib.closing(sqlite3.connect(path)) as connection:
        connection.executescript(
            "DROP TRIGGER index_added;"
            f"CREATE TRIGGER index_added AFTER INSERT ON messages BEGIN {ENDLESS} x FROM n; END"
        )
    with Store(path) as store:
        talk(store, "Another question", "Another answer")
        assert [found.title for found in store.search("another ans")] == ["Another question"]


def test_a_file_without_further_message_numbers_is_rejected(path: Path) -> None:
    with Store(path) as store:
        talk(store, "Hi", "Hello")
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        connection.execute("UPDATE sqlite_sequence SET seq = 9223372036854775807 WHERE name = 'messages'")
    with pytest.raises(InputError, match=r"conversations\.sqlite3: damaged, no number is left"):
        Store(path)


@pytest.mark.parametrize("name", ["wal", "shm", "journal"])
def test_folders_under_the_names_of_side_files_are_reported(path: Path, name: str) -> None:
    Store(path).close()
    path.with_name(f"{path.name}-{name}").mkdir()
    with pytest.raises(InputError, match=f"conversations.sqlite3-{name}: not a file"):
        Store(path)


def test_invalid_rows_are_reported(path: Path) -> None:
    for change in ("parent = 2", "role = 'root'", "params = '[]'", "figures = '{'", "content = x'00ff'", "parent = 77"):
        path.unlink(missing_ok=True)
        with Store(path) as store:
            conversation = talk(store, "Hi", "Hello")
        with contextlib.closing(sqlite3.connect(path)) as connection, connection:
            connection.execute("DROP TRIGGER index_changed")
            connection.execute(f"UPDATE messages SET {change} WHERE id = 1")
        with Store(path) as store, pytest.raises(InputError, match="damaged"):
            store.load(conversation.id)


def test_invalid_paths_are_rejected(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="not a file"):
        Store(tmp_path)
    (tmp_path / "file").write_text("x", encoding="utf-8")
    with pytest.raises(MachineError, match="cannot be created"):
        Store(tmp_path / "file" / "conversations.sqlite3")
    with pytest.raises(InputError, match="not a path"):
        Store(tmp_path / "a\0b")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        with pytest.raises(InputError, match="not a file"):
            Store(tmp_path / "pipe")


@pytest.mark.skipif(os.name == "nt", reason="permissions work differently here")
def test_files_are_readable_only_by_their_user(store: Store, path: Path) -> None:
    talk(store, "Hi", "Hello")
    assert stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    assert {stat.S_IMODE(file.stat().st_mode) for file in path.parent.iterdir()} == {0o600}


def test_environment_variables_set_the_location(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLM_EDGE_DATA", str(tmp_path))
    assert default_path().parent == tmp_path
    monkeypatch.setenv("LLM_EDGE_DATA", "")
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path / "xdg"))
    assert default_path().parent.name == "llm-edge"
    monkeypatch.setenv("LLM_EDGE_DATA", "~nobody-of-this-name/data")
    with pytest.raises(InputError, match="LLM_EDGE_DATA"):
        default_path()


# Titles and snippets


@pytest.mark.parametrize(
    ("question", "title"),
    [
        ("What is the capital of France?", "What is the capital of France?"),
        ("\n\n  ## Explain   quantum\tcomputing\nin simple terms", "Explain quantum computing"),
        ("> quoted", "quoted"),
        ("", ""),
        (" \n\t\n", ""),
        ("###\n---\nAt last", "At last"),
        (
            "What is the fastest animal? I would also like to know how it came to be so fast, and why.",
            "What is the fastest animal?",
        ),
        (
            "If the Han dynasty Chinese fought the Romans in a battle on a plain, who would win, and why?",
            "If the Han dynasty Chinese fought the Romans in a battle on…",
        ),
        ("好" * 100, "好" * 59 + "…"),
        ("首都是哪里呢" * 5 + "\uff1f" + "好" * 60, "首都是哪里呢" * 5 + "\uff1f"),
        ("x" * 58 + "e\u0301\u0301\u0301 and so on", "x" * 58 + "…"),
    ],
)
def test_a_title_is_derived_from_a_question(question: str, title: str) -> None:
    assert title_of(question) == title


@given(st.text())
def test_titles_are_single_short_lines(text: str) -> None:
    for line, limit in ((title_of(text), 60), (one_line(text), 200), (snippet(text, text.split()[-1:]), 101)):
        assert len(line) <= limit
        assert len(line.splitlines()) <= 1
        assert line == line.strip()


def test_only_the_first_question_sets_the_title(store: Store) -> None:
    conversation = talk(store, "Tell me a joke\nabout ducks", "Quack.", "Another")
    store.add(conversation, "user", "Tell me a story", parent=None)
    assert store.recent()[0].title == "Tell me a joke"


# Files


def example() -> Conversation:
    conversation = Conversation(title="Animals", system="Be brief.", created=1.0, updated=2.0)
    conversation.attach(Message(1, None, "user", "What is the fastest animal?"))
    conversation.attach(Message(2, 1, "assistant", "The cheetah."))
    conversation.attach(
        Message(
            3,
            1,
            "assistant",
            "The falcon:\n```py\ndive()",
            "Birds dive.\n\n</details>\n\nYes.",
            model="tiny_model",
            params={"temperature": 0.3, "top_k": 5},
            figures={"tokens": 12, "tokens_per_second": 34.56, "finish_reason": "length"},
            finished=False,
        )
    )
    conversation.leaf = 3
    return conversation


def test_markdown_contains_the_selected_branch() -> None:
    assert transcript.markdown(example()) == textwrap.dedent(
        """\
        # Animals

        **system**

        Be brief.

        **user**

        What is the fastest animal?

        **assistant**

        > *Reasoning*
        >
        > Birds dive.
        >
        > </details>
        >
        > Yes.

        The falcon:
        ```py
        dive()
        ```

        *(tiny\\_model, temperature 0.3, top\\_k 5, 12 tokens, 35 tok/s, length, unfinished)*
        """
    )


def test_json_contains_the_whole_tree(tmp_path: Path) -> None:
    name = str(tmp_path / "talk.json")
    transcript.save(name, example())
    assert transcript.read(Path(name)) == example()
    document = json.loads(Path(name).read_text(encoding="utf-8"))
    assert [message["content"] for message in document["messages"]][1] == "The cheetah."


def test_numbers_that_json_lacks_become_null() -> None:
    conversation = example()
    conversation.messages[3].figures = {"tokens_per_second": float("nan"), "all": [float("inf")]}
    read = transcript.from_json(transcript.to_json(conversation))
    assert read.messages[3].figures == {"tokens_per_second": None, "all": [None]}


def example_json(**changes: Any) -> str:
    """The example as JSON with changed fields of the document or (prefix `m_`) of its last message."""
    document = json.loads(transcript.to_json(example()))
    for name, value in changes.items():
        target, key = (document["messages"][-1], name[2:]) if name.startswith("m_") else (document, name)
        if value is ...:
            del target[key]
        else:
            target[key] = value
    return json.dumps(document)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "invalid JSON"),
        ("[" * 100_000, "invalid JSON"),
        ("9" * 10_000, "invalid JSON"),
        ("[]", '"format"'),
        ('{"format": "other"}', '"format"'),
        (example_json(version=2), '"version" is not 1'),
        (example_json(title=5), '"title" is of the wrong type'),
        (example_json(messages=...), '"messages" is missing'),
        (example_json(messages=[5]), r"messages\[0\]: not an object"),
        (example_json(leaf=9), '"leaf" is 9'),
        (example_json(leaf=True), '"leaf"'),
        (example_json(created=-1), '"created"'),
        (example_json(created=1e300), '"created"'),
        (example_json(m_id=1), r"messages\[2\]: .*in use"),
        (example_json(m_id=2**80), r'messages\[2\]: "id"'),
        (example_json(m_parent=3), "not an earlier message"),
        (example_json(m_parent="1"), '"parent"'),
        (example_json(m_role="system"), "role"),
        (example_json(m_content=None), '"content" is missing'),
        (example_json(m_params=json.loads("[" * 50 + "]" * 50)), '"params"'),
        (example_json(m_params={"a": json.loads("[" * 50 + "]" * 50)}), "nested deeper"),
        (example_json(m_finished=1), '"finished"'),
    ],
)
def test_invalid_json_is_rejected(text: str, reason: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=reason):
        transcript.from_json(text)
    (tmp_path / "talk.json").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=r"talk\.json: ") as raised:
        transcript.read(tmp_path / "talk.json")
    assert "\n" not in str(raised.value)


def test_files_are_written_atomically_and_never_overwritten(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = tmp_path / "talk.md"
    transcript.save(str(name), example())
    written = name.read_text(encoding="utf-8")
    assert written == transcript.markdown(example())
    with pytest.raises(InputError, match=r"talk\.md exists already"):
        transcript.save(str(name), Conversation(messages={1: Message(1, None, "user", "Other")}, leaf=1))
    assert name.read_text(encoding="utf-8") == written
    with monkeypatch.context() as patch:  # another program created the file first
        patch.setattr("llm_edge.chat.history.transcript.os.path.lexists", lambda _path: False)
        with pytest.raises(InputError, match=r"talk\.md exists already"):
            transcript.write_file(str(name), "Other")
    assert name.read_text(encoding="utf-8") == written
    transcript.save(str(name), Conversation(messages={1: Message(1, None, "user", "Other")}, leaf=1), overwrite=True)
    assert name.read_text(encoding="utf-8") == "**user**\n\nOther\n"
    assert [file.name for file in tmp_path.iterdir()] == ["talk.md"]


def test_write_errors_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="nothing to save"):
        transcript.save(str(tmp_path / "talk.md"), Conversation(system="Be brief."))
    for name in (str(tmp_path), str(tmp_path / "no" / "talk.md"), f"{tmp_path}/a\0b", f"{tmp_path}/{'x' * 300}.md"):
        for overwrite in (False, True):
            with pytest.raises(InputError, match="choose another name"):
                transcript.save(name, example(), overwrite=overwrite)
    target = tmp_path / "kept.md"
    target.write_text("kept", encoding="utf-8")

    def full(_descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("llm_edge.chat.history.transcript.os.fsync", full)
    for name, overwrite in (("new.md", False), ("kept.md", True)):
        with pytest.raises(InputError, match="No space left"):
            transcript.save(str(tmp_path / name), example(), overwrite=overwrite)
    assert [(file.name, file.read_text(encoding="utf-8")) for file in tmp_path.iterdir()] == [("kept.md", "kept")]


def use_everything(path: Path) -> None:
    """Read what a file holds, and add to it."""
    with Store(path) as store:
        for summary in store.recent():
            for message in store.load(summary.id).messages:
                store.records(message)
        store.search("sky")
        conversation = store.new("title")
        store.add(conversation, "user", "new")
        answer = store.add(conversation, "assistant", "x")
        answer.content, answer.finished = "y", True
        store.update(answer)
        store.add_records(answer.id, b"z")
        store.pin(conversation)
        store.delete(conversation.id)
        store.restore(conversation.id)


def damage_reported_by(path: Path) -> str:
    try:
        use_everything(path)
    except InputError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("seed", range(4))
def test_any_damage_is_reported_in_one_line_and_the_file_is_kept(seed: int, tmp_path: Path) -> None:
    path = tmp_path / "conversations.sqlite3"
    for _ in range(5):
        use_everything(path)
    original, rng, reported = path.read_bytes(), random.Random(seed), 0
    for _ in range(40):
        content = bytearray(original)
        size = 4096 if rng.random() < 0.5 else len(content)  # the schema is in the first page
        for _ in range(rng.choice((1, 1, 5))):
            content[rng.randrange(size)] ^= 1 << rng.randrange(8)
        if rng.random() < 0.2:
            del content[rng.randrange(len(content)) :]
        for each in tmp_path.iterdir():
            each.unlink()
        path.write_bytes(content)
        message = damage_reported_by(path)
        assert "\n" not in message
        if message:
            assert message.startswith(f"{path}: ")
            assert "move it away" in message or "another folder" in message
            reported += 1
        assert path.stat().st_size > 0 or not content
    assert reported > 5
