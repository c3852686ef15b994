"""Lists the conversations of a file and looks for words in them. Changes nothing, and knows no models or screens.

The full text of finished messages is indexed by its trigrams (SQLite's FTS5), so that any part of a word is found, and
Chinese and Japanese, which have no spaces, too. Words of one or two characters, messages that are not finished, and all
messages where SQLite lacks the index are looked through one by one.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from llm_edge.chat.history.conversation import USER
from llm_edge.chat.history.database import Database
from llm_edge.chat.text import snippet, without_surrogates

_MOST_WORDS = 32  # of a search; what is pasted there may be long
_LONGEST_WORD = 100  # characters

_SUMMARY = """
SELECT c.id, c.title, c.pinned, c.updated,
    (SELECT COUNT(*) FROM messages m WHERE m.conversation = c.id),
    (SELECT m.model FROM messages m WHERE m.conversation = c.id AND m.model <> '' ORDER BY m.id DESC LIMIT 1)
"""
_RECENT = f"""
{_SUMMARY} FROM conversations c WHERE c.deleted IS NULL
ORDER BY c.pinned DESC, c.updated DESC, c.id DESC LIMIT :limit OFFSET :offset
"""
_LOOK_IN_INDEX = """
    SELECT rowid AS id FROM message_index WHERE message_index MATCH :match
    UNION ALL SELECT id FROM messages WHERE NOT finished
"""
_LOOK_IN_ALL = "SELECT id FROM messages"
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
    """A conversation in a list: `count` messages, the last `model` that answered, where a search found it."""

    id: int
    title: str
    pinned: bool
    updated: float
    count: int
    model: str
    snippet: str = ""


class Finder:
    """What is kept in a file, to be found. May be used from any thread.

    Every method raises MachineError where the disk fails or another program keeps the file to itself, and InputError
    where the file is damaged.

    Args:
        path: the file; it and its folder are made if they are not there.

    Raises:
        InputError: the file is damaged, something else, or of a newer program; it is left as it is.
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
        """Close the file; what was written stays."""
        self._database.close()

    def recent(self, limit: int = 50, offset: int = 0) -> list[Summary]:
        """Conversations, pinned ones first, then the last used."""
        with self._database.use():
            rows = self._database.execute(_RECENT, {"limit": limit, "offset": offset}).fetchall()
        return [_summary(row) for row in rows]

    def search(self, text: str, limit: int = 50) -> list[Summary]:
        """Conversations whose title, or one of whose messages, holds all these words, in part or in whole.

        Upper and lower case are the same. Those with the words in the title come first, then the last used. Nothing
        but white space finds everything.
        """
        text = without_surrogates(text).replace("\0", " ")
        words = [word[:_LONGEST_WORD] for word in text.split(maxsplit=_MOST_WORDS)[:_MOST_WORDS]]
        if not words:
            return self.recent(limit)
        long = [word for word in words if len(word) > 2] if self._database.indexed else []
        values = {
            "match": " AND ".join('"' + word.replace('"', '""') + '"' for word in long),
            "words": "\n".join(words).casefold(),
            "rest": "\n".join(word for word in words if word not in long).casefold(),
            "limit": limit,
        }
        sql = _SEARCH.format(candidates=_LOOK_IN_INDEX if long else _LOOK_IN_ALL, summary=_SUMMARY)
        with self._database.use():
            rows = self._database.execute(sql, values).fetchall()
            return [_summary(row, self._snippet(row[6], words)) for row in rows]

    def questions(self, limit: int = 200, longest: int = 4000) -> list[str]:
        """The latest questions that were asked here, imported ones not among them, the last one last.

        Those of more than `longest` characters, which hold something pasted, are left out.
        """
        query = (  # CROSS: messages are gone through, from the last one on, until there are enough
            "SELECT m.content FROM messages m CROSS JOIN conversations c ON c.id = m.conversation WHERE m.role = ?"
            " AND m.foreign_id IS NULL AND c.foreign_id IS NULL AND c.deleted IS NULL AND LENGTH(m.content) <= ?"
            " ORDER BY m.id DESC LIMIT ?"
        )
        with self._database.use():
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
