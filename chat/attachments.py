"""Files attached to a question: reading them, and their place in the question's text.

An attached file becomes part of the question, before it, in a code fence, so that every model can read it and every
conversation contains what its answers were based on.
"""

from __future__ import annotations

import os
import re
import shlex
import stat
import urllib.parse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from llm_edge.chat.text import one_line, printable
from llm_edge.runtime.errors import InputError
from llm_edge.runtime.safe_io import MIB

MAX_SIZE = 2 * MIB  # bytes; more than contexts hold, and within the limits for chat templates
STANDARD_INPUT = "Standard input"
_FILE = "File: "
_BLOCK = re.compile(rf"(?:{_FILE}([^\n]+)|{STANDARD_INPUT}:)\n\n(`{{3,}})\n(.*?)\n\2\n\n", re.DOTALL)
_MENTION = re.compile(r"(?<!\S)@(?:\"([^\"\n]+)\"|'([^'\n]+)'|([^\s\"'@]\S*))")
_MAX_MENTIONS = 50


@dataclass(frozen=True, slots=True)
class Attachment:
    """A text that precedes a question."""

    name: str  # of the file; "" = standard input
    text: str

    @property
    def label(self) -> str:
        """The name and the size."""
        return f"{self.name or STANDARD_INPUT} · {len(self.text):,} characters"


def read_attachment(path: str) -> Attachment:
    """Read a text file.

    Raises:
        InputError: it does not exist, is no regular file, too large, or not UTF-8 text.
    """
    shown = one_line(printable(path))
    try:
        place = _expanded(path)
        descriptor = os.open(place, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
        with os.fdopen(descriptor, "rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            if not stat.S_ISREG(mode):  # a pipe or a device might never end
                raise InputError(f"{shown}: not a regular file: attach a text file")
            data = file.read(MAX_SIZE + 1)
    except (OSError, ValueError) as error:
        if os.path.isdir(_expanded(path)):  # noqa: PTH112 (does not raise)
            raise InputError(f"{shown}: a folder: attach the files in it one by one") from error
        reason = getattr(error, "strerror", None) or "invalid path"
        raise InputError(f"{shown}: cannot be read ({reason}): check the path") from error
    return Attachment(one_line(printable(place.name), 80) or "?", text_of(data, shown))


def text_of(data: bytes, source: str) -> str:
    """The text that bytes encode, without a byte order mark and with line feeds only.

    Raises:
        InputError: the data is too long, binary, or not UTF-8.
    """
    if len(data) > MAX_SIZE:
        raise InputError(
            f"{source} is longer than {MAX_SIZE // MIB} MiB: shorten it, for example to its end (tail -c 20000)"
        )
    if (place := data.find(b"\0")) >= 0:
        raise InputError(f"{source} is binary (byte {place} is zero): use UTF-8 text")
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        raise InputError(f"{source} is not UTF-8 text (byte {error.start}): convert it first") from error


def with_attachments(question: str, attachments: Iterable[Attachment]) -> str:
    """The question after its attachments, each of them in a code fence."""
    return "".join(map(_block, attachments)) + question


def split_attachments(text: str) -> tuple[list[Attachment], str]:
    """The attachments that `with_attachments` put before a question, and the question."""
    found, end = [], 0
    while block := _BLOCK.match(text, end):
        found.append(Attachment(block[1] or "", block[3]))
        end = block.end()
    return found, text[end:]


def attach_mentioned(text: str) -> tuple[str, list[Attachment], list[str]]:
    """Attach the files that a typed text mentions as `@path`, or `@"a path"`.

    Returns:
        The text, with the file's name for each mention; the files; and mentions that look like paths of missing files.

    Raises:
        InputError: a mentioned file cannot be used.
    """
    attachments: list[Attachment] = []
    missing: list[str] = []

    def attach(mention: re.Match[str]) -> str:
        path, rest = _existing(mention)
        if path is None:
            name = mention[1] or mention[2] or mention[3]
            if re.fullmatch(r"[\w./~-]*(/[\w./-]*|\.\w{1,5})", name):
                missing.append(name)
            return mention[0]
        attachment = read_attachment(path)
        if attachment not in attachments:
            attachments.append(attachment)
        return attachment.name + rest

    return _MENTION.sub(attach, text, count=_MAX_MENTIONS), attachments, missing


def mentions_file(text: str) -> bool:
    """Whether a text mentions an existing file, so that `attach_mentioned` would attach it."""
    return any(_existing(mention)[0] is not None for mention in _MENTION.finditer(text))


def dropped_files(text: str) -> Sequence[str]:
    """The paths of files that were dropped on the terminal, which pastes them quoted or escaped; empty for others."""
    text = text.strip()
    if not text or len(text) > 8_000 or "\n" in text or not text.startswith(("/", "~", "'", '"', "file://")):
        return ()
    try:
        words = [text] if _is_file(text) else shlex.split(text)
    except ValueError:
        return ()
    paths = [urllib.parse.unquote(word[7:]) if word.startswith("file://") else word for word in words]
    return paths if all(path.startswith(("/", "~")) and _is_file(path) for path in paths) else ()


def mention_of(path: str) -> str:
    """How a path is mentioned in a question."""
    return f"@{path}" if re.fullmatch(r"[^\s\"'@]+", path) else f'@"{path}"'


def _existing(mention: re.Match[str]) -> tuple[str | None, str]:
    """The path of the mentioned file, and punctuation that follows it; None if there is no such file."""
    if path := mention[1] or mention[2]:
        return (path if _is_file(path) else None), ""
    path = mention[3]
    while path:
        if _is_file(path):
            return path, mention[3][len(path) :]
        if path[-1] not in ".,;:!?)]}>":
            return None, ""
        path = path[:-1]
    return None, ""


def _block(attachment: Attachment) -> str:
    text = attachment.text.rstrip()
    longest = max((len(run) for run in re.findall("`{3,}", text)), default=2)
    fence = "`" * (longest + 1)
    heading = f"{_FILE}{attachment.name}" if attachment.name else f"{STANDARD_INPUT}:"
    return f"{heading}\n\n{fence}\n{text}\n{fence}\n\n"


def _expanded(path: str) -> Path:
    return Path(os.path.expanduser(path))  # noqa: PTH111 (Path.expanduser raises for unknown users)


def _is_file(path: str) -> bool:
    try:
        return _expanded(path).is_file()
    except (OSError, ValueError):
        return False
