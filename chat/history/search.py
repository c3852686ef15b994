"""`ConversationReader`: lists and searches the conversations of a file.

The full text of finished messages is indexed by trigrams (SQLite's FTS5), so that parts of words are found, also in
languages without spaces. Words of one or two characters, unfinished messages, and all messages if SQLite lacks the
index are searched one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llm_edge.chat.history.conversation import USER
from llm_edge.chat.history.database import Database
from llm_edge.chat.text import snippet, without_surrogates

_MAX_WORDS = 32  # of a search; long text may be pasted there
_MAX_WORD = 100  # characters

_SUMMARY = """
SELECT c.id, c.title, c.pinned, c.updated,
    (SELECT COUNT(*) FROM messages m WHERE m.conversation = c.id),
    (SELECT m.model FROM messages m WHERE m.conversation = c.id AND m.model <> '' ORDER BY m.id DESC LIMIT 1)
"""
_RECENT = f"""
{_SUMMARY} FROM conversations c WHERE c.deleted IS NULL
ORDER BY c.pinned DESC, c.updated DESC, c.id DESC LIMIT :limit OFFSET :offset
"""
_FROM_INDEX = """
    SELECT rowid AS id FROM message_index WHERE message_index MATCH :match
    UNION ALL SELECT id FROM messages WHERE NOT finished
"""
_FROM_ALL = "SELECT id FROM messages"
_SEARCH = """
WITH hits AS (
    SELECT m.conversation, MAX(m.id) AS message FROM ({candidates}) f JOIN messages m ON m.id = f.id
    WHERE m.finished AND :rest = '' OR holds(CASE WHEN m.finished THEN :rest ELSE :words END, m.content, m.reasoning)
    GROUP BY m.conversation)
{summary}, hits.message, holds(:words, c.title, '') AS in_title
FROM conversations c LEFT JOIN hits ON hits.conversation = c.id
WHERE c.deleted IS NULL AND (hits.message IS NOT NULL OR in_title)
ORDER BY in_title DESC, c.updated DESC, c.id DESC LIMIT :limit
"""


@dataclass(frozen=True, slots=True)
class Summary:
    """A conversation in a list."""

    id: int
    title: str
    pinned: bool  # whether it is listed before the others
    updated: float  # Unix time in seconds
    count: int  # of messages
    model: str  # that answered last
    snippet: str = ""  # text around the words that a search found


class ConversationReader:
    """Read access to the conversations of a file, which is created if it does not exist. Thread-safe.

    Every method raises MachineError if the disk fails or another program locks the file, and InputError if the file is
    damaged.

    Raises:
        InputError: the file is damaged, not ours, or of a newer version; it is not modified.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._database = Database(path)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def recent(self, limit: int = 50, offset: int = 0) -> list[Summary]:
        """Conversations, pinned ones first, then the most recently used."""
        with self._database.read():
            rows = self._database.execute(_RECENT, {"limit": limit, "offset": offset}).fetchall()
        return [_summary(row) for row in rows]

    def search(self, text: str, limit: int = 50) -> list[Summary]:
        """Conversations with all these words, or parts of words, in the title or in one message.

        Case is ignored. Matches in titles come first, then the most recently used. An empty search finds everything.
        """
        text = without_surrogates(text).replace("\0", " ")
        words = [word[:_MAX_WORD] for word in text.split(maxsplit=_MAX_WORDS)[:_MAX_WORDS]]
        if not words:
            return self.recent(limit)
        long = [word for word in words if len(word) > 2] if self._database.indexed else []
        values = {
            "match": " AND ".join('"' + word.replace('"', '""') + '"' for word in long),
            "words": "\n".join(words).casefold(),
            "rest": "\n".join(word for word in words if word not in long).casefold(),
            "limit": limit,
        }
        sql = _SEARCH.format(candidates=_FROM_INDEX if long else _FROM_ALL, summary=_SUMMARY)
        with self._database.read():
            rows = self._database.execute(sql, values).fetchall()
            return [_summary(row, self._snippet(row[6], words)) for row in rows]

    def questions(self, limit: int = 200, longest: int = 4000) -> list[str]:
        """The latest questions, the last one last, without imported ones and those longer than `longest` characters."""
        query = (  # CROSS JOIN: scan messages from the last one until there are enough
            "SELECT m.content FROM messages m CROSS JOIN conversations c ON c.id = m.conversation WHERE m.role = ?"
            " AND m.foreign_id IS NULL AND c.foreign_id IS NULL AND c.deleted IS NULL AND LENGTH(m.content) <= ?"
            " ORDER BY m.id DESC LIMIT ?"
        )
        with self._database.read():
            rows = self._database.execute(query, (USER, longest, limit)).fetchall()
        return [str(content) for (content,) in reversed(rows)]

    def _snippet(self, message: int | None, words: list[str]) -> str:
        if message is None:
            return ""
        query = "SELECT content, reasoning FROM messages WHERE id = ?"
        content, reasoning = self._database.execute(query, (message,)).fetchone()
        in_content = any(word.casefold() in content.casefold() for word in words)
        return snippet(content if in_content else reasoning, words)


def _summary(row: tuple[Any, ...], found: str = "") -> Summary:
    number, title, pinned, updated, count, model = row[:6]
    return Summary(number, str(title), bool(pinned), updated, count, str(model or ""), found)
