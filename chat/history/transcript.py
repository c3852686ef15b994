"""Conversations as files: Markdown for people, JSON that can be read back. Knows nothing of databases or screens."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

from llm_edge.chat.files import write_file
from llm_edge.chat.history.conversation import ASSISTANT, Conversation, Message, depth
from llm_edge.chat.text import one_line, without_surrogates
from llm_edge.runtime.errors import InputError
from llm_edge.runtime.safe_io import MIB, read_text

FORMAT = "llm-edge conversation"
VERSION = 1
LARGEST_FILE = 256 * MIB
_DEEPEST = 20  # levels of nesting in the parameters and figures of a message
_LATEST = 1e11  # unix seconds; what is later is no time
_LARGEST_ID = 2**53  # what every reader of JSON can hold


def markdown(conversation: Conversation) -> str:
    """The path that is shown, as Markdown: reasoning as a quote, and under each answer what it was made with."""
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
        InputError: the parameters or figures of a message are no JSON values.
    """
    messages = [
        {
            "id": message.id,
            "parent": message.parent,
            "role": message.role,
            "content": message.content,
            "reasoning": message.reasoning,
            "created": message.created,
            "model": message.model,
            "params": message.params,
            "figures": message.figures,
            "finished": message.finished,
        }
        for message in conversation.messages.values()
    ]
    document = {
        "format": FORMAT,
        "version": VERSION,
        "title": conversation.title,
        "pinned": conversation.pinned,
        "created": conversation.created,
        "updated": conversation.updated,
        "system": conversation.system,
        "leaf": conversation.leaf,
        "messages": messages,
    }
    try:
        return json.dumps(_plain(document), indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    except (TypeError, ValueError, RecursionError) as e:
        raise InputError(f"this conversation cannot be told as JSON: {e}") from e


def from_json(text: str) -> Conversation:
    """Read what `to_json` wrote. Its messages keep their ids; the conversation itself has none until it is stored.

    Raises:
        InputError: this is something else; the message names the field.
    """
    try:
        document = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise InputError(f"not a saved conversation: no JSON that can be used ({e})") from e
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
        except ValueError as e:
            raise InputError(f"messages[{place}]: {e}") from e
        except InputError as e:
            raise InputError(f"messages[{place}]: {e}") from e
    leaf = _number(document, "leaf", optional=True)
    if leaf is not None and leaf not in conversation.messages:
        raise InputError(f'"leaf" names message {leaf}, which is not there')
    conversation.leaf = leaf
    return conversation


def read(path: Path) -> Conversation:
    """Read a conversation from a JSON file of `save`.

    Raises:
        InputError: the file is not there, too large, or something else; the message names it.
    """
    text = read_text(path, LARGEST_FILE, error=InputError)
    try:
        return from_json(text.removeprefix("\ufeff"))
    except InputError as e:
        raise InputError(f"{path}: {e}") from e


def save(name: str, conversation: Conversation, *, overwrite: bool = False) -> None:
    """Write a conversation to a file: JSON if the name ends in .json, else Markdown.

    Raises:
        InputError: there is nothing to write, the file is there already and `overwrite` was not said, or it cannot
            be written.
    """
    if not conversation.messages:
        raise InputError("there is nothing to save yet: ask something first")
    as_json = name.lower().endswith(".json")
    write_file(name, to_json(conversation) if as_json else markdown(conversation), overwrite=overwrite)


def _facts(message: Message) -> list[str]:
    """What an answer was made with and how it went, in a few words each."""
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
    """The text with a code block that was left open closed, so that it does not take in what follows."""
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
    """A JSON value with null in place of numbers that JSON does not know."""
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
        if depth(value) > _DEEPEST:
            raise InputError(f'"{name}" is nested deeper than {_DEEPEST} levels')
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
        raise InputError(f'"{name}" is {"missing" if value is None else "of the wrong kind"}')
    return value


def _text(entry: dict[str, Any], name: str) -> str:
    return without_surrogates(_field(entry, name, str))


def _number(entry: dict[str, Any], name: str, *, optional: bool = False) -> int | None:
    value = entry.get(name)
    if value is None and optional:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= _LARGEST_ID:
        raise InputError(f'"{name}" is not a whole number from 1 on')
    return value


def _time(entry: dict[str, Any], name: str) -> float:
    value = entry.get(name)
    if not isinstance(value, (int, float)) or isinstance(value, bool) or not 0 <= value < _LATEST:
        raise InputError(f'"{name}" is not a time in unix seconds')
    return float(value)
