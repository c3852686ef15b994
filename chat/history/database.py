"""`Database`: the SQLite file of conversations: schema, checks, transactions and errors."""

from __future__ import annotations

import contextlib
import sqlite3
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from llm_edge.runtime.errors import InputError, LlmEdgeError, MachineError
from llm_edge.runtime.safe_io import short_repr

VERSION = 1
BUSY_TIMEOUT = 5.0  # seconds to wait while another program writes
_LAST_ID = 2**63 - 1  # of SQLite
_APPLICATION = 0x4C4C4D45  # identifies our files: "LLME"

# Statements are constant, so these also mean that the file is not what was written: a table or a column is missing, or
# a constraint does not hold.
_DAMAGED = (
    *(sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_FORMAT, sqlite3.SQLITE_ERROR),
    *(sqlite3.SQLITE_CONSTRAINT, sqlite3.SQLITE_MISMATCH, sqlite3.SQLITE_SCHEMA, sqlite3.SQLITE_TOOBIG),
)

_SCHEMA = """
CREATE TABLE conversations (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    title TEXT NOT NULL,
    pinned INTEGER NOT NULL,
    created REAL NOT NULL,
    updated REAL NOT NULL,
    system TEXT NOT NULL,
    leaf INTEGER,
    deleted REAL,
    foreign_id TEXT UNIQUE
);
CREATE TABLE messages (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    conversation INTEGER NOT NULL REFERENCES conversations (id) ON DELETE CASCADE,
    parent INTEGER,
    role TEXT NOT NULL,
    content TEXT NOT NULL,
    reasoning TEXT NOT NULL,
    created REAL NOT NULL,
    model TEXT NOT NULL,
    params TEXT NOT NULL,
    figures TEXT NOT NULL,
    finished INTEGER NOT NULL,
    foreign_id TEXT
);
CREATE INDEX messages_of ON messages (conversation);
CREATE INDEX unfinished_messages ON messages (id) WHERE NOT finished;
CREATE VIEW finished_messages AS SELECT id, content, reasoning FROM messages WHERE finished;
"""

_RECORDS = """
CREATE TABLE IF NOT EXISTS token_records (
    id INTEGER PRIMARY KEY,
    message INTEGER NOT NULL REFERENCES messages (id) ON DELETE CASCADE,
    data BLOB NOT NULL
);
CREATE INDEX IF NOT EXISTS token_records_of ON token_records (message);
"""
"""Added after the first release; older programs ignore it."""

_INDEX = """
DROP TABLE IF EXISTS message_index;
CREATE VIRTUAL TABLE message_index USING fts5(
    content, reasoning, content='finished_messages', content_rowid='id', tokenize='trigram');
INSERT INTO message_index (message_index) VALUES ('rebuild');
CREATE TRIGGER index_added AFTER INSERT ON messages WHEN new.finished BEGIN
    INSERT INTO message_index (rowid, content, reasoning) VALUES (new.id, new.content, new.reasoning);
END;
CREATE TRIGGER index_removed AFTER DELETE ON messages WHEN old.finished BEGIN
    INSERT INTO message_index (message_index, rowid, content, reasoning)
        VALUES ('delete', old.id, old.content, old.reasoning);
END;
CREATE TRIGGER index_changed AFTER UPDATE OF content, reasoning, finished ON messages BEGIN
    INSERT INTO message_index (message_index, rowid, content, reasoning)
        SELECT 'delete', old.id, old.content, old.reasoning WHERE old.finished;
    INSERT INTO message_index (rowid, content, reasoning)
        SELECT new.id, new.content, new.reasoning WHERE new.finished;
END;
"""
_TRIGGERS = ("index_added", "index_changed", "index_removed")


class Database:
    """A thread-safe connection to a file, created if it does not exist, that several programs may use at once.

    Raises:
        InputError: the file is damaged, not ours, or of a newer version; it is not modified.
        MachineError: the file cannot be created or read.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.indexed = False  # whether the table `message_index` holds the full text of finished messages
        self._lock = threading.RLock()
        _create_file(path)
        with self.read():
            self._connection = sqlite3.connect(
                path, timeout=BUSY_TIMEOUT, isolation_level=None, check_same_thread=False
            )
        try:
            with self.read():
                self._open()
        except BaseException:
            self._connection.close()
            raise

    def close(self) -> None:
        """Close the connection."""
        with self._lock:
            self._connection.close()

    def execute(self, sql: str, values: Any = ()) -> sqlite3.Cursor:
        """Execute a statement; call it and fetch its rows within `read` or `change`."""
        return self._connection.execute(sql, values)

    @contextlib.contextmanager
    def read(self) -> Iterator[None]:
        """Lock the connection, and convert SQLite's errors to MachineError, or InputError if the file is damaged."""
        with self._lock:
            try:
                yield
            except (sqlite3.Error, UnicodeDecodeError, OverflowError) as e:  # a damaged schema is not UTF-8
                raise _error(self.path, e) from e

    @contextlib.contextmanager
    def change(self) -> Iterator[None]:
        """A write transaction; otherwise like `read`."""
        with self.read():
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:
                    self._connection.execute("ROLLBACK")
                raise

    def _open(self) -> None:
        connection = self._connection
        connection.text_factory = lambda data: data.decode("utf-8", "replace")
        connection.create_function("holds", 3, _holds, deterministic=True)
        for pragma in ("foreign_keys = ON", "secure_delete = ON", "synchronous = NORMAL"):
            connection.execute(f"PRAGMA {pragma}")
        self._check()
        _to_wal(connection)
        with self.change():
            self._check()  # again: another program may have created it meanwhile
            if self._pragma("user_version") == 0:
                self._run(_SCHEMA)
                connection.execute(f"PRAGMA application_id = {_APPLICATION}")
                connection.execute(f"PRAGMA user_version = {VERSION}")
            self._run(_RECORDS)
            if self.execute("SELECT 1 FROM sqlite_sequence WHERE seq >= ?", (_LAST_ID,)).fetchone():
                raise InputError(
                    f"{self.path}: damaged, no number is left for a message: move it away to start a new one"
                )
            self.indexed = _has_trigrams(connection)
            there = {name for (name,) in connection.execute("SELECT name FROM sqlite_master WHERE type = 'trigger'")}
            # If this SQLite cannot maintain an index that another one created, the index becomes stale, until the next
            # one that can rebuilds it.
            if not self.indexed or not there.issuperset(_TRIGGERS) or self._programs(replaceable=True):
                self._run("".join(f"DROP TRIGGER IF EXISTS {name};" for name in _TRIGGERS))
                if self.indexed:
                    self._run(_INDEX)

    def _check(self) -> None:
        version = self._pragma("user_version")
        empty = self._connection.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0] == 0
        if not (empty and version == 0) and self._pragma("application_id") != _APPLICATION:
            raise InputError(f"{self.path}: a database of another program: set LLM_EDGE_DATA to another folder")
        if version > VERSION:
            raise InputError(
                f"{self.path}: written by a newer llm-edge (format {version}, supported: {VERSION}):"
                " upgrade llm-edge, or set LLM_EDGE_DATA to another folder"
            )
        for kind, name, _ in self._programs(replaceable=False):
            raise InputError(
                f"{self.path}: changed by another program ({kind} {short_repr(name)}): move it away to start a new one"
            )

    def _programs(self, *, replaceable: bool) -> list[tuple[str, str, str]]:
        """The views and triggers that are not ours, as (type, name, SQL): they could run for ever when they are used.

        Args:
            replaceable: those under the names of our triggers; otherwise all others.
        """
        found = self._connection.execute("SELECT type, name, sql FROM sqlite_master WHERE type IN ('view', 'trigger')")
        ours = {_words(part) for part in _statements(_SCHEMA + _INDEX)}
        return [row for row in found if _words(row[2]) not in ours and (row[1] in _TRIGGERS) == replaceable]

    def _pragma(self, name: str) -> int:
        value = self._connection.execute(f"PRAGMA {name}").fetchone()[0]
        return int(value)

    def _run(self, script: str) -> None:
        """Execute several statements within the transaction, which `executescript` would commit."""
        for statement in _statements(script):
            self._connection.execute(statement)


def _statements(script: str) -> Iterator[str]:
    statement = ""
    for part in script.split(";")[:-1]:
        statement += part + ";"
        if sqlite3.complete_statement(statement):
            yield statement
            statement = ""


def _words(statement: object) -> str:
    """A statement for comparison: SQLite stores it without its semicolon."""
    return " ".join(str(statement).strip(" \n;").split())


def _create_file(path: Path) -> None:
    """Create the file, readable only by its user, and its folder."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        if not path.exists():
            path.touch(mode=0o600)
    except OSError as e:
        why = f"{path}: cannot be created ({e.strerror}): set LLM_EDGE_DATA to a writable folder"
        raise MachineError(why) from e
    except ValueError as e:  # a NUL in the name
        raise InputError(f"{path!r}: not a path ({e}): set LLM_EDGE_DATA to another folder") from e
    if not path.is_file():
        raise InputError(f"{path}: not a file: set LLM_EDGE_DATA to another folder")
    for name in ("wal", "shm", "journal"):  # files that SQLite keeps beside it
        side = path.with_name(f"{path.name}-{name}")
        if side.exists() and not side.is_file():
            raise InputError(f"{side}: not a file, but the conversations need one of this name: move it away")


def _to_wal(connection: sqlite3.Connection) -> None:
    """Switch to WAL mode, which allows readers beside a writer. SQLite does not wait here for other programs."""
    deadline = time.monotonic() + BUSY_TIMEOUT
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL").fetchall()
        except sqlite3.OperationalError as e:
            if e.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.02)
        else:
            return


def _has_trigrams(connection: sqlite3.Connection) -> bool:
    """Whether this SQLite has FTS5 with its trigram tokenizer (since 3.34)."""
    try:
        connection.execute("CREATE VIRTUAL TABLE temp.trial USING fts5(text, tokenize='trigram')")
        connection.execute("DROP TABLE temp.trial")
    except sqlite3.OperationalError:
        return False
    return True


def _error(path: Path, error: Exception) -> LlmEdgeError:
    code = (getattr(error, "sqlite_errorcode", None) or 0) & 0xFF
    why = " ".join(str(error).split())[:200]
    if code in _DAMAGED or not isinstance(error, sqlite3.Error):
        return InputError(f"{path}: damaged, or not a database ({why}): move it away to start a new one")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return MachineError(f"{path}: locked by another program: close that one, or try again")
    remedy = "check the disk space and the file's permissions, or set LLM_EDGE_DATA to another folder"
    return MachineError(f"{path}: {why}: {remedy}")


def _holds(words: str, first: object, second: object) -> bool:
    """SQL function: whether two texts together contain all words, which are casefolded lines."""
    text = f"{first}\n{second}".casefold()
    return all(word in text for word in words.split("\n"))
