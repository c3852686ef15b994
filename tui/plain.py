"""A chat line by line, for any terminal and for pipes. Knows a model only by what it yields."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import signal
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Protocol, TextIO

from llm_edge.runtime.errors import InputError, ParameterError
from llm_edge.runtime.generate import FinishReason, Generation, Message, Timings
from llm_edge.runtime.sampler import SamplingParams
from llm_edge.tui.terminal import printable

HELP = """\
/set NAME VALUE   change a parameter, for example: /set temperature 0.3
/params           show the parameters
/reset            parameters as they were at the start
/save FILE        write the conversation to a new file (.json, else Markdown)
(empty line)      begin a new conversation
Ctrl-C            stop the answer
quit              leave"""


class ChatModel(Protocol):
    """What a chat needs of a model; `runtime.Model` is one."""

    def chat(self, messages: Sequence[Message], params: SamplingParams | None = None) -> Generation:
        """Answer a conversation."""


class PlainChat:
    """The conversation and its parameters.

    Args:
        model: who answers.
        params: parameters at the start.
        system: system prompt, or None for the template's own.
        output: where answers go.
        notes: where everything else goes.
        prompt: text shown before each question.
    """

    def __init__(
        self,
        model: ChatModel,
        params: SamplingParams,
        system: str | None,
        output: TextIO,
        notes: TextIO,
        prompt: str = "",
    ) -> None:
        self._model = model
        self._start_params = self.params = params
        self._system = system
        self._output = output
        self._notes = notes
        self._prompt = prompt
        self.messages: list[dict[str, str]] = []
        self._begin()

    def run(self, lines: Iterable[str]) -> None:
        """Take lines until they end or one says `quit`."""
        self._ask()
        for line in lines:
            text = line.rstrip("\r\n")
            if text.strip().lower() in ("quit", "exit", "/quit", "/exit"):
                return
            try:
                self._line(text)
            except InputError as error:
                self._note(f"error: {error}")
            self._ask()

    def answer(self, text: str) -> FinishReason:
        """Ask a question and stream its answer; both join the conversation."""
        question = {"role": "user", "content": text}
        generation = self._model.chat([*self.messages, question], self.params)
        texts: list[str] = []
        reason, timings = FinishReason.CANCELLED, None
        with _interrupts(generation):
            for piece in generation:
                texts.append(piece.text)
                self._write(piece.text)
                if piece.finish_reason is not None:
                    reason, timings = piece.finish_reason, piece.timings
        self._write("\n")
        self.messages += [question, {"role": "assistant", "content": "".join(texts)}]
        if timings is not None:
            self._note(figures(reason, timings))
        return reason

    def _line(self, text: str) -> None:
        if not text.strip():
            self._begin()
            self._note("(new conversation)")
        elif text.startswith("/"):
            self._command(text)
        else:
            self.answer(text)

    def _command(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        rest = rest.strip()
        if name == "/set":
            field, _, value = rest.partition(" ")
            self.params = with_parameter(self.params, field, value.strip())
            self._note(f"{field} = {getattr(self.params, field)}")
        elif name == "/params":
            for parameter in dataclasses.fields(self.params):
                self._note(f"{parameter.name} = {getattr(self.params, parameter.name)}")
        elif name == "/reset":
            self.params = self._start_params
            self._note("(parameters as at the start)")
        elif name == "/save":
            if not rest:
                raise ParameterError("/save needs a file name, for example: /save talk.md")
            save(Path(rest).expanduser(), self.messages)
            self._note(f"saved to {rest}")
        elif name == "/help":
            self._note(HELP)
        else:
            raise ParameterError(f"{name} is not a command; /help lists them")

    def _begin(self) -> None:
        self.messages = [] if self._system is None else [{"role": "system", "content": self._system}]

    def _ask(self) -> None:
        if self._prompt:
            self._output.write(self._prompt)
            self._output.flush()

    def _write(self, text: str) -> None:
        self._output.write(printable(text) if self._output.isatty() else text)
        self._output.flush()

    def _note(self, text: str) -> None:
        self._notes.write(printable(text) + "\n")
        self._notes.flush()


def figures(reason: FinishReason, timings: Timings) -> str:
    """One line on how an answer went."""
    return (
        f"({timings.completion_tokens} tokens, {timings.decode_tokens_per_second:.0f} tok/s, "
        f"first after {timings.time_to_first_token:.2f} s, {reason})"
    )


def with_parameter(params: SamplingParams, name: str, value: str) -> SamplingParams:
    """The parameters with one of them changed, given as text.

    Raises:
        ParameterError: there is no such parameter, or the value does not fit.
    """
    names = [field.name for field in dataclasses.fields(params)]
    if name not in names:
        raise ParameterError(f"there is no parameter {name!r}; there are {', '.join(names)}")
    try:
        parsed: Any = json.loads(value) if value != "none" else None
    except ValueError:
        parsed = value
    return dataclasses.replace(params, **{name: parsed})


def save(path: Path, messages: Sequence[Message]) -> None:
    """Write a conversation to a file that does not exist yet.

    Raises:
        InputError: the file is there already, or cannot be written.
    """
    if path.suffix == ".json":
        text = json.dumps({"messages": list(messages)}, indent=2, ensure_ascii=False) + "\n"
    else:
        text = "\n\n".join(f"**{message['role']}**\n\n{message['content']}" for message in messages) + "\n"
    try:
        with path.open("x", encoding="utf-8") as file:
            file.write(text)
    except FileExistsError as error:
        raise InputError(f"{path} exists already: choose another name") from error
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error.strerror}): choose another name") from error


@contextlib.contextmanager
def _interrupts(generation: Generation) -> Iterator[None]:
    """Ctrl-C ends the generation instead of the program."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        generation.cancel()

    try:
        before = signal.signal(signal.SIGINT, stop)
    except ValueError:  # not in the main thread, where no Ctrl-C arrives
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
