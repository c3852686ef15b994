"""Standard input as context of a question: whether it is one, read within bounds, and told apart from the question.

Knows no models. Nobody says whether somebody means to write into an open pipe, so this is the rule:

* A terminal, the null device and a program without standard input give none, and nothing is waited for.
* A file, and a pipe or socket into which something comes, is read to its end, however long that takes.
* A pipe or socket that stays open and silent (as under ssh, or where a program inherits its parent's) is waited for
  until PATIENCE seconds after the start; then the answer goes on without it, and a line says so.
"""

from __future__ import annotations

import os
import re
import stat
import threading
import time
from collections.abc import Callable
from typing import TextIO

from llm_edge.runtime.errors import InputError
from llm_edge.runtime.safe_io import MIB

LARGEST = 2 * MIB  # beyond any context that a computer of one person fills, and within what a chat template may handle
PATIENCE = 3.0  # seconds
_CHUNK = 64 * 1024
_LOOK = 0.2  # seconds between two looks, so that Ctrl-C is heard on every system


class StandardInput:
    """Reads on a thread from now on, so that a model can load meanwhile.

    Args:
        stream: standard input.
        wanted: True = wait for it however long, also for what is typed; False = leave it alone; None = by the rule.
    """

    def __init__(self, stream: TextIO, wanted: bool | None = None) -> None:
        self._wanted = wanted
        self._data = bytearray()
        self._why: str | None = None
        self._begun = threading.Event()
        self._ended = threading.Event()
        self._since = time.monotonic()
        descriptor = _descriptor(stream)
        self._reads = descriptor is not None and wanted is not False and (wanted is True or _may_tell(descriptor))
        if descriptor is not None and self._reads:
            threading.Thread(target=self._read, args=(descriptor,), name="llm-chat-stdin", daemon=True).start()

    def text(self, note: Callable[[str], None]) -> str | None:
        """What came, to its end; None where there is nothing.

        Args:
            note: hears that it takes long, or that nothing came.

        Raises:
            InputError: it is no text, longer than LARGEST bytes, or cannot be read.
        """
        if not self._reads:
            return None
        if not self._wait(self._begun) and not self._wanted:
            note(
                f"(nothing came from standard input within {PATIENCE:.0f} s: answering without it;"
                " --stdin waits for it, --no-stdin does not look at it)"
            )
            return None
        if not self._wait(self._ended):
            note("(reading standard input until it ends …)")
            while not self._ended.wait(_LOOK):
                pass
        if self._why is not None:
            raise InputError(f"standard input cannot be read ({self._why}): --no-stdin leaves it alone")
        return _text(bytes(self._data))

    def _wait(self, event: threading.Event) -> bool:
        while not event.wait(_LOOK):
            if time.monotonic() > self._since + PATIENCE:
                return event.is_set()
        return True

    def _read(self, descriptor: int) -> None:
        try:
            while len(self._data) <= LARGEST and (data := os.read(descriptor, _CHUNK)):
                self._data += data
                self._begun.set()
        except OSError as e:
            self._why = e.strerror
        self._ended.set()
        self._begun.set()


def with_context(context: str, question: str) -> str:
    """The question behind its context, which is fenced off from it."""
    longest = max((len(run) for run in re.findall("`{3,}", context)), default=2)
    fence = "`" * (longest + 1)
    return f"Standard input:\n\n{fence}\n{context.rstrip()}\n{fence}\n\n{question}"


def too_long(context: str, prompt_tokens: int, limit: int) -> InputError:
    """The error for a context that a model cannot hold; it counts tokens."""
    part = int(len(context.encode()) * limit / prompt_tokens * 0.75)
    return InputError(
        f"standard input and the question make {prompt_tokens:,} tokens, the model's context holds {limit:,}:"
        f" give it a part, for example the end (tail -c {part})"
    )


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError):  # a stand-in without a file, or a closed one
        return None


def _may_tell(descriptor: int) -> bool:
    """Whether this is a file, a pipe or a socket, and no terminal or other device."""
    try:
        mode = os.fstat(descriptor).st_mode
    except OSError:
        return False
    return stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)


def _text(data: bytes) -> str | None:
    if len(data) > LARGEST:
        raise InputError(
            f"standard input is longer than {LARGEST // MIB} MiB: give it a part, for example the end (tail -c 20000)"
        )
    if (place := data.find(b"\0")) >= 0:
        raise InputError(f"standard input is binary (byte {place} is zero): only UTF-8 text can be context")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        raise InputError(f"standard input is not UTF-8 text (byte {e.start}): convert it first") from e
    text = text.replace("\r\n", "\n")
    return text if text.strip() else None
