"""Damaged files of conversations: flipped bits, truncation, swapped pages, foreign and hostile schemas.

`python tests/fuzz/damaged_stores.py FOLDER` reads all of the file in that folder as the history of the chat does.
"""

from __future__ import annotations

import contextlib
import random
import shutil
import sqlite3
import sys
from collections.abc import Callable
from pathlib import Path

import damaged_bundles
from damage import cut, damage_bytes, flip
from sandbox import Command

from llm_edge.chat.history.store import Store
from llm_edge.runtime.command import run
from llm_edge.tui import cli as chat_cli

FILE = "conversations.sqlite3"
ENDLESS = "WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM n) SELECT {columns} FROM n"
GROW = (
    "CREATE TRIGGER t AFTER INSERT ON messages BEGIN INSERT INTO messages SELECT NULL, conversation, parent, role, "
    "content, reasoning, created, model, params, figures, finished, NULL FROM messages; END"
)
CONVERSATIONS = (
    "x AS id, 'a' AS title, 0 AS pinned, 0 AS created, 0 AS updated, '' AS system, NULL AS leaf, NULL AS deleted, "
    "NULL AS foreign_id"
)
MESSAGES = (
    "x AS id, 1 AS conversation, NULL AS parent, 'user' AS role, 'a' AS content, '' AS reasoning, 0 AS created, "
    "'' AS model, '{}' AS params, '{}' AS figures, 1 AS finished, NULL AS foreign_id"
)
STATEMENTS = (
    "DROP TABLE messages",
    "DROP TABLE conversations",
    "ALTER TABLE messages RENAME COLUMN content TO other",
    "ALTER TABLE conversations ADD COLUMN more TEXT NOT NULL DEFAULT 'x'",
    "DROP TABLE token_records",
    "DROP TABLE message_index",
    "UPDATE conversations SET title = zeroblob(1000000)",
    "UPDATE conversations SET created = 'yesterday', updated = '', leaf = 'x'",
    "UPDATE conversations SET updated = 1e300, leaf = 9223372036854775807",
    "UPDATE messages SET parent = id",
    "UPDATE messages SET parent = (SELECT MAX(id) FROM messages)",
    "UPDATE messages SET parent = 999",
    "UPDATE messages SET params = '[', figures = '{\"a\": NaN}'",
    "UPDATE messages SET params = '{\"temperature\": \"hot\", \"seed\": 1e400, \"max_tokens\": -5}'",
    "UPDATE messages SET params = replace(hex(zeroblob(100000)), '00', '[')",
    "UPDATE messages SET content = x'ff00fe', model = x'80'",
    "UPDATE messages SET content = replace(hex(zeroblob(1500000)), '00', 'ab ')",
    "UPDATE messages SET role = 'tool'",
    "UPDATE messages SET role = 7, created = x'00'",
    "UPDATE messages SET conversation = 77",
    "UPDATE messages SET id = -id",
    "UPDATE sqlite_sequence SET seq = 9223372036854775807",
    "PRAGMA user_version = 99",
    "PRAGMA user_version = -1",
    "PRAGMA application_id = 1",
    GROW,
    "CREATE TRIGGER t BEFORE INSERT ON messages BEGIN SELECT RAISE(ABORT, 'no\nsuch\tthing'); END",
    "CREATE TRIGGER t AFTER INSERT ON messages BEGIN UPDATE conversations SET title = (SELECT max(x) FROM ("
    + ENDLESS.format(columns="x")
    + ")); END",
    "DROP TABLE conversations; CREATE VIEW conversations AS " + ENDLESS.format(columns=CONVERSATIONS),
    "DROP TABLE messages; CREATE VIEW messages AS " + ENDLESS.format(columns=MESSAGES),
    "DROP VIEW finished_messages; CREATE VIEW finished_messages AS "
    + ENDLESS.format(columns="x AS id, 'a' AS content, 'b' AS reasoning"),
    "CREATE UNIQUE INDEX u ON messages (role)",
    "CREATE INDEX holds ON messages (abs(-9223372036854775807 - finished))",
    "PRAGMA writable_schema = ON; UPDATE sqlite_master SET sql = 'nonsense' WHERE name = 'messages'",
    "PRAGMA writable_schema = ON; DELETE FROM sqlite_master WHERE name = 'messages_of'",
)  # fmt: skip


def prepare(folder: Path) -> None:
    """Write a bundle and a file with several conversations."""
    damaged_bundles.prepare(folder)
    with Store(folder / FILE) as store:
        for number in range(30):
            conversation = store.new("A title" * (number % 3), system="Be brief." * (number % 2))
            for turn in range(3):
                store.add(conversation, "user", f"Question {turn} " * 20, params={"temperature": 0.5})
                store.add(conversation, "assistant", "An answer. " * 40, model="tiny", finished=True)
            store.add_records(conversation.leaf or 0, b"\1" * 500)
            if number % 7 == 0:
                store.delete(conversation.id)
    connection = sqlite3.connect(folder / FILE)
    connection.execute("PRAGMA journal_mode = DELETE")
    connection.close()


def swap_pages(path: Path, rng: random.Random) -> str:
    """Exchange or copy pages of the file."""
    content, size = bytearray(path.read_bytes()), 4096
    count = len(content) // size
    a, b = rng.randrange(count), rng.randrange(count)
    first, second = content[a * size : (a + 1) * size], content[b * size : (b + 1) * size]
    content[b * size : (b + 1) * size] = first
    if rng.random() < 0.5:
        content[a * size : (a + 1) * size] = second
    path.write_bytes(content)
    return f"pages {a} and {b} exchanged"


def change_schema(path: Path, rng: random.Random) -> str:
    """Change tables or values with SQL."""
    statement = rng.choice(STATEMENTS)
    connection = sqlite3.connect(path)
    with contextlib.suppress(sqlite3.Error):  # some of the damage is noticed while it is done
        connection.executescript(statement)
    connection.close()
    return statement[:80]


def foreign(path: Path, rng: random.Random) -> str:
    """A database of another program, or no database at all."""
    path.unlink()
    if rng.random() < 0.3:
        path.write_bytes(rng.choice((b"not a database", rng.randbytes(9000), b"SQLite format 3\0", bytes(8192))))
        return "no database"
    connection = sqlite3.connect(path)
    ours = rng.random() < 0.6
    connection.executescript(
        "CREATE TABLE conversations (id INTEGER PRIMARY KEY, other TEXT); "
        + (f"PRAGMA application_id = {0x4C4C4D45}; PRAGMA user_version = {rng.choice((0, 1, 1))};" if ours else "")
    )
    connection.close()
    return "tables of another program"


def side_files(path: Path, rng: random.Random) -> str:
    """Garbage in the files that SQLite keeps beside its database."""
    name = path.with_name(path.name + rng.choice(("-wal", "-shm", "-journal")))
    magic = rng.choice((b"\x37\x7f\x06\x82", b"\xd9\xd5\x05\xf9\x20\xa1\x63\xd7", b""))
    name.write_bytes(magic + rng.randbytes(rng.choice((0, 28, 5000, 32768))))
    if rng.random() < 0.3:
        name.unlink()
        name.mkdir()
    return f"garbage in {name.name}"


CHANGES: tuple[Callable[[Path, random.Random], str], ...] = (
    flip, change_schema, swap_pages, change_schema, cut, change_schema, damage_bytes, foreign, change_schema,
    side_files,
)  # fmt: skip


def browse() -> int:
    """Read and change everything as the history of the full-screen chat does; returns the exit code."""

    def everything() -> None:
        with Store(Path(sys.argv[-1]) / FILE) as store:
            found = [*store.recent(), *store.search("question"), *store.search("an"), *store.search("zzz answer")]
            for number in dict.fromkeys(summary.id for summary in found):
                conversation = store.load(number)
                for message in list(conversation.path()):
                    store.records(message.id)
            if found:
                store.set_title(found[0].id, "Another title")
                store.pin(found[0].id)
                store.delete(found[0].id)
                store.restore(found[0].id)

    return run(everything)


def browse_and_exit() -> None:
    """`browse` as a command."""
    sys.exit(browse())


def make(originals: Path, folder: Path, number: int, rng: random.Random) -> Command:
    """A damaged file of conversations."""
    path = Path(shutil.copy(originals / FILE, folder))
    what = CHANGES[number % len(CHANGES)](path, rng)
    if rng.random() < 0.5:
        return Command(what, browse_and_exit, ("python", __file__, "."))
    damaged_bundles.copy(originals, folder)
    data = {"LLM_EDGE_DATA": "."}
    if rng.random() < 0.5:
        return Command(what, chat_cli.main, ("llm-chat", "bundle", *damaged_bundles.ASK, "--save"), data)
    words = ("llm-chat", "bundle", "--plain", "--continue", "--save", "--max-tokens", "3", "--threads", "1")
    return Command(what, chat_cli.main, words, data, typed="Hello\n/help\n")


if __name__ == "__main__":
    browse_and_exit()
