"""`import_file`: imports conversations from a ChatGPT export, or from our own JSON or zip."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from llm_edge.chat.history import archive, chatgpt, transcript
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
_MAX_CHANGES = 1000
_MAX_NUMBER = 2**53


def import_file(name: str, store: Store, progress: Callable[[int], bool] | None = None) -> Imported:
    """Import all conversations of a file.

    Known conversations of ChatGPT only get new messages. Our own are always imported as new ones, so that an export
    restores what was deleted.

    Args:
        name: the file; a leading `~` is the user's home folder.
        store: receives the conversations.
        progress: called with the number of conversations so far; returns False to end the import.

    Raises:
        InputError: the file is missing, damaged, too large or of another kind, or `progress` returned False.
    """
    try:
        path = Path(name).expanduser()
        ours = path.is_file() and _is_object(path)
    except (OSError, ValueError, RuntimeError) as e:  # the last two: names that no file can have
        why = e.strerror if isinstance(e, OSError) else e
        raise InputError(f"{name} cannot be read ({why}): choose another file") from e
    target = _WithProgress(store, progress)
    if ours:
        return Imported(int(_import_own(transcript.read(path), target)), 0)
    if archive.is_archive(path):
        return Imported(sum(_import_own(each, target) for each in archive.read_archive(path)), 0)
    return chatgpt.import_archive(path, target)


def _import_own(conversation: Conversation, target: chatgpt.ImportTarget) -> bool:
    for message in conversation.messages.values():
        message.figures = _figures(message.figures)
    return target.import_conversation(conversation, "", {})


class _WithProgress:
    """An `ImportTarget` that reports progress."""

    def __init__(self, store: Store, progress: Callable[[int], bool] | None) -> None:
        self._store, self._progress, self._count = store, progress, 0

    def import_conversation(self, conversation: Conversation, foreign_id: str, foreign_ids: dict[int, str]) -> bool:
        self._count += 1
        if self._progress is not None and not self._progress(self._count):
            raise InputError(f"the import was cancelled; {self._count - 1} conversations were imported")
        return self._store.import_conversation(conversation, foreign_id, foreign_ids)


def _is_object(path: Path) -> bool:
    with path.open("rb") as file:
        return file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"{"


def _figures(figures: Mapping[str, Any]) -> dict[str, Any]:
    """The known figures with values of the expected types."""
    kept: dict[str, Any] = {name: figures[name] for name in _NUMBERS if _is_number(figures.get(name))}
    kept |= {name: figures[name] for name in _TEXTS if isinstance(figures.get(name), str)}
    changes = figures.get("changes")
    if isinstance(changes, list):
        known = [
            {"at": each["at"], "name": each["name"], "value": str(each.get("value", ""))}
            for each in changes[:_MAX_CHANGES]
            if isinstance(each, dict)
            and (each.get("at", -1) is None or _is_number(each.get("at")))
            and isinstance(each.get("name"), str)
        ]
        kept |= {"changes": known} if known else {}
    return kept


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value <= _MAX_NUMBER
