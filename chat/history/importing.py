"""Conversations from a file into the store: ChatGPT's export, or our own JSON. Knows no screens."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llm_edge.chat.history import chatgpt, transcript
from llm_edge.chat.history.chatgpt import Imported
from llm_edge.chat.history.conversation import Conversation
from llm_edge.chat.history.store import Store
from llm_edge.runtime.errors import InputError

_NUMBERS = (
    "tokens",
    "reasoning_tokens",
    "prompt_tokens",
    "cached_tokens",
    "tokens_per_second",
    "time_to_first_token",
)
_TEXTS = ("precision", "finish_reason", "error")
_MOST_CHANGES = 1000
_LARGEST = 2**53


def import_file(name: str, store: Store, tell: Callable[[int], bool] | None = None) -> Imported:
    """Take in all conversations of a file.

    Those of ChatGPT that are here already only grow. One of our own is always taken for new, so that an export brings
    back what was deleted.

    Args:
        name: of the file; a leading `~` is the user's home.
        store: where they go.
        tell: called with the number of conversations seen so far; False ends the import.

    Raises:
        InputError: the file is not there, damaged, too large, or something else; or `tell` ended it.
    """
    try:
        path = Path(name).expanduser()
        ours = path.is_file() and _begins_an_object(path)
    except (OSError, ValueError, RuntimeError) as e:  # the last two: what no path can be
        why = e.strerror if isinstance(e, OSError) else e
        raise InputError(f"{name} cannot be read ({why}): name another file") from e
    if ours:
        conversation = transcript.read(path)
        for message in conversation.messages.values():
            message.figures = _figures(message.figures)
        return Imported(int(store.import_conversation(conversation)), 0)
    return chatgpt.import_archive(path, _Told(store, tell))


class _Told:
    """A store that says how far an import is; see `Shelf`."""

    def __init__(self, store: Store, tell: Callable[[int], bool] | None) -> None:
        self._store, self._tell, self._count = store, tell, 0

    def import_conversation(self, conversation: Conversation, foreign_id: str, foreign_ids: dict[int, str]) -> bool:
        self._count += 1
        if self._tell is not None and not self._tell(self._count):
            raise InputError(f"the import was ended after {self._count - 1} conversations: what came before stays")
        return self._store.import_conversation(conversation, foreign_id, foreign_ids)


def _begins_an_object(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"


def _figures(figures: Mapping[str, Any]) -> dict[str, Any]:
    """Those that the screen knows, as far as they are what it takes them for."""
    kept: dict[str, Any] = {name: figures[name] for name in _NUMBERS if _is_number(figures.get(name))}
    kept |= {name: figures[name] for name in _TEXTS if isinstance(figures.get(name), str)}
    changes = figures.get("changes")
    if isinstance(changes, list):
        known = [
            {"at": each["at"], "name": each["name"], "value": str(each.get("value", ""))}
            for each in changes[:_MOST_CHANGES]
            if isinstance(each, dict)
            and (each.get("at", -1) is None or _is_number(each.get("at")))
            and isinstance(each.get("name"), str)
        ]
        kept |= {"changes": known} if known else {}
    return kept


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= _LARGEST
