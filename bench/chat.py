"""`python -m llm_edge.bench.chat BUNDLE`: what the terminal chat costs, in a terminal of its own.

Tokens a second of an answer in `llm-chat` against the same answer without a screen, in turn; the time from a key to its
letter in the terminal while an answer comes; and that in a long conversation, with the time to open and to scroll it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import pty
import select
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import termios
import time
from collections.abc import Sequence
from pathlib import Path

from llm_edge.runtime.bundle import Bundle
from llm_edge.runtime.command import run
from llm_edge.runtime.errors import MachineError

QUESTION = "Write a long story about a lighthouse keeper and a storm."
TOKENS = 400
KEY = "ß"  # no answer to that question holds it
STORE = "conversations.sqlite3"
F2, PAGE_UP = "\x1bOQ", "\x1b[5~"
LONG = 200  # messages
PARAGRAPH = "some **words** and `more` of them, " * 15
_APP = "import sys; from llm_edge.tui.cli import main; sys.argv[0] = 'llm-chat'; main()"
_BARE = """
import sys, json
from pathlib import Path
from dataclasses import replace
from llm_edge.runtime.model import Model
path, precision, question, tokens = sys.argv[1:]
model = Model.load(Path(path), precision)
params = replace(model.default_params, temperature=0.0, max_tokens=int(tokens), min_tokens=int(tokens))
for _ in range(2):
    *_, last = model.chat([{"role": "user", "content": question}], params)
print(json.dumps(last.timings.decode_tokens_per_second))
"""
_FILL = """
import sys
from pathlib import Path
from llm_edge.chat.history.store import Store
path, count, text = sys.argv[1:]
with Store(Path(path)) as store:
    conversation = store.new("A long conversation")
    for number in range(int(count)):
        role = "assistant" if number % 2 else "user"
        store.add(conversation, role, f"Number {number}.\\n\\n{text}", finished=True)
"""


def bare(bundle: Path, precision: str) -> float:
    """Tokens a second without a screen."""
    command = [sys.executable, "-c", _BARE, str(bundle), precision, QUESTION, str(TOKENS)]
    return float(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout))


class Terminal:
    """`llm-chat` in a terminal of 100 columns and 30 rows."""

    def __init__(self, bundle: Path, precision: str, data: Path) -> None:
        self.began = time.perf_counter()
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            os.environ.update(LLM_EDGE_DATA=str(data), LLM_EDGE_CONFIG=str(data), TERM="xterm-256color", COLUMNS="100")
            options = ["--precision", precision, "--temperature", "0", "--max-tokens", str(TOKENS)]
            os.execv(sys.executable, [sys.executable, "-c", _APP, str(bundle), *options])  # noqa: S606
        termios.tcsetwinsize(self._terminal, (30, 100))
        self._seen = b""

    def wait(self, text: str, seconds: float = 60.0) -> float:
        """Read until the terminal shows a text; returns when that was, by `time.perf_counter`."""
        end = time.perf_counter() + seconds
        while text.encode() not in self._seen:
            if time.perf_counter() > end:
                raise MachineError(f"llm-chat does not show {text!r}: {self._seen[-300:]!r}")
            self.read(0.05)
        when = time.perf_counter()
        self._seen = b""
        return when

    def read(self, seconds: float) -> None:
        """Take what comes meanwhile."""
        if select.select([self._terminal], [], [], seconds)[0]:
            with contextlib.suppress(OSError):
                self._seen += os.read(self._terminal, 1 << 16)

    def send(self, text: str) -> float:
        """Press keys; returns when."""
        self._seen = b""
        os.write(self._terminal, text.encode())
        return time.perf_counter()

    def settle(self) -> None:
        """Take what comes for a moment."""
        end = time.perf_counter() + 0.1
        while time.perf_counter() < end:
            self.read(0.02)

    def close(self) -> None:
        """Leave."""
        os.write(self._terminal, b"\x11")
        with contextlib.suppress(OSError):
            while os.read(self._terminal, 1 << 16):
                pass
        os.waitpid(self._pid, 0)


def chat(bundle: Path, precision: str, keys: bool) -> tuple[float, list[float], float]:
    """Tokens a second in the application, seconds from keys to their letters, and seconds from start to screen."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        terminal = Terminal(bundle, precision, data)
        start = terminal.wait("F1") - terminal.began
        terminal.wait("ready")
        terminal.send(QUESTION + "\r")
        rate, echoes = watch(terminal, data, keys)
        terminal.close()
    return rate, echoes, start


def long_chat(bundle: Path, precision: str) -> tuple[float, float, list[float]]:
    """Seconds until a long conversation shows, and until it has scrolled by a page; seconds from keys to letters."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        subprocess.run([sys.executable, "-c", _FILL, str(data / STORE), str(LONG), PARAGRAPH], check=True)
        terminal = Terminal(bundle, precision, data)
        terminal.wait("ready")
        terminal.send(F2)
        terminal.wait("A long conversation")
        sent = terminal.send("\r")
        opened = terminal.wait(f"Number {LONG - 1}.") - sent
        terminal.settle()
        sent = terminal.send(PAGE_UP)
        scrolled = terminal.wait(f"Number {LONG - 5}.") - sent
        terminal.send(QUESTION + "\r")
        _, echoes = watch(terminal, data, keys=True)
        terminal.close()
    return opened, scrolled, echoes


def watch(terminal: Terminal, data: Path, keys: bool) -> tuple[float, list[float]]:
    """Tokens a second of an answer that begins, and seconds from keys that are pressed meanwhile to their letters."""
    echoes: list[float] = []
    terminal.wait("tok/s")
    while (rate := figures(data)) is None:
        if keys:
            sent = terminal.send(KEY)
            try:
                echoes.append(terminal.wait(KEY, 2.0) - sent)
            except MachineError:
                echoes.append(2.0)
        terminal.settle()
    return rate, echoes


def figures(data: Path) -> float | None:
    """Tokens a second of the answer, once it is complete; read from the store."""
    query = "SELECT figures FROM messages WHERE role = 'assistant' AND finished AND figures <> '{}'"
    with contextlib.closing(sqlite3.connect(data / STORE)) as store:
        rows = store.execute(query).fetchall()
    return float(json.loads(rows[0][0])["tokens_per_second"]) if rows else None


def measure(bundle: Path, precision: str, rounds: int) -> None:
    """Both in turn; prints medians."""
    Bundle.open(bundle).precision(precision)  # a wrong one is told in a line
    ratios, echoes, starts = [], [], []
    for _ in range(rounds):
        alone = bare(bundle, precision)
        rate, _, start = chat(bundle, precision, keys=False)
        ratios.append(rate / alone)
        starts.append(start)
        print(f"  {alone:.0f} tok/s alone, {rate:.0f} in the chat", file=sys.stderr)
        echoes += chat(bundle, precision, keys=True)[1]
    print(f"chat: {statistics.median(ratios):.3f} x the speed without a screen, least {min(ratios):.3f}")
    print(f"keys: {_told(echoes)}")
    print(f"start to screen: {statistics.median(starts):.2f} s")
    opened, scrolled, echoes = long_chat(bundle, precision)
    words = LONG * (len(PARAGRAPH.split()) + 2)
    print(f"{LONG} messages of {words:,} words: open in {opened:.2f} s, a page up in {scrolled * 1e3:.0f} ms")
    print(f"keys there: {_told(echoes)}")


def _told(echoes: Sequence[float]) -> str:
    late = sorted(echoes)[int(0.95 * len(echoes))]
    return f"{statistics.median(echoes) * 1e3:.0f} ms, 95 % {late * 1e3:.0f} ms, of {len(echoes)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse and measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)
    sys.exit(run(lambda: measure(options.bundle, options.precision, options.rounds)))


if __name__ == "__main__":
    main()
