"""The plain line-by-line chat: with a fake model, through pipes, and in a terminal."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import os
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from fakes import Answer, FakeModel
from openai_server import Server
from project import SUPPORT

from llm_edge.chat.commands import COMMANDS
from llm_edge.chat.figures import figures_line, figures_of
from llm_edge.chat.history.store import InMemoryStore, Store
from llm_edge.chat.parameters import EDITABLE, ChatParameters
from llm_edge.chat.responder import LocalResponder
from llm_edge.chat.session import ChatSession
from llm_edge.runtime import FinishReason, SamplingParams, Timings
from llm_edge.runtime.errors import ContextLengthError, LogitsError, MachineError, ParameterError, TemplateError
from llm_edge.runtime.installation import install_hint
from llm_edge.tui.plain import PlainChat

PARAMS = SamplingParams(temperature=0.5, max_tokens=100)
PATIENCE = 60  # timeout in seconds for a program


def partition(line: str) -> tuple[str, str]:
    name, _, value = line.partition(" = ")
    return name, value


class Output(io.StringIO):
    """Records each write; may be a terminal."""

    def __init__(self, terminal: bool = False) -> None:
        super().__init__()
        self.writes: list[str] = []
        self._terminal = terminal

    def write(self, text: str) -> int:
        self.writes.append(text)
        return super().write(text)

    def isatty(self) -> bool:
        return self._terminal


class Chat:
    """A `PlainChat` with a fake model, and its output."""

    def __init__(
        self,
        *answers: Answer | str,
        system: str | None = None,
        terminal: bool = False,
        params: SamplingParams = PARAMS,
        with_reasoning: bool = True,
    ) -> None:
        self.model: Any = FakeModel(*answers, params=params)
        self.output = Output(terminal)
        self.notes = Output()
        self.reasoning = self.output if terminal else Output()
        self.session = ChatSession(InMemoryStore(), ChatParameters(params, {"system": system} if system else {}))
        self.session.set_responder(LocalResponder(self.model))
        self.plain = PlainChat(
            self.session,
            self.output,
            self.notes,
            reasoning=self.reasoning if with_reasoning else None,
            interactive=terminal,
        )

    @property
    def params(self) -> SamplingParams:
        return self.session.parameters.params

    @property
    def messages(self) -> list[tuple[str, str]]:
        return [(message.role, message.content) for message in self.session.conversation.path()]

    def lines(self, *lines: str) -> int:
        return self.plain.run(line + "\n" for line in lines)

    @property
    def asked(self) -> list[list[str]]:
        """The contents of all messages sent to the model."""
        return [[message["content"] for message in messages] for messages, _params in self.model.questions]

    @property
    def errors(self) -> list[str]:
        return [line for line in self.notes.getvalue().splitlines() if line.startswith("error:")]


# Conversations


def test_a_conversation_keeps_its_context() -> None:
    chat = Chat("Hello.", "Fine.", "Bye.")
    assert chat.lines("Hi", "How are you?", "Go") == 0
    assert chat.asked == [["Hi"], ["Hi", "Hello.", "How are you?"], ["Hi", "Hello.", "How are you?", "Fine.", "Go"]]
    assert [role for role, _ in chat.messages] == ["user", "assistant"] * 3
    assert chat.output.getvalue() == "Hello.\nFine.\nBye.\n"


@pytest.mark.parametrize("empty", ["", "   ", "\t", "\r"])
def test_an_empty_line_starts_a_new_conversation(empty: str) -> None:
    chat = Chat("Hello.", "Who?")
    chat.lines("Hi", empty, "Do you remember me?")
    assert chat.asked[1] == ["Do you remember me?"]
    assert "(new conversation)" in chat.notes.getvalue()


def test_a_system_prompt_starts_every_conversation() -> None:
    chat = Chat("Hello.", "Fine.", "Hello.", system="Be brief.")
    chat.lines("Hi", "How are you?", "", "Hi again")
    assert chat.asked == [
        ["Be brief.", "Hi"],
        ["Be brief.", "Hi", "Hello.", "How are you?"],
        ["Be brief.", "Hi again"],
    ]
    assert [messages[0]["role"] for messages, _params in chat.model.questions] == ["system"] * 3


def test_answers_are_written_as_they_stream() -> None:
    chat = Chat()
    chunks = ["One", " two", " three"]

    def wait_until_written(number: int) -> None:
        deadline = time.monotonic() + PATIENCE
        while chat.output.getvalue() != "".join(chunks[:number]):
            assert time.monotonic() < deadline
            time.sleep(0.001)

    chat.model.enqueue(Answer(chunks, before=wait_until_written))
    chat.lines("Count")
    assert [text for text in chat.output.writes if text] == ["One", " two", " three", "\n"]


@pytest.mark.parametrize("leave", ["quit", "exit", " QUIT ", "/quit", "/exit"])
def test_quit_ends_the_chat(leave: str) -> None:
    chat = Chat("Hello.")
    assert chat.lines("Hi", leave, "never asked") == 0
    assert chat.asked == [["Hi"]]


def test_end_of_input_ends_the_chat() -> None:
    chat = Chat("Hello.")
    assert chat.plain.run(["Hi"]) == 0  # without a line feed
    assert chat.asked == [["Hi"]]


@pytest.mark.parametrize("line", ["Hi\n", "Hi\r\n", "Hi", "\ufeffHi\n"])
def test_line_ends_and_byte_order_marks_are_removed(line: str) -> None:
    chat = Chat("Hello.")
    chat.plain.run([line])
    assert chat.asked == [["Hi"]]


def test_white_space_inside_a_question_is_kept() -> None:
    chat = Chat("Hello.")
    chat.lines("  def f():\tpass  ")
    assert chat.asked == [["  def f():\tpass  "]]


@pytest.mark.parametrize(
    "error",
    [
        TemplateError("the template refuses"),
        LogitsError("not a number"),
        MachineError("not enough memory"),
        ParameterError("no"),
    ],
)
@pytest.mark.parametrize("late", [False, True])
def test_an_error_does_not_lose_the_conversation(error: Any, late: bool) -> None:
    bad = Answer(["Half an"], failure=error) if late else Answer(refusal=error)
    chat = Chat("Hello.", bad, "Fine.")
    assert chat.lines("Hi", "Trouble", "How are you?") == error.exit_code
    assert chat.asked[2] == ["Hi", "Hello.", "How are you?"]
    assert chat.errors == [f"error: {error}"]
    assert chat.output.getvalue() == "Hello.\n" + late * "Half an\n" + "Fine.\n"


def test_the_exit_code_is_that_of_the_worst_error() -> None:
    chat = Chat(Answer(refusal=MachineError("no")), Answer(refusal=TemplateError("no")))
    assert chat.lines("Hi", "Hi") == 3


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_full_context_drops_the_oldest_turns_and_reports_it(system: str | None) -> None:
    full = Answer(refusal=ContextLengthError(1030, 1024))
    chat = Chat("Hello.", "Fine.", full, full, "Yes.", full, "No.", system=system)
    assert chat.lines("Hi", "How are you?", "More?", "And more?") == 0
    start = [] if system is None else [system]
    assert chat.asked[3:5] == [[*start, "How are you?", "Fine.", "More?"], [*start, "More?"]]
    assert chat.asked[-1] == [*start, "How are you?", "Fine.", "More?", "Yes.", "And more?"]
    assert [line for line in chat.notes.getvalue().splitlines() if "oldest" in line] == [
        "the oldest 2 turns were left out: the model's context holds 1024 tokens",
        "the oldest turn was left out: the model's context holds 1024 tokens",
    ]


def test_a_question_that_never_fits_drops_nothing() -> None:
    full = Answer(refusal=ContextLengthError(9030, 1024))
    chat = Chat("Hello.", full, full, "Fine.")
    assert chat.lines("Hi", "x " * 9000, "How are you?") == 2
    assert chat.asked[-1] == ["Hi", "Hello.", "How are you?"]
    assert chat.errors == [f"error: {ContextLengthError(9030, 1024)}"]


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_a_question_longer_than_the_context_is_an_error(system: str | None) -> None:
    chat = Chat(Answer(refusal=ContextLengthError(1030, 1024)), system=system)
    chat.lines("x " * 1000)
    assert chat.errors == [f"error: {ContextLengthError(1030, 1024)}"]


def test_an_undecodable_line_is_an_error() -> None:
    chat = Chat("Hello.")
    assert chat.plain.run([b"caf\xe9\n".decode("utf-8", "surrogateescape"), "/save \udcff\n", "Hi\n"]) == 2
    assert chat.asked == [["Hi"]]
    assert chat.errors == ["error: this line is not valid UTF-8: convert it first"] * 2


def test_a_partly_generated_cancelled_answer_stays_in_the_conversation() -> None:
    chat = Chat(Answer(["Once", " upon"], FinishReason.CANCELLED), "Fine.")
    chat.lines("A story", "Hi")
    assert chat.asked[1] == ["A story", "Once upon", "Hi"]


def test_an_answer_cancelled_before_any_text_is_dropped() -> None:
    chat = Chat(Answer([], FinishReason.CANCELLED), "Fine.")
    chat.lines("A story", "Hi")
    assert chat.asked[1] == ["Hi"]
    assert "stopped" in chat.notes.getvalue()


def test_an_empty_answer_is_kept() -> None:
    chat = Chat(Answer([]), "Fine.")
    chat.lines("Hm", "Hi")
    assert chat.asked[1] == ["Hm", "", "Hi"]


def test_text_is_cleaned_only_for_terminals() -> None:
    nasty = Answer(["a\x1b[31m", "b\rc\u202e"])
    piped, shown = Chat(nasty), Chat(nasty, terminal=True)
    piped.lines("Hi")
    shown.lines("Hi")
    assert piped.output.getvalue() == "a\x1b[31mb\rc\u202e\n"
    assert shown.output.getvalue() == "a[31mbc\n\n"
    assert piped.messages == shown.messages


def test_notes_cannot_control_the_terminal() -> None:
    chat = Chat()
    chat.lines("/\x1b[31mred", "/set x\x1b[2J 1", "/save \x1b]0;title\x07/x")
    assert "\x1b" not in chat.notes.getvalue()
    assert len(chat.errors) == 3


# Reasoning


def thinking(*chunks: str, thoughts: tuple[str, ...] = ("Two", " and two"), **rest: Any) -> Answer:
    return Answer(chunks or ("It is", " 4."), reasoning=thoughts, **rest)


@pytest.fixture(autouse=True)
def a_terminal_that_can_dim(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", "xterm")


def test_reasoning_is_not_part_of_the_conversation(tmp_path: Path) -> None:
    chat = Chat(thinking(), "Yes.")
    chat.lines("2+2?", "Sure?", f"/save {tmp_path / 'talk.json'}")
    assert chat.asked[1] == ["2+2?", "It is 4.", "Sure?"]
    assert chat.output.getvalue() == "It is 4.\nYes.\n"
    assert chat.reasoning.getvalue() == "Two and two\n\n"
    assert "4 tokens (2 reasoning)" in chat.notes.getvalue()
    saved = json.loads((tmp_path / "talk.json").read_text())
    assert [message["reasoning"] for message in saved["messages"]] == ["", "Two and two", "", ""]


@pytest.mark.parametrize("ending", ["", "\n"])
def test_reasoning_is_dim_on_a_terminal(ending: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for term, shown in (("xterm", "\x1b[2mTwo and[31m{}\x1b[0m"), ("dumb", "Two and[31m{}")):
        monkeypatch.setenv("TERM", term)
        chat = Chat(thinking(thoughts=("Two", " and\x1b[31m" + ending)), terminal=True)
        chat.lines("2+2?")
        gap = "\n" if ending else "\n\n"
        written = chat.output.getvalue().replace("\x1b[0m\x1b[2m", "")  # chunks may be written together
        assert written == shown.format(ending) + gap + "It is 4.\n\n"


def test_reasoning_is_not_written_without_a_terminal() -> None:
    chat = Chat(thinking(), with_reasoning=False)
    chat.lines("2+2?")
    assert chat.output.getvalue() == "It is 4.\n"
    assert "Two" not in chat.notes.getvalue()


def test_an_answer_with_only_reasoning() -> None:
    for reason in (FinishReason.LENGTH, FinishReason.CANCELLED):
        chat = Chat(Answer((), reason, reasoning=("Two",)), "Yes.")
        chat.lines("2+2?", "Sure?")
        assert chat.reasoning.getvalue() == "Two\n"
        assert chat.output.getvalue() == "\nYes.\n"
        assert chat.asked[1] == (["2+2?", "", "Sure?"] if reason == FinishReason.LENGTH else ["Sure?"])


def test_an_answer_with_only_reasoning_is_reported() -> None:
    for limit, terminal, remedy in (
        (2, False, "raise --max-tokens"),
        (2, True, "raise it with /set max_tokens"),
        (100, False, "the model's context holds no more"),
    ):
        params = dataclasses.replace(PARAMS, max_tokens=limit)
        answer = Answer((), FinishReason.LENGTH, reasoning=("Two", " and two"))
        chat = Chat(answer, terminal=terminal, params=params)
        assert chat.lines("2+2?") == 0
        assert chat.notes.getvalue().splitlines()[1:] == [f"all 2 tokens of the answer are reasoning: {remedy}"]


def test_other_answers_are_not_reported() -> None:
    chat = Chat(
        thinking(reason=FinishReason.LENGTH),
        Answer((), FinishReason.STOP, reasoning=("Two",)),
        Answer((), FinishReason.CANCELLED, reasoning=("Two",)),
        Answer((), FinishReason.LENGTH),
    )
    chat.lines("a", "b", "c", "d")
    assert "of the answer are reasoning" not in chat.notes.getvalue()


def test_reasoning_can_be_hidden() -> None:
    chat = Chat(thinking(), thinking(), thinking(), "Yes.", terminal=True)
    chat.lines("/think hide", "2+2?")
    assert chat.output.getvalue() == "\x1b[2m(thinking)\x1b[0m\n\nIt is 4.\n\n"
    chat.lines("2+2?", "/think show", "2+2?", "/think hide", "2+2?")
    assert chat.output.getvalue().count("(thinking)") == 2
    assert chat.output.getvalue().count("and two") == 1


def test_reasoning_can_be_shown_explicitly() -> None:
    chat = Chat("1", "2", "3")
    chat.lines("a", "/think off", "b", "/think on", "", "c")
    assert chat.model.template_variables == [{}, {"enable_thinking": False}, {"enable_thinking": True}]
    assert chat.lines("/think", "/think harder") == 2
    assert chat.errors == ["error: /think needs one of: show, hide, on, off"] * 2


# Commands


@pytest.mark.parametrize(
    ("line", "name", "value"),
    [
        ("/set temperature 0.3", "temperature", 0.3),
        ("/set temperature 0", "temperature", 0.0),
        ("/set temperature=0.3", "temperature", 0.3),
        ("/set  temperature = 0.3 ", "temperature", 0.3),
        ("/set top_k 40", "top_k", 40),
        ("/set seed 7", "seed", 7),
        ("/set seed none", "seed", None),
        ("/set seed null", "seed", None),
        ("/set top_k none", "top_k", 0),
        ("/set stop END", "stop", ("END",)),
        ("/set stop 5", "stop", ("5",)),
        (r"/set stop a\nb", "stop", ("a\nb",)),
        ('/set stop ["a b", "=c"]', "stop", ("a b", "=c")),
        ("/set stop []", "stop", ()),
        ("/set stop_token_ids [1, 2]", "stop_token_ids", (1, 2)),
        ("/set repetition_window -1", "repetition_window", -1),
        ("/set max_newlines 2", "max_newlines", 2),
        ("/set single_think_end true", "single_think_end", True),
    ],
)
def test_set_changes_parameters(line: str, name: str, value: Any) -> None:
    chat = Chat("Hello.")
    assert chat.lines(line, "Hi") == 0
    wanted = dataclasses.replace(PARAMS, **{name: value})
    assert chat.params == wanted
    assert chat.model.questions[0][1] == wanted
    (shown,) = [text for note, text in map(partition, chat.notes.getvalue().splitlines()) if note == name]
    again = Chat("Hello.")
    again.lines(f"/set {name} {shown}")
    assert again.params == wanted


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("/set warmth 1", "'warmth': unknown parameter; available: temperature, top_p"),
        ("/set _within 1", "'_within': unknown parameter"),
        ("/set temperature 900", "temperature"),
        ("/set temperature -0.1", "temperature"),
        ("/set temperature NaN", "temperature"),
        ("/set temperature hot", "temperature"),
        ("/set temperature true", "temperature"),
        ("/set temperature [1]", "temperature"),
        ("/set top_k 2.5", "top_k"),
        ("/set max_tokens 0", "max_tokens"),
        ("/set max_tokens " + "9" * 5000, "max_tokens"),
        ("/set max_newlines -1", "max_newlines"),
        ("/set single_think_end 1", "single_think_end"),
        ('/set stop ["a', "stop"),
        ("/set stop " + "[" * 100_000, "stop"),
        ("/set", "/set needs a name and a value"),
        ("/set temperature", "/set needs a name and a value"),
        ("/set =", "/set needs a name and a value"),
    ],
)
def test_set_rejects_invalid_values(line: str, reason: str) -> None:
    chat = Chat("Hello.")
    assert chat.lines("/set top_p 0.8", line, "Hi") == 2
    assert len(chat.errors) == 1
    assert chat.errors[0].startswith(f"error: {reason}")
    assert chat.model.questions[0][1] == dataclasses.replace(PARAMS, top_p=0.8)


def test_params_lists_all_and_reset_restores_them() -> None:
    chat = Chat("Hello.")
    chat.lines("/set seed 7", "/set stop END", "/params", "/reset", "Hi")
    notes = chat.notes.getvalue()
    for name in EDITABLE:
        assert f"{name} = " in notes
    assert "seed = 7\n" in notes
    assert "temperature = 0.5\n" in notes
    assert "reasoning_budget = off\n" in notes
    assert 'stop = ["END"]\n' in notes
    assert "None" not in notes
    assert chat.params == PARAMS
    assert chat.model.questions[0][1] == PARAMS


def test_parameters_are_kept_in_the_next_conversation() -> None:
    chat = Chat("Hello.")
    chat.lines("/set seed 7", "", "Hi")
    assert chat.model.questions[0][1] == dataclasses.replace(PARAMS, seed=7)


@pytest.mark.parametrize("line", ["/frobnicate", "/Set temperature 1", "/settemperature 1", "/", "/etc/passwd?"])
def test_unknown_commands_are_errors(line: str) -> None:
    chat = Chat()
    assert chat.lines(line) == 2
    assert chat.errors == [f"error: {line.split()[0]}: unknown command; /help lists them"]
    assert chat.asked == []


def test_help_lists_every_command() -> None:
    chat = Chat()
    assert chat.lines("/help") == 0
    assert all(f"\n{name}" in "\n" + chat.notes.getvalue() for name in (*COMMANDS, "quit", "Ctrl-C", "(empty line)"))
    assert chat.output.getvalue() == ""


# Saving


def test_save_as_json(tmp_path: Path) -> None:
    chat = Chat("Hé 👋\x1b[0m", system="Be brief.")
    path = tmp_path / "talk.JSON"
    assert chat.lines("Hi", f"/save {path}") == 0
    content = path.read_text(encoding="utf-8")
    saved = json.loads(content)
    assert saved["system"] == "Be brief."
    assert [(message["role"], message["content"]) for message in saved["messages"]] == chat.messages
    assert chat.messages == [("user", "Hi"), ("assistant", "Hé 👋\x1b[0m")]
    assert "Hé 👋" in content
    assert f"saved to {path}\n" in chat.notes.getvalue()


def test_save_as_markdown(tmp_path: Path) -> None:
    chat = Chat("Hé 👋", "* one\n* two", system="Be brief.")
    chat.lines("Hi", "List", f"/save {tmp_path}/my talk.md")
    text = (tmp_path / "my talk.md").read_bytes().decode()
    text = "\n\n".join(part for part in text.split("\n\n") if not part.startswith("*("))  # the figures
    assert text == (
        "# Hi\n\n**system**\n\nBe brief.\n\n**user**\n\nHi\n\n**assistant**\n\nHé 👋\n\n"
        "**user**\n\nList\n\n**assistant**\n\n* one\n* two"
    )


def test_save_into_the_home_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    Chat("Hello.").lines("Hi", "/save ~/talk.md")
    assert (tmp_path / "talk.md").exists()


def test_save_never_overwrites(tmp_path: Path) -> None:
    path = tmp_path / "talk.md"
    path.write_text("precious")
    chat = Chat("Hello.")
    assert chat.lines("Hi", f"/save {path}", f"/save {tmp_path}") == 2
    assert path.read_text() == "precious"
    assert chat.errors == [
        f"error: {path} exists already: choose another name",
        f"error: {tmp_path} exists already: choose another name",
    ]


@pytest.mark.parametrize("name", ["missing/talk.md", "file/talk.md", "a\0b", "~nobody-of-this-name/x", "x" * 300])
def test_save_errors_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    chat = Chat("Hello.", "Fine.")
    assert chat.lines("Hi", f"/save {name}", "Still there?") == 2
    assert len(chat.errors) == 1
    assert "cannot be written (" in chat.errors[0]
    assert chat.asked[1] == ["Hi", "Hello.", "Still there?"]
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no device that is always full")
def test_save_to_a_full_disk_leaves_no_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = Path.open

    def full(path: Path, mode: str, **options: Any) -> Any:
        opened(path, mode, **options).close()
        return opened(Path("/dev/full"), "wb", **options)

    monkeypatch.setattr(Path, "open", full)
    chat = Chat("Hello.")
    assert chat.lines("Hi", f"/save {tmp_path / 'talk.md'}") == 2
    assert "No space left" in chat.errors[0]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_saving_an_empty_conversation_is_an_error(tmp_path: Path, system: str | None) -> None:
    chat = Chat("Hello.", system=system)
    assert chat.lines(f"/save {tmp_path}/a.md", "Hi", "", f"/save {tmp_path}/b.md", "/save") == 2
    assert chat.errors[:2] == ["error: nothing to save yet: ask a question first"] * 2
    assert chat.errors[2] == "error: /save needs a file name, for example: /save talk.md"
    assert list(tmp_path.iterdir()) == []


# Figures


@pytest.mark.parametrize(
    ("count", "reason", "line"),
    [
        (21, FinishReason.STOP, "21 tokens · 10.0 tok/s · first token 0.25 s · fp32 · complete"),
        (1, FinishReason.LENGTH, "1 token · first token 0.25 s · fp32 · cut off at the limit"),
        (0, FinishReason.CANCELLED, "0 tokens · fp32 · stopped"),
    ],
)
def test_figures_are_formatted(count: int, reason: FinishReason, line: str) -> None:
    timings = Timings(7, count, 0.25 if count else 0.0, 0.2, 2.0 if count else 0.0)
    assert figures_line(figures_of(timings, reason, "fp32")) == line


# As a program


CHAT = [sys.executable, "-c", "from llm_edge.tui.cli import main; main()"]


def chat(*arguments: str | Path, lines: bytes | str = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
    return subprocess.run(
        [*CHAT, *map(str, arguments)],
        input=lines.encode() if isinstance(lines, str) else lines,
        capture_output=True,
        timeout=PATIENCE,
        env=os.environ | environment,
        check=False,
    )


FEW = ("--precision", "fp32", "--threads", "1", "--max-tokens", "8", "--seed", "1", "--temperature", "1")


def test_questions_through_a_pipe(tiny_bundle: Path) -> None:
    asked = chat(tiny_bundle, "--ask", "Hi", *FEW)
    assert (asked.returncode, asked.stderr) == (0, b"(the answer was cut off after 8 tokens: raise --max-tokens)\n")
    assert len(asked.stdout) > 1
    piped = chat(tiny_bundle, "--plain", *FEW, lines="Hi\n\nHi\n/params\nquit\nHi\n")
    assert piped.returncode == 0
    assert piped.stdout == 2 * asked.stdout  # only the answers
    assert b"(new conversation)" in piped.stderr
    assert b"seed = 1" in piped.stderr
    windows = chat(tiny_bundle, "--plain", *FEW, lines="\ufeffHi\r\n\r\nHi\r\n")
    assert windows.stdout == piped.stdout


def test_the_system_prompt_and_parameters_are_used(tiny_bundle: Path) -> None:
    plain = chat(tiny_bundle, "--ask", "Hi", *FEW)
    assert chat(tiny_bundle, "--ask", "Hi", *FEW).stdout == plain.stdout
    assert chat(tiny_bundle, "--ask", "Hi", *FEW, "--system", "Be brief.").stdout != plain.stdout
    assert chat(tiny_bundle, "--ask", "Hi", *FEW[:-1], "2").stdout != plain.stdout


def test_lines_that_cannot_be_answered_are_errors(tiny_bundle: Path) -> None:
    lines = b"caf\xe9\n" + b"x" * 1_000_000 + b"\n/nonsense\nHi\n"
    done = chat(tiny_bundle, "--plain", *FEW, lines=lines)
    assert done.returncode == 2
    assert done.stdout == chat(tiny_bundle, "--ask", "Hi", *FEW).stdout
    errors = done.stderr.decode().splitlines()[:3]
    assert errors[0] == "error: this line is not valid UTF-8: convert it first"
    assert errors[1].endswith("tokens, but the model's context holds 1024: shorten the prompt")
    assert errors[2] == "error: /nonsense: unknown command; /help lists them"
    assert b"Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--ask", "  "], "--ask is empty"),
        (["--temperature", "-1"], "temperature"),
        (["--precision", "fp8"], "no precision 'fp8'"),
        (["--threads", "0"], "threads is 0"),
        (["--provider", "tpu"], "provider is 'tpu'"),
    ],
)
def test_invalid_arguments_are_rejected(tiny_bundle: Path, arguments: list[str], reason: str) -> None:
    done = chat(tiny_bundle, "--plain", *arguments, lines="Hi\n")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode().startswith("error: ")
    assert reason in done.stderr.decode()
    assert done.stderr.count(b"\n") == 1


def test_a_missing_bundle_is_an_error(tmp_path: Path) -> None:
    done = chat(tmp_path / "nothing", "--ask", "Hi")
    assert (done.returncode, done.stdout) == (2, b"")
    assert done.stderr.decode() == f"error: {tmp_path}/nothing: no such bundle folder: create one with llm-export\n"


def test_the_plain_chat_needs_no_optional_packages(tiny_bundle: Path, tmp_path: Path) -> None:
    code = (
        "import sys\n"
        "for name in ('textual', 'openai', 'httpx2', 'platformdirs', 'keyring'): sys.modules[name] = None\n"
        "from llm_edge.tui.cli import main; main()"
    )

    def run(*arguments: str | Path) -> subprocess.CompletedProcess[bytes]:
        command = [sys.executable, "-c", code, *map(str, arguments)]
        environment = {key: value for key, value in os.environ.items() if not key.startswith("LLM_EDGE")}
        return subprocess.run(
            command, input=b"Hi\n", capture_output=True, timeout=PATIENCE, check=False, env=environment
        )

    for how in ("--ask=Hi", "--plain"):
        done = run(tiny_bundle, how, *FEW)
        assert done.returncode == 0, done.stderr
        assert done.stdout
    endpoint = ("--endpoint", "localhost:1", "--model", "small", "--ask", "Hi")
    for arguments, package in (
        ((tiny_bundle, "--ask", "Hi", "--save"), b"saving needs platformdirs"),
        (endpoint, b"endpoints need"),
        ((*endpoint, "--key", "keyring"), b"endpoints need"),
    ):
        done = run(*arguments)
        assert (done.returncode, done.stdout) == (2, b"")
        assert done.stderr.startswith(b"error: " + package)
        assert install_hint("tui") in done.stderr.decode()
        assert done.stderr.count(b"\n") == 1


def test_endpoints_can_be_used(server: Server, tmp_path: Path) -> None:
    server.key = "sk-secret"
    endpoint = ("--endpoint", server.url, "--model", "small", "--key", "env:TEST_API_KEY")
    places = {"TEST_API_KEY": "sk-secret", "LLM_EDGE_CONFIG": str(tmp_path), "LLM_EDGE_DATA": str(tmp_path)}
    asked = chat(*endpoint, "--ask", "Hi", "--temperature", "0.5", **places)
    assert (asked.returncode, asked.stdout, asked.stderr) == (0, b"Hello there\n", b"")
    assert server.requests[0]["temperature"] == 0.5
    lines = "Hi\n/set top_k 7\nAgain\n/think off\nOnce more\n"
    piped = chat(*endpoint, "--plain", "--save", lines=lines, **places)
    assert (piped.returncode, piped.stdout) == (0, b"Hello there\n" * 3)
    assert server.requests[2]["top_k"] == 7
    assert [message["content"] for message in server.requests[2]["messages"]] == ["Hi", "Hello there", "Again"]
    assert server.requests[3]["chat_template_kwargs"] == {"enable_thinking": False}
    assert b"sk-secret" not in piped.stderr
    with Store(tmp_path / "conversations.sqlite3") as store:
        assert [summary.model for summary in store.recent()] == ["small"]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--endpoint", "http://localhost:1/v1"], "--endpoint needs a model: add --model NAME"),
        (["--model", "small"], "--model and --key need an endpoint: add --endpoint URL"),
        (["--endpoint", "ftp://x", "--model", "small"], "the base URL must start with http:// or https://"),
        (["--endpoint", "localhost:1", "--model", "small", "--key", "env:NO_SUCH_VARIABLE"], "is not set"),
    ],
)
def test_unusable_endpoints_are_errors(arguments: list[str], reason: str) -> None:
    done = chat(*arguments, "--ask", "Hi")
    assert (done.returncode, done.stdout) == (2, b"")
    assert reason in done.stderr.decode()
    assert done.stderr.count(b"\n") == 1


# As a program with a fake model


FAKE = """
import itertools, sys, time
sys.path.insert(0, {tests!r})
from fakes import Answer, FakeModel
from llm_edge.runtime.model import FinishReason, Model

{body}

def open_fake(*_arguments):
    loading()
    return FakeModel(*answers)

Model.open = open_fake
from llm_edge.tui.cli import main
main()
"""


def faking(tmp_path: Path, answers: str, loading: str = "pass") -> list[str]:
    """A `llm-chat` command whose answers are defined by this source."""
    body = f"answers = {answers}\ndef loading():\n{textwrap.indent(loading, '    ')}"
    script = tmp_path / "fake_chat.py"
    script.write_text(FAKE.format(tests=str(SUPPORT), body=body))
    return [sys.executable, str(script), "bundle"]


ENDLESS = "[Answer(['word\\n'] * 10**6, before=lambda n: time.sleep(0.01))]"


def test_a_closed_output_pipe_ends_the_program(tmp_path: Path) -> None:
    with subprocess.Popen(
        [*faking(tmp_path, ENDLESS), "--plain"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdin.write(b"Hi\n")
        process.stdin.close()
        assert process.stdout.readline() == b"word\n"
        process.stdout.close()
        assert process.wait(PATIENCE) == 141  # the shell's exit code for SIGPIPE
        assert process.stderr.read() == b""


@pytest.mark.parametrize("arguments", [["--plain"], ["--ask", "Hi", "--no-stdin"]])
def test_an_interrupt_ends_a_non_interactive_chat(tmp_path: Path, arguments: list[str]) -> None:
    with subprocess.Popen(
        [*faking(tmp_path, ENDLESS), *arguments],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(b"Hi\nHi\n")
        process.stdin.flush()
        assert process.stdout.readline() == b"word\n"
        process.send_signal(signal.SIGINT)
        try:
            rest, notes = process.communicate(timeout=PATIENCE)
        finally:
            process.kill()
        assert set(rest.split()) <= {b"word"}
        assert process.returncode == 130
        assert notes == b"interrupted\n"


def test_text_not_encodable_in_the_locale(tmp_path: Path) -> None:
    command = [*faking(tmp_path, "[Answer(['Hé 👋'])]"), "--ask", "Hi"]
    for encoding, wanted in (("utf-8", "Hé 👋\n".encode()), ("ascii", b"H? ?\n"), ("latin-1", b"H\xe9 ?\n")):
        environment = os.environ | {"PYTHONIOENCODING": encoding}
        done = subprocess.run(command, capture_output=True, timeout=PATIENCE, env=environment, check=True)
        assert (done.stdout, done.stderr) == (wanted, b"")


def test_only_answers_are_written_to_a_pipe(tmp_path: Path) -> None:
    answers = "[Answer(['4'], reasoning=['hm', ' so'])] * 2"
    asked = subprocess.run(
        [*faking(tmp_path, answers), "--ask", "Hi"], capture_output=True, timeout=PATIENCE, check=True
    )
    assert (asked.stdout, asked.stderr) == (b"4\n", b"")
    piped = subprocess.run(
        [*faking(tmp_path, answers), "--plain"], input=b"Hi\nHi\n", capture_output=True, timeout=PATIENCE, check=True
    )
    assert piped.stdout == b"4\n4\n"
    assert piped.stderr.count(b"3 tokens (2 reasoning)") == 2
    assert b"hm" not in piped.stderr


def test_reasoning_that_uses_all_tokens_is_reported_on_stderr(tmp_path: Path) -> None:
    command = faking(tmp_path, "[Answer([], FinishReason.LENGTH, reasoning=['hm', ' so'])]")
    line = b"all 2 tokens of the answer are reasoning: raise --max-tokens\n"
    asked = subprocess.run(
        [*command, "--max-tokens", "2", "--ask", "Hi"], capture_output=True, timeout=PATIENCE, check=True
    )
    assert (asked.stdout, asked.stderr) == (b"\n", line)
    piped = subprocess.run(
        [*command, "--max-tokens", "2", "--plain"], input=b"Hi\n", capture_output=True, timeout=PATIENCE, check=True
    )
    assert piped.stdout == b"\n"
    assert piped.stderr.endswith(b"cut off at the limit\n" + line)


@pytest.mark.parametrize(
    ("closed", "arguments", "code", "out", "error"),
    [
        ("<&-", "--plain", 0, b"", b""),
        ("<&-", "--ask Hi", 0, b"4\n", b""),
        ("<&- 2>&-", "--ask Hi", 0, b"4\n", b""),
        ("2>&-", "--plain", 0, b"4\n", b""),
        ("2>&-", "--ask ''", 2, b"", b""),
        ("2>&-", "--top-k x", 2, b"", b""),
        (">&-", "--ask Hi", 2, b"", b"error: stdout is closed, so the answer cannot be written: open it, or "),
        (">&-", "--plain", 2, b"", b"error: stdout is closed, so the answer cannot be written: open it, or "),
        ("<&- >&- 2>&-", "--ask Hi", 2, b"", b""),
    ],
)
def test_closed_standard_streams(
    tmp_path: Path, closed: str, arguments: str, code: int, out: bytes, error: bytes
) -> None:
    command = f"{shlex.join(faking(tmp_path, '[Answer([str(4)])]'))} {arguments} {closed}"
    done = subprocess.run(["sh", "-c", command], input=b"Hi\n", capture_output=True, timeout=PATIENCE, check=False)
    assert (done.returncode, done.stdout) == (code, out)
    assert done.stderr.startswith(error)
    assert done.stderr.count(b"\n") == bool(error)


# In a terminal


LEADER = "import fcntl, os, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0); os.execv(sys.argv[1], sys.argv[1:])"


class Terminal:
    """A program in a pseudo-terminal, and its output."""

    def __init__(self, command: list[str]) -> None:
        self._master, slave = os.openpty()
        environment = os.environ | {"TERM": "dumb", "INPUTRC": os.devnull, "LC_ALL": "C.UTF-8"}
        with contextlib.closing(open(slave, "rb", closefd=True)):  # noqa: PTH123
            self.process = subprocess.Popen(
                [sys.executable, "-c", LEADER, *command],
                stdin=slave,
                stdout=slave,
                stderr=slave,
                start_new_session=True,
                env=environment,
            )
        self.seen = b""

    def expect(self, text: str) -> str:
        """Wait for this text; return everything up to it that was not returned before."""
        wanted = text.encode()
        while wanted not in self.seen:
            read = self._read()
            assert read, f"{text!r} did not come, but {self.seen!r}"
            self.seen += read
        end = self.seen.index(wanted) + len(wanted)
        part, self.seen = self.seen[:end], self.seen[end:]
        return self._text(part)

    def send(self, keys: str) -> None:
        os.write(self._master, keys.encode())

    def answers(self, within: float) -> bool:
        """Whether more output arrives within the given number of seconds."""
        while select.select([self._master], [], [], within)[0]:
            read = self._read()
            self.seen += read
            if not read or self._text(self.seen).replace("^C", ""):
                return True
        return False

    def end(self) -> tuple[int, str]:
        """Wait for the end; return the exit code and what was still written."""
        rest = self.seen
        while read := self._read():
            rest += read
        return self.process.wait(PATIENCE), self._text(rest)

    @staticmethod
    def _text(output: bytes) -> str:
        """Output without readline's sequences for bracketed paste."""
        return re.sub(r"\x1b\[\?2004[hl]\r?", "", output.decode()).replace("\r\n", "\n")

    def _read(self) -> bytes:
        ready, _, _ = select.select([self._master], [], [], PATIENCE)
        assert ready, f"nothing came any more after {self.seen!r}"
        try:
            return os.read(self._master, 4096)
        except OSError:  # on Linux: the other end is closed
            return b""

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@pytest.fixture
def terminal(tmp_path: Path) -> Iterator[Any]:
    opened: list[Terminal] = []

    def start(answers: str, *arguments: str, loading: str = "pass") -> Terminal:
        opened.append(Terminal([*faking(tmp_path, answers, loading), *arguments]))
        return opened[-1]

    yield start
    for each in opened:
        each.close()


INTERRUPT, END = "\x03", "\x04"
LISTENING = "Answer(['word '] * 10**6, before=lambda n: time.sleep(0.01))"


def test_a_conversation_in_a_terminal(terminal: Any) -> None:
    talk = terminal("['Hello.', 'Fine.']", "--system", "Be brief.")
    assert talk.expect("> ") == (
        "fake, fp32, on cpu. /help lists the commands, Ctrl-C stops an answer, quit leaves.\n\n> "
    )
    talk.send("Hi\r")
    assert talk.expect("> ") == "Hi\nHello.\n6 tokens · 10.0 tok/s · first token 0.25 s · fp32 · complete\n\n> "
    talk.send("/set top_k 5\r")
    assert talk.expect("> ") == "/set top_k 5\ntop_k = 5\n> "
    talk.send("/set top_k x\r")
    assert talk.expect("> ").startswith("/set top_k x\nerror: top_k: 'x' is not allowed")
    talk.send("How are you?\r")
    assert "\nFine.\n" in talk.expect("> ")
    talk.send("quit\r")
    assert talk.end() == (0, "quit\n")


def test_interrupt_stops_the_answer_and_the_chat_continues(terminal: Any) -> None:
    talk = terminal(f"[{LISTENING}, {LISTENING}, 'Fine.']")
    for _ in range(2):
        talk.expect("> ")
        talk.send("Hi\r")
        talk.expect("word word ")
        talk.send(INTERRUPT)
        assert re.fullmatch(r"\^?C?\n\d+ tokens .* stopped", talk.expect("stopped").replace("word ", ""))
    talk.expect("> ")
    talk.send("How are you?\r")
    assert "Fine.\n" in talk.expect("> ")
    talk.send(END)
    code, rest = talk.end()
    assert (code, rest.strip(), rest[-1]) == (0, "", "\n")


def test_interrupt_at_the_prompt_ends_the_chat(terminal: Any) -> None:
    talk = terminal("['Hello.']")
    talk.expect("> ")
    talk.send(INTERRUPT)
    while not talk.answers(within=3):  # a signal between Python's signal check and its wait for keys is lost
        talk.send(INTERRUPT)
    code, rest = talk.end()
    assert code == 130
    assert rest.endswith("\ninterrupted\n")
    assert "Traceback" not in rest


def test_interrupt_while_the_model_loads(terminal: Any) -> None:
    talk = terminal("[]", loading="print('loading', flush=True)\ntime.sleep(60)")
    talk.expect("loading")
    talk.send(INTERRUPT)
    code, rest = talk.end()
    assert code == 130
    assert rest.endswith("interrupted\n")
    assert "Traceback" not in rest


def test_keys_pressed_during_an_answer_are_shown_once(terminal: Any) -> None:
    talk = terminal("[Answer(['word '] * 100, before=lambda n: time.sleep(0.01)), 'Fine.']")
    talk.expect("> ")
    talk.send("Hi\r")
    talk.expect("word ")
    talk.send("How are you?\r")
    answer = talk.expect("complete")
    assert answer.replace("word ", "").startswith("\n")
    assert "Fine.\n" in talk.expect("complete")
    talk.expect("> ")
    talk.send(END)
    assert talk.end()[0] == 0


def test_model_output_cannot_control_the_terminal(terminal: Any) -> None:
    talk = terminal("[Answer(['a\\x1b[31m', 'b\\x1b]52;c;eA==\\x07', '\\x9b2J\\rc'])]", "--temperature", "0")
    before = talk.expect("> ")
    talk.send("Hi\r")
    answer = talk.expect("> ")
    assert "\na[31mb]52;c;eA==2Jc\n" in answer
    talk.send(END)
    assert not set("\x1b\x07\x9b\r") & set(before + answer + talk.end()[1])


def test_ask_in_a_terminal(terminal: Any) -> None:
    talk = terminal("['Hello.']", "--ask", "Hi")
    assert talk.end() == (0, "Hello.\n6 tokens · 10.0 tok/s · first token 0.25 s · fp32 · complete\n")
    assert terminal("[Answer(refusal=__import__('llm_edge.runtime.errors').runtime.errors.TemplateError('no'))]",
                    "--ask", "Hi").end() == (2, "error: no\n")  # fmt: skip


def test_reasoning_in_a_terminal(terminal: Any, tmp_path: Path) -> None:
    answers = "[Answer(['It is 4.'], reasoning=['hm', ' so'])]"
    answer = (
        "hm so\n\nIt is 4.\n3 tokens (2 reasoning) · 10.0 tok/s · first token 0.25 s · fp32 · complete\n"  # TERM=dumb
    )
    assert terminal(answers, "--ask", "Hi").end() == (0, answer)
    talk = terminal(answers)
    talk.expect("> ")
    talk.send("Hi\r")
    assert talk.expect("> ") == f"Hi\n{answer}\n> "
    # With the answer redirected to a file, the reasoning is shown but not written to it.
    command = [*faking(tmp_path, answers), "--ask", "Hi"]
    shell = Terminal(["/bin/sh", "-c", f"{shlex.join(command)} > {shlex.quote(str(tmp_path / 'answer'))}"])
    try:
        assert shell.end() == (0, "hm so\n\n")
    finally:
        shell.close()
    assert (tmp_path / "answer").read_text() == "It is 4.\n"


@pytest.mark.skipif(shutil.which("tmux") is None, reason="tmux is not installed")
def test_the_rendered_screen(tmp_path: Path) -> None:
    """The screen as rendered by a terminal emulator, including line editing."""
    readline = pytest.importorskip("readline")
    if "libedit" in (readline.__doc__ or ""):
        pytest.skip("this Python edits lines with libedit, which does not support bracketed paste")
    command = shlex.join([*faking(tmp_path, "['Hello.', 'Fine.', 'Oh!']"), "--plain"])
    pasted = tmp_path / "pasted.txt"
    pasted.write_text("def f():\n    pass")
    tmux = ["tmux", "-L", f"llm-edge-{os.getpid()}", "-f", os.devnull]

    def run(*arguments: str) -> str:
        done = subprocess.run([*tmux, *arguments], capture_output=True, text=True, timeout=PATIENCE, check=True)
        return done.stdout

    def screen(*, until: str) -> str:
        deadline = time.monotonic() + PATIENCE
        while until not in (shown := run("capture-pane", "-p").rstrip("\n")):
            assert time.monotonic() < deadline, shown
            time.sleep(0.05)
        return shown  # without trailing blanks

    run("new-session", "-d", "-x", "90", "-y", "24", f"{command}; echo left with $?; sleep 60")
    try:
        screen(until="leaves.\n\n>")
        run("send-keys", "Hello there", "Enter")
        screen(until="complete\n\n>")
        run("send-keys", "Up")
        screen(
            until="> Hello there\nHello.\n6 tokens · 10.0 tok/s · first token 0.25 s · fp32 · complete\n\n> Hello there"
        )
        run("send-keys", "C-a", "C-k", "How are you?", "Home", "So: ", "Enter")
        screen(until="Fine.\n5 tokens · 10.0 tok/s · first token 0.25 s · fp32 · complete\n\n>")
        run("load-buffer", str(pasted))
        run("paste-buffer", "-p")
        screen(until="> def f():\n    pass")
        run("send-keys", " # why?", "Enter")
        screen(until="Oh!\n3 tokens · 10.0 tok/s · first token 0.25 s · fp32 · complete\n\n>")
        run("send-keys", "C-d")
        assert screen(until="left with 0").replace(">\n\n", ">\n") == (  # some readline versions add a line
            "fake, fp32, on cpu. /help lists the commands, Ctrl-C stops an answer, quit leaves.\n\n"
            "> Hello there\nHello.\n6 tokens · 10.0 tok/s · first token 0.25 s · fp32 · complete\n\n"
            "> So: How are you?\nFine.\n5 tokens · 10.0 tok/s · first token 0.25 s · fp32 · complete\n\n"
            "> def f():\n    pass # why?\nOh!\n3 tokens · 10.0 tok/s · first token 0.25 s · fp32 · complete\n\n"
            ">\nleft with 0"
        )
    finally:
        run("kill-server")
