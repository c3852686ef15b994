"""Escape sequences in untrusted text never reach the terminal.

The application runs in a pseudo-terminal, and all bytes it writes are checked. (test_terminal.py tests the text that
remains without control characters.)
"""

from __future__ import annotations

import contextlib
import json
import os
import pty
import select
import sys
import termios
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

PAYLOADS = (
    "\x1b]52;c;b3duZWQ=\x07",  # writes the clipboard
    "\x1b]0;owned\x07",  # sets the window title
    "\x1b]8;;https://owned.example\x1b\\link\x1b]8;;\x1b\\",
    "\x1b[2J\x1b[Howned",  # clears the screen
    "\x1b[6nowned",  # makes the terminal send a response
    "\x1bP$qowned\x1b\\",  # this too
    "\x1bcowned",  # resets it
    "\x9b31mowned",  # CSI as a single character, like the next one
    "\x9d0;owned\x9c",
    "\u202eowned\u202c\u2066owned\u2069",  # reverses the order of letters
)
ALL = " ".join(PAYLOADS)
CONTROLS = ("\x9b", "\x9c", "\x9d", "\u202e", "\u202c", "\u2066", "\u2069")  # the application never writes these
PATIENCE = 60.0

CHAT = """
import json, os, sys
from pathlib import Path
from llm_edge.runtime.errors import MachineError
from llm_edge.tui.app import ChatApp
from llm_edge.chat.fake import FakeResponder, Said
from llm_edge.chat.settings import Settings
from llm_edge.chat.history.store import Store
folder, evil = Path(sys.argv[1]), json.loads(os.environ["EVIL"])
bad = Said("partly " + evil, reasoning="thought " + evil, failure=MachineError("failed " + evil))
code = f"streamed {evil}\\n\\n```{evil}\\n{evil}\\n```\\n| {evil} |\\n|---|\\n| {evil} |\\n"
title = Said("titled " + evil)  # a long question gets a title from the model
model = FakeResponder(Said(code, reasoning=evil), title, bad, name="model " + evil, detail="detail " + evil)
app = ChatApp(Store(folder / "chats.db"), lambda: model, Settings(folder))
app.run()
"""


class Terminal:
    """The chat in a terminal of 120 by 100, and its complete output."""

    def __init__(self, folder: Path) -> None:
        self._process, self._terminal = pty.fork()
        if self._process == 0:
            os.environ.update(EVIL=json.dumps(ALL), TERM="xterm-256color")
            os.environ.pop("TMUX", None)
            os.execv(sys.executable, [sys.executable, "-c", CHAT, str(folder)])
        termios.tcsetwinsize(self._terminal, (100, 120))
        self.written = b""

    def until(self, text: str) -> None:
        """Read until a text appears."""
        begin, deadline = len(self.written), time.monotonic() + PATIENCE
        while text.encode() not in self.written[begin:]:
            assert time.monotonic() < deadline, (text, self.written[-2000:])
            self.read()

    def read(self, seconds: float = 0.05) -> None:
        if select.select([self._terminal], [], [], seconds)[0]:
            with contextlib.suppress(OSError):
                self.written += os.read(self._terminal, 1 << 16)

    def send(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def close(self) -> None:
        self.send("\x11")
        with contextlib.suppress(OSError):
            while data := os.read(self._terminal, 1 << 16):
                self.written += data
        os.waitpid(self._process, 0)
        os.close(self._terminal)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Terminal]:
    created = Terminal(tmp_path)
    yield created
    with contextlib.suppress(OSError):
        created.close()


def safe(written: bytes, *ways: str) -> None:
    """Check that every payload reached the screen, and none as a control sequence."""
    for way in ways:
        assert way.encode() in written, way
    for payload in PAYLOADS:
        assert payload.encode() not in written, payload
    for control in CONTROLS:
        assert control.encode() not in written, control


def test_ten_payloads_from_all_sources_are_harmless(terminal: Terminal, tmp_path: Path) -> None:
    """Sources: pasted text, answer, reasoning, code, table, model name, title, error, notification and search results;
    then all of them again from the store.
    """
    terminal.until("Ready")
    terminal.send(f"\x1b[200~pasted {ALL}\x1b[201~")
    terminal.until("pasted")
    terminal.send("\r")
    terminal.until("complete")
    time.sleep(2)  # the model gives the conversation a title
    terminal.send("again\r")
    terminal.until("failed")
    terminal.send("\x1bOQ")  # F2
    terminal.until("Search all messages")
    terminal.send("streamed")
    terminal.until("Found")
    terminal.send("\x1b")
    time.sleep(0.5)
    terminal.close()
    safe(terminal.written, "pasted", "streamed", "model ", "detail ", "failed", "partly", "owned")

    again = Terminal(tmp_path)
    try:
        again.until("Ready")
        again.send("\x1a")  # Ctrl-Z: the latest conversation
        again.until("partly")
        again.send("\x1bOS")  # F4
        again.until("Hugging Face")
        again.send("\x1b")
        time.sleep(0.5)
    finally:
        again.close()
    safe(again.written, "partly", "model ", "failed", "owned")
