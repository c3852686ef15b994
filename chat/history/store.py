"""`Store`: conversations in one SQLite file, which several programs may use at once.

Each change is a short transaction in SQLite's WAL mode, so that it survives if the program is killed. A power failure
may lose the latest changes, never more.
"""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from llm_edge.chat.history.conversation import ROLES, USER, Conversation, Message, title_of
from llm_edge.chat.history.search import ConversationReader
from llm_edge.chat.settings import user_folder
from llm_edge.chat.text import one_line, without_surrogates
from llm_edge.runtime.errors import InputError

LEAF: Final = -1  # as a parent: the leaf of the conversation
SAVE_INTERVAL = 0.5  # seconds between writes of an answer that is being generated
KEPT_DAYS = 30  # how long a deleted conversation can be restored


def default_path() -> Path:
    """Where conversations are stored: in the folder that LLM_EDGE_DATA names, or in the user's data folder.

    Raises:
        InputError: LLM_EDGE_DATA is not a folder, or platformdirs is not installed.
    """
    return user_folder("LLM_EDGE_DATA", "user_data_path") / "conversations.sqlite3"


class Store(ConversationReader):
    """Reads and changes the conversations of a file; see `ConversationReader` for its errors. Thread-safe."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        try:
            with self._database.change():
                self._database.execute(
                    "DELETE FROM conversations WHERE deleted < ?", (time.time() - KEPT_DAYS * 86_400,)
                )
        except BaseException:
            self.close()
            raise

    def new(self, title: str = "", system: str = "") -> Conversation:
        """A conversation without messages; it is stored with its first message."""
        now = time.time()
        title = one_line(without_surrogates(title))
        return Conversation(title=title, system=without_surrogates(system), created=now, updated=now)

    def load(self, number: int) -> Conversation:
        """Load a conversation with all its messages.

        Raises:
            InputError: the conversation does not exist or was deleted.
        """
        with self._database.read():
            row = self._database.execute(
                "SELECT title, pinned, created, updated, system, leaf FROM conversations"
                " WHERE id = ? AND deleted IS NULL",
                (number,),
            ).fetchone()
            if row is None:
                raise InputError(f"conversation {number} does not exist: it may have been deleted")
            rows = self._database.execute(
                "SELECT id, parent, role, content, reasoning, created, model, params, figures, finished"
                " FROM messages WHERE conversation = ? ORDER BY id",
                (number,),
            ).fetchall()
        title, pinned, created, updated, system, leaf = row
        conversation = Conversation(number, str(title), bool(pinned), created, updated, str(system))
        try:
            for message in rows:
                conversation.attach(_message(message))
        except (RecursionError, TypeError, ValueError) as e:
            raise InputError(f"{self.path}: damaged ({e}): move it away to start a new one") from e
        conversation.leaf = leaf if leaf in conversation.messages else max(conversation.messages, default=None)
        return conversation

    def add(
        self,
        conversation: Conversation,
        role: str,
        content: str = "",
        *,
        parent: int | None = LEAF,
        model: str = "",
        params: Mapping[str, Any] | None = None,
        finished: bool | None = None,
    ) -> Message:
        """Add a message, which becomes the leaf. The first one stores the conversation.

        Args:
            conversation: modified; restored if it was deleted.
            role: "user" or "assistant".
            content: the text so far.
            parent: id of the message it follows; None = it is a first message, as a branch.
            model: name of the model that answers.
            params: parameters of the answer.
            finished: None = True for "user", False for "assistant".

        Raises:
            InputError: the conversation was permanently deleted.
            ValueError: unknown role, or the parent is not in the conversation.
        """
        parent = conversation.leaf if parent == LEAF else parent
        if role not in ROLES or (parent is not None and parent not in conversation.messages):
            raise ValueError(f"a message of {role!r} after message {parent} does not fit this conversation")
        message = Message(
            id=0,
            parent=parent,
            role=role,
            content=content,
            created=time.time(),
            model=model,
            params=dict(params or {}),
            finished=role == USER if finished is None else finished,
        )
        self._insert_new(conversation, message)
        conversation.attach(message)
        conversation.leaf = message.id
        return message

    def _insert_new(self, conversation: Conversation, message: Message) -> None:
        """Store a new message, and the conversation with its first one; sets their ids."""
        message.content, message.model = without_surrogates(message.content), without_surrogates(message.model)
        title = conversation.title or (title_of(message.content) if message.role == USER else "")
        with self._database.change():
            number = conversation.id or self._insert(conversation)
            changed = self._database.execute(
                "UPDATE conversations SET title = CASE title WHEN '' THEN ? ELSE title END, updated = ?, deleted = NULL"
                " WHERE id = ?",
                (title, message.created, number),
            )
            if changed.rowcount == 0:
                raise InputError(f"conversation {number} was permanently deleted: start a new one")
            message.id = self._insert_message(number, message)
            self._database.execute("UPDATE conversations SET leaf = ? WHERE id = ?", (message.id, number))
            query = "SELECT title FROM conversations WHERE id = ?"  # another program may have renamed it
            title = str(self._database.execute(query, (number,)).fetchone()[0])
        conversation.id, conversation.title, conversation.updated = number, title, message.created

    def update(self, message: Message) -> None:
        """Save a message; fast enough to be called several times per second.

        Raises:
            InputError: the message was permanently deleted.
        """
        texts = [without_surrogates(text) for text in (message.content, message.reasoning, message.model)]
        with self._database.change():
            changed = self._database.execute(
                "UPDATE messages SET content = ?, reasoning = ?, model = ?, params = ?, figures = ?, finished = ?"
                " WHERE id = ?",
                (*texts, json.dumps(message.params), json.dumps(message.figures), message.finished, message.id),
            )
            if changed.rowcount == 0:
                raise InputError(f"message {message.id} was permanently deleted: start a new conversation")
            self._database.execute(
                "UPDATE conversations SET updated = ? WHERE id = (SELECT conversation FROM messages WHERE id = ?)",
                (time.time(), message.id),
            )

    def add_records(self, message: int, data: bytes) -> None:
        """Add token records of a message, see `token_records.pack`; they are deleted with it."""
        with self._database.change():
            self._database.execute("INSERT INTO token_records (message, data) VALUES (?, ?)", (message, data))

    def records(self, message: int) -> list[bytes]:
        """The token records of a message, in order."""
        with self._database.read():
            query = "SELECT data FROM token_records WHERE message = ? ORDER BY id"
            return [bytes(data) for (data,) in self._database.execute(query, (message,)).fetchall()]

    def drop_records(self, message: int) -> None:
        """Delete the token records of a message."""
        with self._database.change():
            self._database.execute("DELETE FROM token_records WHERE message = ?", (message,))

    def select(self, conversation: Conversation, number: int) -> None:
        """Show the branch with this message, down to the most recent message that follows it."""
        conversation.select(number)
        self._set(conversation.id, "leaf", conversation.leaf)

    def set_leaf(self, conversation: Conversation, leaf: int | None) -> None:
        """Show the path that ends at this message; None = nothing, until the conversation is loaded again."""
        if leaf is not None and leaf not in conversation.messages:
            raise ValueError(f"message {leaf} is not in this conversation")
        conversation.leaf = leaf
        self._set(conversation.id, "leaf", leaf)

    def set_title(self, conversation: Conversation | int, title: str) -> None:
        """Rename a conversation, given as an object or by id."""
        title = one_line(without_surrogates(title))
        if isinstance(conversation, Conversation):
            conversation.title = title
        self._set(_id(conversation), "title", title)

    def pin(self, conversation: Conversation | int, pinned: bool = True) -> None:
        """Pin or unpin a conversation, given as an object or by id."""
        if isinstance(conversation, Conversation):
            conversation.pinned = pinned
        self._set(_id(conversation), "pinned", pinned)

    def set_system(self, conversation: Conversation, system: str) -> None:
        """Change the system prompt; "" = the chat template's default."""
        conversation.system = without_surrogates(system)
        self._set(conversation.id, "system", conversation.system)

    def delete(self, number: int) -> None:
        """Delete a conversation; `restore` undoes it for KEPT_DAYS days."""
        self._set(number, "deleted", time.time())

    def restore(self, number: int) -> None:
        """Restore a deleted conversation.

        Raises:
            InputError: it was permanently deleted.
        """
        with self._database.change():
            if not self._database.execute("UPDATE conversations SET deleted = NULL WHERE id = ?", (number,)).rowcount:
                raise InputError(f"conversation {number} cannot be restored: it was permanently deleted")

    def import_conversation(
        self, conversation: Conversation, foreign_id: str = "", foreign_ids: Mapping[int, str] | None = None
    ) -> bool:
        """Store a conversation from elsewhere under new ids; the object itself does not change.

        A conversation that is already stored, by its foreign id, gets only new messages; if it was deleted, nothing.

        Args:
            conversation: with messages.
            foreign_id: its id at the source; "" = it is new.
            foreign_ids: ids of its messages at the source, by message id.

        Returns:
            Whether anything was stored.
        """
        names, numbers, added = foreign_ids or {}, dict[int | None, int | None]({None: None}), False
        with self._database.change():
            found = self._database.execute(
                "SELECT id, deleted, (SELECT foreign_id FROM messages WHERE id = leaf) FROM conversations"
                " WHERE foreign_id = ?",
                (foreign_id,),
            ).fetchone()
            here, deleted, shown = found or (None, None, "")
            if deleted is not None or not conversation.messages:
                return False
            known: dict[str, int] = {}
            if here is not None:
                query = "SELECT foreign_id, id FROM messages WHERE conversation = ? AND foreign_id IS NOT NULL"
                known = dict(self._database.execute(query, (here,)))
            number = here or self._insert(conversation, foreign_id or None)
            for old in sorted(conversation.messages):
                message, name = conversation.messages[old], names.get(old)
                if name in known:
                    numbers[old] = known[name]
                else:
                    numbers[old] = self._insert_message(number, message, numbers[message.parent], name)
                    added = True
            if added and shown is not None:  # otherwise it was continued here, and the leaf stays
                self._database.execute(
                    "UPDATE conversations SET leaf = ?, updated = ? WHERE id = ?",
                    (numbers[conversation.leaf], conversation.updated, number),
                )
        return added

    def _set(self, number: int, column: str, value: object) -> None:
        if number == 0:  # not stored yet
            return
        with self._database.change():
            sql = f"UPDATE conversations SET {column} = ? WHERE id = ?"  # noqa: S608 (a constant)
            if not self._database.execute(sql, (value, number)).rowcount:
                raise InputError(f"conversation {number} does not exist: it was permanently deleted")

    def _insert(self, conversation: Conversation, foreign_id: str | None = None) -> int:
        c = conversation
        values = (c.title, c.pinned, c.created, c.updated, c.system, foreign_id)
        cursor = self._database.execute(
            "INSERT INTO conversations (title, pinned, created, updated, system, foreign_id) VALUES (?, ?, ?, ?, ?, ?)",
            values,
        )
        return cursor.lastrowid or 0

    def _insert_message(
        self, conversation: int, message: Message, parent: int | None = LEAF, foreign_id: str | None = None
    ) -> int:
        m = message
        parent = m.parent if parent == LEAF else parent
        values = (conversation, parent, m.role, m.content, m.reasoning, m.created, m.model)
        cursor = self._database.execute(
            "INSERT INTO messages (conversation, parent, role, content, reasoning, created, model, params, figures,"
            " finished, foreign_id) VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
            (*values, json.dumps(m.params), json.dumps(m.figures), m.finished, foreign_id),
        )
        return cursor.lastrowid or 0


class InMemoryStore(Store):
    """A `Store` without a file; a conversation exists only as the object that the caller has."""

    def __init__(self) -> None:
        self._last_id = 0

    def close(self) -> None:
        pass

    def update(self, message: Message) -> None:
        pass

    def add_records(self, message: int, data: bytes) -> None:
        pass

    def drop_records(self, message: int) -> None:
        pass

    def records(self, message: int) -> list[bytes]:  # noqa: ARG002
        return []

    def _insert_new(self, conversation: Conversation, message: Message) -> None:
        self._last_id = max(self._last_id, *conversation.messages, 0) + 1
        message.id = self._last_id

    def _set(self, number: int, column: str, value: object) -> None:
        pass


def _id(conversation: Conversation | int) -> int:
    return conversation.id if isinstance(conversation, Conversation) else conversation


def _message(row: tuple[Any, ...]) -> Message:
    number, parent, role, content, reasoning, created, model, params, figures, finished = row
    if not all(isinstance(text, str) for text in (content, reasoning, model)):
        raise TypeError(f"message {number} is not text")
    values = json.loads(params), json.loads(figures)
    if not all(isinstance(value, dict) for value in values):
        raise TypeError(f"the parameters or figures of message {number} are not an object")
    return Message(number, parent, role, content, reasoning, float(created), model, *values, bool(finished))
