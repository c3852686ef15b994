"""The chat in a real terminal (tmux) with SmolLM2: what a user sees, and the terminal's state afterwards.

There are few, long scenes, because each loads the model.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")

PATIENCE = 90  # timeout in seconds for a screen
READY = "Ready"
ANSWERED = re.compile(r"\d+ tokens · [\d.]+ tok/s · first token [\d.]+ s · fp32 · complete")
STOPPED = re.compile(r"\d+ tokens · [\d.]+ tok/s · first token [\d.]+ s · fp32 · stopped")
LONG = "Write a very long story about a fox and a river."


class Screen:
    """A shell in tmux, 80 by 24, in which the chat runs; its folder holds all data of the chat."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tmux = ["tmux", "-L", f"llm-edge-{os.getpid()}-{folder.name}", "-f", os.devnull]
        kept = {"LLM_EDGE_DATA": str(folder / "data"), "LLM_EDGE_CONFIG": str(folder / "config")}
        kept |= {"COLUMNS": "80", "LINES": "24"}  # some shells export these
        variables = [word for name, value in kept.items() for word in ("-e", f"{name}={value}")]
        shell = "env LC_ALL=C.UTF-8 sh"
        self.run("new-session", "-d", "-x", "80", "-y", "24", *variables, "-c", str(folder), shell)
        self.type("PS1='shell> '")

    def run(self, *arguments: str) -> str:
        done = subprocess.run([*self._tmux, *arguments], capture_output=True, text=True, timeout=PATIENCE, check=True)
        return done.stdout

    def shown(self) -> str:
        """All lines without trailing blanks."""
        return self.run("capture-pane", "-p").rstrip("\n")

    def until(self, wanted: str | re.Pattern[str] | Callable[[str], object]) -> str:
        """Wait until the screen contains a text or satisfies a condition, and return it."""
        holds = (
            (lambda shown: wanted in shown)
            if isinstance(wanted, str)
            else (wanted.search if isinstance(wanted, re.Pattern) else wanted)
        )
        deadline = time.monotonic() + PATIENCE
        while not holds(shown := self.shown()):
            assert time.monotonic() < deadline, f"{wanted} does not come:\n{shown}"
            time.sleep(0.05)
        return shown

    def keys(self, *keys: str) -> None:
        self.run("send-keys", *keys)

    def type(self, text: str) -> None:
        """Type a line, and Enter."""
        self.run("send-keys", "-l", text)
        self.keys("Enter")

    def chat(self, *arguments: str) -> None:
        """Start the chat; the shell then prints its exit code."""
        # exec keeps the shell's process id, so that the chat can be killed.
        self.type(f"clear; sh -c 'echo $$ > process; exec \"$@\"' - {self.command(*arguments)}; echo left with $?")

    def command(self, *arguments: str) -> str:
        """The shell command of the chat."""
        return shlex.join([sys.executable, "-m", "llm_edge.tui", *arguments])

    def ask(self, question: str) -> None:
        """Type a question, wait until it is shown, and send it."""
        self.run("send-keys", "-l", question)
        self.until(lambda shown: question in shown.partition("╭")[2])
        self.keys("Enter")

    def close(self) -> None:
        subprocess.run([*self._tmux, "kill-server"], capture_output=True, timeout=PATIENCE, check=False)


@pytest.fixture
def screen(tmp_path: Path) -> Iterator[Screen]:
    created = Screen(tmp_path)
    yield created
    created.close()


def growing(question: str) -> Callable[[str], object]:
    """Whether an answer to a question is being generated and has some words."""
    return lambda shown: "Esc to stop" in shown and len(_answer(shown, question).split()) > 8


def _answer(shown: str, question: str) -> str:
    _, _, answer = shown.partition(f"▌ {question}")[2].partition("▌ SmolLM2-135M-Instruct")
    return answer.partition("╭")[0].replace("▌", "")


def test_a_conversation_with_the_main_features(screen: Screen, smollm2_bundle: Path) -> None:
    """Ask, stop, change parameters, ask again, resize, and quit."""
    screen.chat(str(smollm2_bundle), "--precision", "fp32", "--temperature", "0", "--max-tokens", "4000")
    shown = screen.until(READY)
    assert shown.startswith(" New conversation  —  SmolLM2-135M-Instruct · fp32\n")
    screen.ask("What is the capital of France?")
    shown = screen.until(ANSWERED)
    assert "The capital of France is Paris." in shown
    assert max(map(len, shown.splitlines())) <= 80

    screen.keys("BTab")
    screen.until("Copy code")
    screen.keys("y")
    screen.until("Copied.")
    deadline = time.monotonic() + PATIENCE
    while "Paris." not in screen.run("list-buffers", "-F", "#{buffer_sample}"):  # independent of tmux's set-clipboard
        assert time.monotonic() < deadline
        time.sleep(0.05)
    screen.keys("Escape")
    screen.until("Send")

    screen.ask(LONG)
    early = len(_answer(screen.until(growing(LONG)), LONG))
    screen.until(lambda shown: len(_answer(shown, LONG)) > early + 40)  # it streams
    screen.keys("F3")
    screen.until(re.compile(r"Temperature +◂ 0 "))
    screen.keys("Right")
    screen.until(re.compile(r"Temperature +◂ 0\.05"))
    screen.keys("F3", "Escape")
    shown = screen.until(STOPPED)
    assert re.search(r"changed mid-answer: temperature 0\.05 from token \d+", " ".join(shown.split()), re.IGNORECASE)

    screen.keys("C-r")
    screen.until("2 of 2")
    screen.until(lambda shown: "Esc to stop" in shown)
    screen.run("resize-window", "-x", "200", "-y", "60")
    screen.until(lambda shown: "╭" + "─" * 198 + "╮" in shown)
    screen.keys("Escape")
    screen.until(lambda shown: "2 of 2" in shown and STOPPED.search(shown))
    screen.keys("F2")
    screen.until("Search all messages")
    screen.run("resize-window", "-x", "80", "-y", "24")
    screen.until(lambda shown: len(shown.splitlines()) == 24 and "Search all messages" in shown)
    screen.keys("Escape")
    screen.until(lambda shown: "Search all messages" not in shown)

    screen.keys("C-q")
    shown = screen.until("left with 0")
    assert shown.splitlines()[-2:] == ["left with 0", "shell>"]
    assert "SmolLM2" not in shown  # the alternate screen is closed and the previous one restored
    screen.type("stty -a | tr ' ;' '\\n\\n' | grep -x -e echo -e icanon")
    screen.until("icanon\necho\nshell>")  # echo and canonical mode are restored
    assert screen.run("display-message", "-p", "#{mouse_any_flag} #{alternate_on} #{cursor_flag}") == "0 0 1\n"


def test_a_kill_during_an_answer_keeps_the_text(screen: Screen, smollm2_bundle: Path) -> None:
    """The partial answer is saved and can be continued."""
    arguments = (str(smollm2_bundle), "--precision", "fp32", "--temperature", "0", "--max-tokens", "4000")
    screen.chat(*arguments)
    screen.until(READY)
    screen.ask(LONG)
    seen = _answer(screen.until(growing(LONG)), LONG).split()[:6]
    screen.until(lambda shown: len(_answer(shown, LONG).split()) > 40)  # it has been saved meanwhile
    os.kill(int((screen.folder / "process").read_text()), signal.SIGKILL)
    screen.until("left with 137")
    screen.run("send-keys", "-l", "stty sane; reset")
    screen.keys("C-j")  # the terminal was left in raw mode, so Enter is not translated to a line end
    screen.until(lambda shown: "fox" not in shown)
    screen.run("resize-window", "-x", "200", "-y", "60")
    screen.chat(*arguments)
    screen.until(READY)
    screen.keys("F2")
    screen.until(lambda shown: LONG[:20] in shown.partition("Search all messages")[2])
    screen.keys("Down", "Enter")
    shown = screen.until("unfinished")
    answer = " ".join(_answer(shown, LONG).split())
    assert " ".join(seen) in answer
    screen.keys("Escape", "C-g")
    screen.until(lambda shown: "unfinished" not in shown and "Esc to stop" in shown)
    os.kill(int((screen.folder / "process").read_text()), signal.SIGTERM)  # as on shutdown
    screen.until("left with 130")


def test_without_a_bundle_the_picker_opens(screen: Screen) -> None:
    """The picker offers an export; a missing folder given by name is reported before the screen starts."""
    screen.chat()
    shown = screen.until("Make SmolLM2-135M now")
    assert "artifacts/smollm2-135m: not found" in shown
    screen.keys("Escape")
    screen.until("No model: press F4")
    screen.keys("C-q")
    screen.until("left with 0")
    screen.chat("nowhere")
    shown = screen.until("left with 2")
    assert "error: nowhere: no such folder" in shown


def test_dumb_terminals_and_redirected_output_get_the_plain_chat(screen: Screen, tiny_bundle: Path) -> None:
    """A terminal without cursor addressing, and output redirected to a file."""
    chat = screen.command(str(tiny_bundle), "--max-tokens", "3")
    for number, (prefix, redirection) in enumerate((("TERM=dumb", ""), ("", "2> errors"))):
        screen.type(
            f"clear; echo {number}$((1 + 1))begins; {prefix} {chat} {redirection}; echo {number}$((1 + 1))ended"
        )
        screen.until(lambda shown, number=number: f"{number}2begins" in shown and "/help lists the commands" in shown)
        screen.type("quit")
        assert "quit\n" in screen.until(f"{number}2ended")


def test_a_terminal_that_is_closed_ends_the_chat(screen: Screen) -> None:
    screen.chat("--fake")
    screen.until(READY)
    screen.ask("Who are you?")
    screen.until("tokens")
    process = int((screen.folder / "process").read_text())
    screen.close()
    deadline = time.monotonic() + PATIENCE
    while alive(process):
        assert time.monotonic() < deadline, "the chat still runs without a terminal"
        time.sleep(0.05)


def alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    return True
