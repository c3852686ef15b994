"""`import_archive`: imports the archive that ChatGPT exports.

The archive is a zip with conversations.json, or conversations-000.json and so on: an array of conversations, each a
tree of nodes in `mapping`, linked by `parent`; `current_node` is the last one that was shown. An answer often consists
of several nodes: thoughts, tool calls and their results, and text. They become one message; tool calls and results are
left out. The format is not specified; this follows actual archives.

Archives are not trusted: they are read one conversation at a time, within limits.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple, Protocol

from llm_edge.chat.history.conversation import ASSISTANT, USER, Conversation, Message, title_of
from llm_edge.chat.text import one_line, without_surrogates
from llm_edge.runtime.errors import InputError
from llm_edge.runtime.safe_io import MIB

MAX_CONVERSATION = 32 * MIB  # of JSON
MAX_ARCHIVE = 2048 * MIB  # of JSON
MAX_TEXT = 4 * MAX_CONVERSATION  # characters of all messages of a conversation, branches included
_CHUNK = 1 * MIB
_MAX_TIME = 1e11  # Unix seconds
_NAME = re.compile(r"(?:.*/)?conversations(-\d+)?\.json")
_SPACE = re.compile(r"[ \t\r\n]*")
_CITATION = re.compile("\ue200[^\ue200\ue201]*\ue201")  # citation marks, which only ChatGPT's website shows as links


@dataclass(frozen=True, slots=True)
class Imported:
    """Result of an import: numbers of new or extended conversations, and of unreadable ones."""

    conversations: int
    unreadable: int


class ImportTarget(Protocol):
    """What an import needs: `Store` provides it."""

    def import_conversation(self, conversation: Conversation, foreign_id: str, foreign_ids: dict[int, str]) -> bool:
        """Store a conversation or its new messages; returns whether anything was stored."""


def import_archive(path: Path, target: ImportTarget) -> Imported:
    """Import all conversations of ChatGPT's zip, or of its conversations.json; known ones are not duplicated.

    Raises:
        InputError: the file is missing, damaged, too large or of another kind. Conversations before the damage stay
            imported; the message reports their number.
    """
    new = unreadable = 0
    try:
        for entry in _conversations(path):
            try:
                conversation, name, names = _conversation(entry)
            except (TypeError, ValueError):
                unreadable += 1
            else:
                new += target.import_conversation(conversation, name, names)
    except _DamageError as e:
        so_far = f" ({new} conversations before that were imported)" if new else ""
        raise InputError(f"{path}: {e}{so_far}") from e
    return Imported(new, unreadable)


class _DamageError(Exception):
    """The archive is damaged, for this reason."""


class _NodeText(NamedTuple):
    """The text of one node."""

    kind: str  # USER, ASSISTANT, or "reasoning"
    text: str
    model: str
    created: float


class _Run(NamedTuple):
    """The nodes of one answer, linked from the last to the first."""

    before: _Run | None
    node: str
    said: _NodeText


def _conversations(path: Path) -> Iterator[Any]:
    remedy = "choose the zip from ChatGPT, or the conversations.json in it"
    if path.is_dir():
        raise _DamageError(f"a folder: {remedy}")
    if path.exists() and not path.is_file():
        raise _DamageError(f"not a regular file: {remedy}")
    try:
        with path.open("rb") as file:
            if file.read(4)[:2] != b"PK":
                file.seek(0)
                yield from _array(file, remedy, MAX_ARCHIVE)
                return
            with zipfile.ZipFile(file) as archive:
                names = sorted(name for name in set(archive.namelist()) if _NAME.fullmatch(name))
                if not names:
                    raise _DamageError(f"a zip without conversations.json: {remedy}")
                left = MAX_ARCHIVE
                for name in names:
                    # With other compressions, zipfile decompresses whole blocks of any size.
                    if archive.getinfo(name).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                        raise _DamageError(f"{name} uses an unsupported compression: compress it with deflate")
                    with archive.open(name) as part:
                        yield from _array(part, remedy, left)
                        left -= part.tell()
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as e:
        raise _DamageError(f"an unreadable zip ({e}): export it again") from e
    except (OSError, ValueError) as e:  # ValueError: a NUL in the name
        raise _DamageError(f"cannot be read ({getattr(e, 'strerror', None) or e}): {remedy}") from e


def _array(file: IO[bytes], remedy: str, limit: int) -> Iterator[Any]:
    """The elements of a JSON array, one in memory at a time."""
    text = _Text(file, limit)
    if text.next() != "[":
        raise _DamageError(f"not an export of ChatGPT: expected an array of conversations; {remedy}")
    text.skip()
    if text.next() == "]":
        return
    while True:
        if text.next() != "{":
            raise _DamageError(f"not an export of ChatGPT: expected an array of objects; {remedy}")
        yield text.value()
        mark = text.next()
        text.skip()
        if mark == "]":
            return
        if mark != ",":
            raise _DamageError("damaged JSON after a conversation: export it again")


class _Text:
    """JSON text that is read from a file as needed."""

    def __init__(self, file: IO[bytes], limit: int) -> None:
        self._file = file
        self._left = limit
        self._decode = codecs.getincrementaldecoder("utf-8-sig")()
        self._text = ""
        self._at = 0
        self._ended = False

    def next(self) -> str:
        """The next character that is not white space; "" at the end."""
        while True:
            space = _SPACE.match(self._text, self._at)
            self._at = space.end() if space else self._at
            if self._at < len(self._text) or self._ended:
                return self._text[self._at : self._at + 1]
            self._more(_CHUNK)

    def skip(self) -> None:
        """Advance by one character."""
        self._at += 1

    def value(self) -> Any:
        """Read the object that starts here."""
        while True:
            try:
                value, self._at = json.JSONDecoder().raw_decode(self._text, self._at)
            except json.JSONDecodeError as e:
                if self._ended:
                    raise _DamageError(f"damaged or truncated JSON ({e.msg}): export it again") from e
                held = len(self._text) - self._at
                if held >= MAX_CONVERSATION:
                    largest = MAX_CONVERSATION // MIB
                    raise _DamageError(f"damaged JSON, or a conversation of more than {largest} MB") from e
                self._more(max(_CHUNK, min(held, MAX_CONVERSATION - held)))  # doubled, because decoding starts over
            except (ValueError, RecursionError) as e:  # a number of thousands of digits, or nested too deeply
                raise _DamageError(f"unusable JSON ({e})") from e
            else:
                return value

    def _more(self, size: int) -> None:
        data = self._file.read(min(size, self._left))
        self._left -= len(data)
        if not data and not self._left:
            raise _DamageError(f"more than the {MAX_ARCHIVE // MIB:,} MB of conversations that are supported")
        try:
            self._text, self._at = self._text[self._at :] + self._decode.decode(data, final=not data), 0
        except UnicodeDecodeError as e:
            raise _DamageError("not UTF-8 text: export it again") from e
        self._ended = not data


def _conversation(entry: dict[str, Any]) -> tuple[Conversation, str, dict[int, str]]:
    """A conversation, its id at ChatGPT, and those of its messages.

    Raises:
        TypeError, ValueError: unexpected structure, cyclic nodes, or branches that repeat too much text.
    """
    mapping = entry.get("mapping")
    if not isinstance(mapping, dict):
        raise TypeError("no mapping")
    created = _time(entry.get("create_time"), 0.0)
    conversation = Conversation(created=created, updated=_time(entry.get("update_time"), created))
    said = {node: _said(value, created) for node, value in mapping.items()}
    names, shown = _grow(conversation, mapping, said)
    title = entry.get("title")
    question = next((message.content for message in conversation.messages.values() if message.role == USER), "")
    conversation.title = one_line(without_surrogates(_str(title))) or title_of(question)
    current = shown.get(_str(entry.get("current_node")), max(conversation.messages, default=None))
    if current is not None:
        conversation.select(current)
    identity = entry.get("conversation_id") or entry.get("id")
    if not isinstance(identity, str):
        content = json.dumps([_str(title), created, sorted(mapping)])
        identity = hashlib.sha256(content.encode()).hexdigest()
    return conversation, f"chatgpt:{without_surrogates(identity)}", names


def _grow(
    conversation: Conversation, mapping: dict[str, Any], said: dict[str, _NodeText | None]
) -> tuple[dict[int, str], dict[str, int]]:
    """Add messages to a conversation; returns the node of each, and the message at or above each node."""
    children, roots = _links(mapping)
    names: dict[int, str] = {}
    made: dict[str, int] = {}  # message id by its last node
    shown: dict[str, int] = {}
    length = 0

    def emit(parent: int | None, run: _Run) -> int:
        nonlocal length
        if run.node not in made:
            message = _message(len(made) + 1, parent, run)
            length += len(message.content) + len(message.reasoning)
            if length > MAX_TEXT:
                raise ValueError("its branches have too much text in total")
            conversation.attach(message)
            made[run.node] = message.id
            names[message.id] = without_surrogates(run.node)
        return made[run.node]

    waiting: list[tuple[str, int | None, _Run | None]] = [(root, None, None) for root in reversed(roots)]
    reached = 0
    while waiting:
        node, parent, run = waiting.pop()
        reached += 1
        here = said[node]
        if here is not None and here.kind == USER:
            parent, run = emit(parent, _Run(None, node, here)), None
        elif here is not None:
            run = _Run(run, node, here)
        following = children.get(node, [])
        answer = parent
        if run is not None and (not following or any(_asks(said[child]) for child in following)):
            answer = emit(parent, run)
        if answer is not None:
            shown[node] = answer
        waiting += [
            (child, answer, None) if _asks(said[child]) else (child, parent, run) for child in reversed(following)
        ]
    if reached < len(mapping):
        raise ValueError("cyclic nodes")
    return names, shown


def _links(mapping: dict[str, Any]) -> tuple[dict[str, list[str]], list[str]]:
    """The children of each node, and the roots. `parent` defines the links, `children` only the order."""
    children: dict[str, list[str]] = {}
    roots = []
    for node, value in mapping.items():
        parent = value.get("parent") if isinstance(value, dict) else None
        if isinstance(parent, str) and parent in mapping:
            children.setdefault(parent, []).append(node)
        else:
            roots.append(node)
    for parent, nodes in children.items():
        listed = mapping[parent].get("children") if isinstance(mapping[parent], dict) else None
        if isinstance(listed, list):
            order = {child: place for place, child in enumerate(listed) if isinstance(child, str)}
            nodes.sort(key=lambda node: order.get(node, len(order)))
    return children, roots


def _asks(said: _NodeText | None) -> bool:
    return said is not None and said.kind == USER


def _message(number: int, parent: int | None, run: _Run) -> Message:
    """The message of a run of nodes."""
    nodes: list[_NodeText] = []
    step: _Run | None = run
    while step is not None:
        nodes.append(step.said)
        step = step.before
    nodes.reverse()
    return Message(
        id=number,
        parent=parent,
        role=USER if run.said.kind == USER else ASSISTANT,
        content="\n\n".join(said.text for said in nodes if said.kind != "reasoning"),
        reasoning="\n\n".join(said.text for said in nodes if said.kind == "reasoning"),
        created=nodes[0].created,
        model=next((said.model for said in reversed(nodes) if said.model), ""),
    )


def _said(node: object, fallback: float) -> _NodeText | None:
    """The text of a node; None = it is not part of the conversation."""
    message = _dict(_dict(node).get("message"))
    metadata, content = _dict(message.get("metadata")), _dict(message.get("content"))
    role = _dict(message.get("author")).get("role")
    if role not in (USER, ASSISTANT) or metadata.get("is_visually_hidden_from_conversation") is True:
        return None
    kind = content.get("content_type")
    if kind == "thoughts" and role == ASSISTANT:
        role, text = "reasoning", _thoughts(content.get("thoughts"))
    elif role == ASSISTANT and message.get("recipient") not in (None, "all"):  # a tool call
        return None
    elif kind == "code":
        language = re.sub(r"\W", "", _str(content.get("language"))).replace("unknown", "")
        text = f"```{language}\n{_str(content.get('text'))}\n```" if _str(content.get("text")) else ""
    elif kind in ("text", "multimodal_text"):
        parts = content.get("parts")
        text = "\n\n".join(filter(None, map(_part, parts))) if isinstance(parts, list) else ""
    else:
        return None
    text = _CITATION.sub("", without_surrogates(text)).strip()
    model = without_surrogates(_str(metadata.get("model_slug"))) if role != USER else ""
    return _NodeText(role, text, model, _time(message.get("create_time"), fallback)) if text else None


def _part(part: object) -> str:
    if isinstance(part, str):
        return part
    inner = _dict(part)
    if isinstance(inner.get("text"), str):  # a transcription
        return str(inner["text"])
    kind = _str(inner.get("content_type"))
    return next((f"[{name}]" for name in ("audio", "video") if name in kind), "[image]") if inner else ""


def _thoughts(thoughts: object) -> str:
    texts = []
    for thought in map(_dict, thoughts if isinstance(thoughts, list) else []):
        summary, content = _str(thought.get("summary")), _str(thought.get("content"))
        texts += [f"**{summary}**"] if summary else []
        texts += [content] if content else []
    return "\n\n".join(texts)


def _dict(value: object) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _str(value: object) -> str:
    return value if isinstance(value, str) else ""


def _time(value: object, fallback: float) -> float:
    """A Unix time in seconds, or the fallback."""
    fits = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < _MAX_TIME
    return float(value) if fits else fallback  # type: ignore[arg-type]
