"""Conversations as files: Markdown to read, and JSON that can be imported."""

from __future__ import annotations

import json
import math
import os
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

from llm_edge.chat.history.conversation import ASSISTANT, Conversation, Message, depth
from llm_edge.chat.text import one_line, without_surrogates
from llm_edge.runtime.errors import InputError
from llm_edge.runtime.safe_io import MIB, read_text, write_atomically

FORMAT = "llm-edge conversation"
VERSION = 1
MAX_FILE = 256 * MIB
_MAX_DEPTH = 20  # of the parameters and figures of a message
_MAX_TIME = 1e11  # Unix seconds
_MAX_ID = 2**53  # exact in every JSON reader


def markdown(conversation: Conversation) -> str:
    """The shown path as Markdown, with reasoning as quotes, and model and figures below each answer."""
    parts = [f"# {conversation.title}"] if conversation.title else []
    if conversation.system:
        parts += ["**system**", _closed(conversation.system)]
    for message in conversation.path():
        parts.append(f"**{message.role}**")
        if message.reasoning:
            lines = f"*Reasoning*\n\n{_closed(message.reasoning.strip())}".splitlines()
            parts.append("\n".join(f"> {line}".rstrip() for line in lines))
        if message.content:
            parts.append(_closed(message.content))
        if facts := _facts(message):
            parts.append(f"*({', '.join(facts)})*")
    return "\n\n".join(parts) + "\n"


def to_json(conversation: Conversation) -> str:
    """The whole tree as a JSON document, which `from_json` reads.

    Raises:
        InputError: parameters or figures of a message are not JSON values.
    """
    document = {
        "format": FORMAT,
        "version": VERSION,
        "title": conversation.title,
        "pinned": conversation.pinned,
        "created": conversation.created,
        "updated": conversation.updated,
        "system": conversation.system,
        "leaf": conversation.leaf,
        "messages": [
            {field.name: getattr(message, field.name) for field in fields(message)}
            for message in conversation.messages.values()
        ],
    }
    try:
        return json.dumps(_plain(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as e:
        raise InputError(f"this conversation cannot be saved as JSON: {e}") from e


def from_json(text: str) -> Conversation:
    """Read a document of `to_json`. Messages keep their ids; the conversation has none until it is stored.

    Raises:
        InputError: the document is invalid; the message names the field.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InputError(f"not a saved conversation: invalid JSON ({e})") from e
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise InputError(f'not a saved conversation: "format" is not "{FORMAT}"')
    if document.get("version") != VERSION:
        raise InputError(f'a saved conversation of another version: "version" is not {VERSION}; save it again there')
    messages = _field(document, "messages", list)
    conversation = Conversation(
        title=one_line(_text(document, "title")),
        pinned=_field(document, "pinned", bool),
        created=_time(document, "created"),
        updated=_time(document, "updated"),
        system=_text(document, "system"),
    )
    for place, entry in enumerate(messages):
        if not isinstance(entry, dict):
            raise InputError(f'messages[{place}]: not an object: save the conversation again as ".json"')
        try:
            conversation.attach(_message(entry))
        except (ValueError, InputError) as e:
            raise InputError(f"messages[{place}]: {e}") from e
    leaf = _number(document, "leaf", optional=True)
    if leaf is not None and leaf not in conversation.messages:
        raise InputError(f'"leaf" is {leaf}, but there is no such message')
    conversation.leaf = leaf
    return conversation


def read(path: Path) -> Conversation:
    """Read a conversation from a JSON file of `save`.

    Raises:
        InputError: the file is missing, too large or invalid; the message names it.
    """
    text = read_text(path, MAX_FILE, error=InputError)
    try:
        return from_json(text.removeprefix("\ufeff"))
    except InputError as e:
        raise InputError(f"{path}: {e}") from e


def save(name: str, conversation: Conversation, *, overwrite: bool = False) -> None:
    """Write a conversation to a file: JSON if the name ends in .json, else Markdown.

    Raises:
        InputError: the conversation is empty, or the file exists and is not to be overwritten, or cannot be written.
    """
    if not conversation.messages:
        raise InputError("nothing to save yet: ask a question first")
    as_json = name.lower().endswith(".json")
    write_file(name, to_json(conversation) if as_json else markdown(conversation), overwrite=overwrite)


def write_file(name: str, text: str, *, overwrite: bool = False) -> None:
    """Write a file completely or not at all; a leading `~` is the user's home folder.

    Raises:
        InputError: the file exists and is not to be overwritten, or cannot be written.
    """
    try:
        path = Path(name).expanduser()
        if overwrite:
            path = path.resolve()  # so that a link stays one
            if path.is_dir():
                raise InputError(f"{name} is a folder: choose another name")
        elif os.path.lexists(path):
            raise FileExistsError
        write_atomically(path, without_surrogates(text).encode(), overwrite=overwrite)
    except FileExistsError as e:
        raise InputError(f"{name} exists already: choose another name") from e
    except (OSError, ValueError, RuntimeError) as e:  # the last two: names that no file can have
        why = e.strerror if isinstance(e, OSError) else e
        raise InputError(f"{name} cannot be written ({why}): choose another name") from e


def _facts(message: Message) -> list[str]:
    """The model, parameters and figures of an answer, each in a few words."""
    if message.role != ASSISTANT:
        return []
    facts = [message.model] if message.model else []
    facts += [f"{name} {value}" for name, value in message.params.items()]
    figures = message.figures
    if isinstance(figures.get("tokens"), int):
        facts.append(f"{figures['tokens']} tokens")
    if isinstance(figures.get("tokens_per_second"), (int, float)):
        facts.append(f"{figures['tokens_per_second']:.0f} tok/s")
    if isinstance(figures.get("finish_reason"), str):
        facts.append(figures["finish_reason"])
    if not message.finished:
        facts.append("unfinished")
    return [one_line(fact.replace("*", r"\*").replace("_", r"\_")) for fact in facts]


def _closed(text: str) -> str:
    """The text with its last code block closed, so that what follows is not part of it."""
    fence = ""
    for line in text.splitlines():
        mark = re.match(r" {0,3}(`{3,}|~{3,})(.*)", line)
        if mark is None:
            continue
        if not fence:
            fence = mark[1]
        elif mark[1][0] == fence[0] and len(mark[1]) >= len(fence) and not mark[2].strip():
            fence = ""
    return f"{text}\n{fence}" if fence else text


def _plain(value: Any) -> Any:
    """A JSON value with null in place of infinities and NaN."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value


def _message(entry: dict[str, Any]) -> Message:
    number = _number(entry, "id")
    if number is None:
        raise InputError('"id" is missing')
    params, figures = _field(entry, "params", dict), _field(entry, "figures", dict)
    for name, value in (("params", params), ("figures", figures)):
        if depth(value) > _MAX_DEPTH:
            raise InputError(f'"{name}" is nested deeper than {_MAX_DEPTH} levels')
    return Message(
        id=number,
        parent=_number(entry, "parent", optional=True),
        role=_text(entry, "role"),
        content=_text(entry, "content"),
        reasoning=_text(entry, "reasoning"),
        created=_time(entry, "created"),
        model=_text(entry, "model"),
        params=params,
        figures=figures,
        finished=_field(entry, "finished", bool),
    )


def _field(entry: dict[str, Any], name: str, kind: type) -> Any:
    value = entry.get(name)
    if not isinstance(value, kind):
        raise InputError(f'"{name}" is {"missing" if value is None else "of the wrong type"}')
    return value


def _text(entry: dict[str, Any], name: str) -> str:
    return without_surrogates(_field(entry, name, str))


def _number(entry: dict[str, Any], name: str, *, optional: bool = False) -> int | None:
    value = entry.get(name)
    if value is None and optional:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _MAX_ID:
        raise InputError(f'"{name}" is not an integer of 1 or more')
    return value


def _time(entry: dict[str, Any], name: str) -> float:
    value = entry.get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < _MAX_TIME:
        raise InputError(f'"{name}" is not a Unix time in seconds')
    return float(value)
