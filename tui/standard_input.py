"""`StandardInput`: reads standard input as the context of a question.

It cannot be known whether an open pipe will receive data, so this is the rule:

* A terminal, the null device and a closed standard input are ignored.
* A file, and a pipe or socket that receives data, is read to its end, however long that takes.
* A pipe or socket that stays open without data (as under ssh, or when inherited from a parent process) is ignored
  PATIENCE seconds after the start, with a note.
"""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable
from typing import TextIO

from llm_edge.chat.attachments import MAX_SIZE, Attachment, text_of, with_attachments
from llm_edge.runtime.errors import ContextLengthError, InputError

PATIENCE = 3.0  # seconds
_CHUNK = 64 * 1024
_POLL = 0.2  # seconds; waiting longer would block Ctrl-C on some systems


class StandardInput:
    """Standard input, read on a thread while the model loads.

    Args:
        stream: standard input.
        wanted: True = read it to its end, even from a terminal; False = ignore it; None = apply the rule above.
    """

    def __init__(self, stream: TextIO, wanted: bool | None = None) -> None:
        self._wanted = wanted
        self._data = bytearray()
        self._error: str | None = None
        self._received = threading.Event()
        self._ended = threading.Event()
        self._start = time.monotonic()
        descriptor = _descriptor(stream)
        self._reads = descriptor is not None and wanted is not False and (wanted is True or _is_data(descriptor))
        if descriptor is not None and self._reads:
            threading.Thread(target=self._read, args=(descriptor,), name="llm-chat-stdin", daemon=True).start()

    def text(self, note: Callable[[str], None]) -> str | None:
        """The whole text; None if there is none.

        Args:
            note: called with a message if reading takes long, or no data arrived.

        Raises:
            InputError: the input is not UTF-8 text, longer than MAX_SIZE bytes, or cannot be read.
        """
        if not self._reads:
            return None
        if not self._wait(self._received) and not self._wanted:
            note(
                f"(no data from standard input within {PATIENCE:.0f} s: answering without it;"
                " --stdin waits for it, --no-stdin ignores it)"
            )
            return None
        if not self._wait(self._ended):
            note("(reading standard input to its end …)")
            while not self._ended.wait(_POLL):
                pass
        if self._error is not None:
            raise InputError(f"standard input cannot be read ({self._error}): --no-stdin ignores it")
        text = text_of(bytes(self._data), "standard input")
        return text if text.strip() else None

    def _wait(self, event: threading.Event) -> bool:
        while not event.wait(_POLL):
            if time.monotonic() > self._start + PATIENCE:
                return event.is_set()
        return True

    def _read(self, descriptor: int) -> None:
        try:
            while len(self._data) <= MAX_SIZE and (data := os.read(descriptor, _CHUNK)):
                self._data += data
                self._received.set()
        except OSError as e:
            self._error = e.strerror
        self._ended.set()
        self._received.set()


def with_context(context: str, question: str) -> str:
    """The question after its context, which is enclosed in a code fence."""
    return with_attachments(question, [Attachment("", context)])


def too_long(context: str, error: ContextLengthError) -> InputError:
    """The error for input that exceeds the model's context."""
    # A text that was not encoded has an unknown number of tokens, but hardly more than bytes.
    bytes_per_token = 1.0 if error.at_least else len(context.encode()) / error.prompt_tokens
    fits = int(error.limit * bytes_per_token * 0.75)
    count = f"{'at least ' if error.at_least else ''}{error.prompt_tokens:,}"
    return InputError(
        f"standard input and the question have {count} tokens, but the model's context holds {error.limit:,}:"
        f" shorten it, for example to its end (tail -c {fits})"
    )


def _descriptor(stream: TextIO) -> int | None:
    try:
        return stream.fileno()
    except (OSError, ValueError):  # a replacement without a file, or closed
        return None


def _is_data(descriptor: int) -> bool:
    """Whether this is a file, pipe or socket, not a terminal or another device."""
    try:
        mode = os.fstat(descriptor).st_mode
    except OSError:
        return False
    return stat.S_ISREG(mode) or stat.S_ISFIFO(mode) or stat.S_ISSOCK(mode)
