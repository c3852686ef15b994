"""A chat line by line, for any terminal and for pipes. Knows a model only by what it yields."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import signal
from collections.abc import Iterable, Iterator, Mapping, Sequence
from types import FrameType
from typing import TYPE_CHECKING, Any, Protocol, TextIO

from llm_edge.chat.context import dropped_note, fit_to_context
from llm_edge.chat.files import write_file
from llm_edge.chat.text import printable
from llm_edge.runtime.errors import InputError, LlmEdgeError, ParameterError
from llm_edge.runtime.generation import Generation
from llm_edge.runtime.results import FinishReason, Timings
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.runtime.text.prompts import Message
from llm_edge.tui.terminal import Aside, without_echo

if TYPE_CHECKING:
    from llm_edge.chat.recorder import ConversationRecorder

HINT = "/help lists the commands, Ctrl-C stops an answer, quit leaves."
HELP = """\
/set NAME VALUE   change a parameter, for example: /set temperature 0.3
/params           show the parameters
/reset            parameters as they were at the start
/think hide|show  whether the reasoning shows, of models that reason before they answer
/think on|off     ask for reasoning, or for none (only some models heed it)
/save FILE        write the conversation to a new file (.json, else Markdown)
(empty line)      begin a new conversation
Ctrl-C            stop the answer; between answers, leave
quit              leave (so does Ctrl-D)"""


class ChatModel(Protocol):
    """What a chat needs of a model; `runtime.Model` is one."""

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        template_variables: Mapping[str, Any] | None = None,
    ) -> Generation:
        """Answer a conversation."""


class PlainChat:
    """The conversation and its parameters.

    Args:
        model: who answers.
        params: parameters at the start.
        system: system prompt, or None for the template's own.
        output: where answers go.
        notes: where everything else goes.
        reasoning: where the model's reasoning goes, which is no part of the conversation; None = nowhere.
        interactive: somebody watches: Ctrl-C ends an answer only, and a blank line follows each.
        with_figures: a line on how it went follows each answer.
        kept: where the conversations are kept, if they are.
    """

    def __init__(
        self,
        model: ChatModel,
        params: SamplingParams,
        system: str | None,
        output: TextIO,
        notes: TextIO,
        *,
        reasoning: TextIO | None = None,
        interactive: bool = False,
        with_figures: bool = True,
        kept: ConversationRecorder | None = None,
    ) -> None:
        self._model = model
        self._start_params = self.params = params
        self._system = system
        self._output = output
        self._notes = notes
        self._reasoning = reasoning
        self._shows_reasoning = True
        self._template_variables: dict[str, Any] = {}
        self._interactive = interactive
        self._with_figures = with_figures
        self._kept = kept
        self.messages: list[dict[str, str]] = []
        self._begin()

    def run(self, lines: Iterable[str]) -> int:
        """Take lines until they end or one says `quit`.

        Returns:
            0, or the highest exit code among the errors that were noted on the way.
        """
        worst = 0
        for line in lines:
            text = line.rstrip("\r\n").removeprefix("\ufeff")  # some editors begin a file with this mark
            if text.strip().lower() in ("quit", "exit", "/quit", "/exit"):
                break
            try:
                self._line(text)
            except LlmEdgeError as error:
                worst = max(worst, error.exit_code)
                self._note(f"error: {error}")
        return worst

    def answer(self, text: str, about: str = "") -> FinishReason:
        """Ask a question and stream its answer; both join the conversation, unless it was cancelled before any text.

        `about` is what a kept conversation is named by, where that is not the text itself.
        """
        question = {"role": "user", "content": text}
        generation = self._begun(question)
        if self._kept is not None:
            self._kept.asked(text, self.params, about or text)
        texts: list[str] = []
        aside = Aside(self._reasoning, instead=None if self._shows_reasoning else "(thinking)")
        reason, timings, failed = FinishReason.CANCELLED, None, False
        try:
            with _watched(generation) if self._interactive else contextlib.nullcontext():
                for piece in generation:
                    if self._kept is not None:
                        self._kept.take(piece)
                    if piece.reasoning:
                        aside.write(piece.text)
                    elif piece.text:
                        aside.end()
                        texts.append(piece.text)
                        self._write(piece.text)
                    if piece.finish_reason is not None:
                        reason, timings = piece.finish_reason, piece.timings
        except LlmEdgeError:
            failed = True
            raise
        finally:
            answer = "".join(texts)
            joins = bool(answer) or reason != FinishReason.CANCELLED
            aside.end(apart=False)
            self._write("\n")  # what follows, be it an error, begins a line of its own
            if self._kept is not None:
                self._kept.ended(reason, timings, joins=joins and not failed)
        if joins:
            self.messages += [question, {"role": "assistant", "content": answer}]
        if timings is not None:
            if self._with_figures:
                self._note(figures(reason, timings))
            if reason == FinishReason.LENGTH and not answer and timings.reasoning_tokens > 0:
                self._note(self._all_reasoning(timings.completion_tokens))
        return reason

    def _all_reasoning(self, count: int) -> str:
        """Why an answer is empty, and what helps."""
        remedy = "raise --max-tokens"
        if count < self.params.max_tokens:
            remedy = "the model's context holds no more"
        elif self._interactive:
            remedy = "raise them with /set max_tokens"
        return f"the answer's {count} tokens all went into reasoning: {remedy}"

    def _begun(self, question: Message) -> Generation:
        """Begin an answer; where the context does not hold the conversation, its oldest turns go, and it says so."""
        opening = self._opening()
        turns = self.messages[len(opening) :]

        def begin(messages: list[Message]) -> Generation:
            return self._model.chat(messages, self.params, template_variables=self._template_variables)

        generation, kept, limit = fit_to_context(begin, opening, turns, question)
        if limit:
            self.messages = [*opening, *turns[len(turns) - len(kept) :]]
            self._note(f"({dropped_note((len(turns) - len(kept)) // 2, limit)})")
        return generation

    def _line(self, text: str) -> None:
        if not _is_text(text):
            raise InputError("this line is not valid UTF-8: convert it first")
        if not text.strip():
            self._begin()
            self._note("(new conversation)")
        elif text.startswith("/"):
            self._command(text)
        else:
            self.answer(text)
            if self._interactive:
                self._write("\n")

    def _command(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        rest = rest.strip()
        if name == "/set":
            given = re.fullmatch(r"(\w+)[\s=]\s*=?\s*(.+)", rest)
            if given is None:
                raise ParameterError("/set needs a name and a value, for example: /set temperature 0.3")
            self.params = with_parameter(self.params, given[1], given[2])
            self._note(f"{given[1]} = {getattr(self.params, given[1])}")
        elif name == "/params":
            for parameter in dataclasses.fields(self.params):
                self._note(f"{parameter.name} = {getattr(self.params, parameter.name)}")
        elif name == "/reset":
            self.params = self._start_params
            self._note("(parameters as at the start)")
        elif name == "/think":
            self._think(rest)
        elif name == "/save":
            if not rest:
                raise ParameterError("/save needs a file name, for example: /save talk.md")
            save(rest, self.messages)
            self._note(f"saved to {rest}")
        elif name == "/help":
            self._note(HELP)
        else:
            raise ParameterError(f"{name} is not a command; /help lists them")

    def _think(self, word: str) -> None:
        if word in ("show", "hide"):
            self._shows_reasoning = word == "show"
            self._note("(reasoning shows)" if self._shows_reasoning else "(reasoning does not show)")
        elif word in ("on", "off"):
            self._template_variables = {"enable_thinking": word == "on"}
            self._note(f"enable_thinking = {word == 'on'}")
        else:
            raise ParameterError("/think needs one of: show, hide, on, off")

    def _begin(self) -> None:
        self.messages = self._opening()
        if self._kept is not None:
            self._kept.begin()

    def _opening(self) -> list[dict[str, str]]:
        return [] if self._system is None else [{"role": "system", "content": self._system}]

    def _write(self, text: str) -> None:
        self._output.write(printable(text) if self._output.isatty() else text)
        self._output.flush()

    def _note(self, text: str) -> None:
        self._notes.write(printable(text) + "\n")
        self._notes.flush()


def figures(reason: FinishReason, timings: Timings) -> str:
    """One line on how an answer went."""
    count, facts = timings.completion_tokens, [str(reason)]
    if count > 0:
        facts = [f"first after {timings.time_to_first_token:.2f} s", *facts]
    if count > 1:
        of_them = f", {timings.reasoning_tokens} of them reasoning" if timings.reasoning_tokens else ""
        facts = [f"{count} tokens{of_them}", f"{timings.decode_tokens_per_second:.0f} tok/s", *facts]
    return f"({', '.join(facts)})"


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
    except (ValueError, RecursionError):
        parsed = value
    return dataclasses.replace(params, **{name: parsed})


def save(name: str, messages: Sequence[Message]) -> None:
    """Write a conversation to a file that does not exist yet.

    Raises:
        InputError: there is nothing to write, or the file is there already or cannot be written.
    """
    if all(message["role"] == "system" for message in messages):
        raise InputError("there is nothing to save yet: ask something first")
    if name.lower().endswith(".json"):
        text = json.dumps({"messages": list(messages)}, indent=2, ensure_ascii=False) + "\n"
    else:
        text = "\n\n".join(f"**{message['role']}**\n\n{message['content']}" for message in messages) + "\n"
    write_file(name, text)


def _is_text(text: str) -> bool:
    """Whether this is made of characters; Python reads bytes that are none as halves of surrogate pairs."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


@contextlib.contextmanager
def _watched(generation: Generation) -> Iterator[None]:
    """Ctrl-C ends the generation instead of the program, and keys pressed too early wait for the next line."""

    def stop(_signal: int, _frame: FrameType | None) -> None:
        generation.cancel()

    try:
        before = signal.signal(signal.SIGINT, stop)
    except ValueError:  # not in the main thread, where no Ctrl-C arrives
        yield
        return
    try:
        with without_echo():
            yield
    finally:
        signal.signal(signal.SIGINT, before)
