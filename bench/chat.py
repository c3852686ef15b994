"""`python -m llm_edge.bench.chat BUNDLE`: measures the overhead of the full-screen chat, in a pseudo-terminal.

Tokens per second in `llm-chat` and without it, in turn; the time from a key press to its letter on the screen while an
answer is generated; and the same in a long conversation, with the time to open and scroll it.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import select
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from llm_edge.bench.requirements import require_modules
from llm_edge.runtime.bundle import Bundle
from llm_edge.runtime.command import run
from llm_edge.runtime.errors import MachineError

QUESTION = "Write a long story about a lighthouse keeper and a storm."
TOKENS = 400
KEY = "ß"  # does not occur in answers to that question
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
    """Tokens per second without the chat."""
    command = [sys.executable, "-c", _BARE, str(bundle), precision, QUESTION, str(TOKENS)]
    return float(json.loads(subprocess.run(command, stdout=subprocess.PIPE, check=True, text=True).stdout))


class Terminal:
    """`llm-chat` in a pseudo-terminal of 100 columns and 30 rows."""

    def __init__(self, bundle: Path, precision: str, data: Path) -> None:
        import pty  # only on Unix, as `main` says elsewhere
        import termios

        self.began = time.perf_counter()
        self._pid, self._terminal = pty.fork()
        if self._pid == 0:
            os.environ.update(LLM_EDGE_DATA=str(data), LLM_EDGE_CONFIG=str(data), TERM="xterm-256color", COLUMNS="100")
            options = ["--precision", precision, "--temperature", "0", "--max-tokens", str(TOKENS)]
            os.execv(sys.executable, [sys.executable, "-c", _APP, str(bundle), *options])  # noqa: S606
        termios.tcsetwinsize(self._terminal, (30, 100))
        self._seen = b""

    def wait(self, text: str, seconds: float = 60.0) -> float:
        """Read until the terminal shows a text; returns the time by `time.perf_counter`."""
        end = time.perf_counter() + seconds
        while text.encode() not in self._seen:
            if time.perf_counter() > end:
                raise MachineError(f"llm-chat does not show {text!r}: {self._seen[-300:]!r}")
            self.read(0.05)
        when = time.perf_counter()
        self._seen = b""
        return when

    def read(self, seconds: float) -> None:
        """Read output for at most the given number of seconds."""
        if select.select([self._terminal], [], [], seconds)[0]:
            with contextlib.suppress(OSError):
                self._seen += os.read(self._terminal, 1 << 16)

    def send(self, text: str) -> float:
        """Press keys; returns the time."""
        self._seen = b""
        os.write(self._terminal, text.encode())
        return time.perf_counter()

    def settle(self) -> None:
        """Read output for a moment."""
        end = time.perf_counter() + 0.1
        while time.perf_counter() < end:
            self.read(0.02)

    def close(self) -> None:
        """Quit the chat."""
        os.write(self._terminal, b"\x11")
        with contextlib.suppress(OSError):
            while os.read(self._terminal, 1 << 16):
                pass
        os.waitpid(self._pid, 0)


def chat(bundle: Path, precision: str, keys: bool) -> tuple[float, list[float], float]:
    """Tokens per second in the chat, seconds from keys to their letters, and seconds from start to the first screen."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        terminal = Terminal(bundle, precision, data)
        start = terminal.wait("F1") - terminal.began
        terminal.wait("Ready")
        terminal.send(QUESTION + "\r")
        rate, echoes = watch(terminal, data, keys)
        terminal.close()
    return rate, echoes, start


def long_chat(bundle: Path, precision: str) -> tuple[float, float, list[float]]:
    """Seconds to open a long conversation, to scroll a page, and from keys to their letters."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        subprocess.run([sys.executable, "-c", _FILL, str(data / STORE), str(LONG), PARAGRAPH], check=True)
        terminal = Terminal(bundle, precision, data)
        terminal.wait("Ready")
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
    """Tokens per second of an answer, and seconds from keys pressed meanwhile to their letters."""
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
    """Tokens per second of the answer as stored; None = it is not complete."""
    query = "SELECT figures FROM messages WHERE role = 'assistant' AND finished AND figures <> '{}'"
    with contextlib.closing(sqlite3.connect(data / STORE)) as store:
        rows = store.execute(query).fetchall()
    return float(json.loads(rows[0][0])["tokens_per_second"]) if rows else None


def measure(bundle: Path, precision: str, rounds: int) -> None:
    """Measure with and without the chat in turn, and print medians."""
    Bundle.open(bundle).precision(precision)  # reports an unknown one early
    ratios, echoes, starts = [], [], []
    for _ in range(rounds):
        alone = bare(bundle, precision)
        rate, _, start = chat(bundle, precision, keys=False)
        ratios.append(rate / alone)
        starts.append(start)
        print(f"  {alone:.0f} tok/s alone, {rate:.0f} in the chat", file=sys.stderr)
        echoes += chat(bundle, precision, keys=True)[1]
    print(f"chat: {statistics.median(ratios):.3f} x the speed without a screen, least {min(ratios):.3f}")
    print(f"keys: {_summary(echoes)}")
    print(f"start to screen: {statistics.median(starts):.2f} s")
    opened, scrolled, echoes = long_chat(bundle, precision)
    words = LONG * (len(PARAGRAPH.split()) + 2)
    print(f"{LONG} messages of {words:,} words: open in {opened:.2f} s, a page up in {scrolled * 1e3:.0f} ms")
    print(f"keys there: {_summary(echoes)}")


def _summary(echoes: Sequence[float]) -> str:
    late = sorted(echoes)[int(0.95 * len(echoes))]
    return f"{statistics.median(echoes) * 1e3:.0f} ms, 95 % {late * 1e3:.0f} ms, of {len(echoes)}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--precision", default="int8")
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args(arguments)

    def command() -> None:
        require_modules("this benchmark", "pty", "termios")
        measure(options.bundle, options.precision, options.rounds)

    sys.exit(run(command, native_output=True))


if __name__ == "__main__":
    main()
