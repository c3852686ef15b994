"""The slash commands of a chat: `COMMANDS`, and `run_command`, which executes a line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from llm_edge.chat.history.transcript import save
from llm_edge.chat.parameters import EDITABLE, ChatParameters
from llm_edge.chat.session import ChatSession
from llm_edge.runtime.errors import ParameterError

_COMMAND = re.compile(r"/[A-Za-z]+(?=\s|$)|/\?(?=\s|$)")


class CommandHost(Protocol):
    """What a front end does for the commands.

    Attributes:
        session: the chat.
    """

    session: ChatSession

    def show_help(self) -> str:
        """Show the commands and keys, or return them."""

    def new(self) -> str:
        """Start a new conversation."""

    def regenerate(self) -> None:
        """Answer the last question again."""

    def continue_answer(self) -> None:
        """Continue the last answer."""

    def choose_model(self, name: str) -> str:
        """Load a model by its name; without one, offer or list the models."""

    def attach(self, path: str) -> str:
        """Attach a file to the next question."""

    def edit(self, text: str) -> None:
        """Write the next question in the user's editor, starting from a text."""

    def leave(self) -> None:
        """End the chat."""


@dataclass(frozen=True, slots=True)
class Command:
    """A slash command."""

    name: str  # with its slash
    argument: str  # what follows the name, as the help shows it; "" = nothing
    help: str  # one line
    run: Callable[[CommandHost, str], str]  # executes it with its argument, and returns what to show


def is_command(text: str) -> bool:
    """Whether a text is meant as a command; a path such as `/etc/hosts` is not."""
    return _COMMAND.match(text) is not None


def run_command(host: CommandHost, line: str) -> str:
    """Execute a line that starts with a slash; returns what to show.

    Raises:
        ParameterError: unknown command, or an argument that it does not take.
        LlmEdgeError: the command failed.
    """
    name, _, argument = line.strip().partition(" ")
    command = COMMANDS.get(_ALIASES.get(name, name))
    if command is None:
        raise ParameterError(f"{name}: unknown command; /help lists them")
    return command.run(host, argument.strip())


def help_lines() -> list[tuple[str, str]]:
    """Every command with its argument, and its help."""
    return [(f"{command.name} {command.argument}".strip(), command.help) for command in COMMANDS.values()]


def _set(host: CommandHost, argument: str) -> str:
    match = re.fullmatch(r"(\w+)[\s=]\s*=?\s*(.+)", argument, re.DOTALL)
    if match is None:
        raise ParameterError("/set needs a name and a value, for example: /set temperature 0.3")
    name, value = match.groups()
    host.session.apply_change(lambda parameters: parameters.set_text(name, value))
    return f"{name} = {_shown(host.session.parameters, name)}"


def _params(host: CommandHost, _argument: str) -> str:
    parameters = host.session.parameters
    names = [*EDITABLE, *(name for name in parameters.changed if name not in EDITABLE)]
    return "\n".join(f"{name} = {_shown(parameters, name)}" for name in names)


def _reset(host: CommandHost, _argument: str) -> str:
    host.session.reset_parameters()
    return "(parameters restored)"


def _system(host: CommandHost, argument: str) -> str:
    if argument:
        text = "" if argument == "off" else argument
        host.session.apply_change(lambda parameters: parameters.set("system", text))
    return f"system = {_shown(host.session.parameters, 'system') or '(none)'}"


def _think(host: CommandHost, argument: str) -> str:
    session = host.session
    if argument in ("show", "hide"):
        session.show_reasoning = argument == "show"
        return "(reasoning is shown)" if session.show_reasoning else "(reasoning is hidden)"
    if argument in ("on", "off"):
        session.thinking = argument == "on"
        return f"(reasoning is requested {argument})"
    raise ParameterError("/think needs one of: show, hide, on, off")


def _save(host: CommandHost, argument: str) -> str:
    if not argument:
        raise ParameterError("/save needs a file name, for example: /save talk.md")
    save(argument, host.session.conversation)
    return f"saved to {argument}"


def _title(host: CommandHost, argument: str) -> str:
    conversation = host.session.conversation
    if argument:
        host.session.rename(conversation.id, argument)
    return f"title = {conversation.title or '(none)'}"


def _file(host: CommandHost, argument: str) -> str:
    if not argument:
        raise ParameterError("/file needs a path, for example: /file notes.txt")
    unquoted = re.fullmatch(r"\"(.+)\"|'(.+)'", argument)
    return host.attach(unquoted[1] or unquoted[2] if unquoted else argument)


def _model(host: CommandHost, argument: str) -> str:
    return host.choose_model(argument)


def _regenerate(host: CommandHost, _argument: str) -> str:
    host.regenerate()
    return ""


def _continue(host: CommandHost, _argument: str) -> str:
    host.continue_answer()
    return ""


def _edit(host: CommandHost, argument: str) -> str:
    host.edit(argument)
    return ""


def _quit(host: CommandHost, _argument: str) -> str:
    host.leave()
    return ""


def format_help(lines: list[tuple[str, str]]) -> str:
    """Lines of help in two columns."""
    width = max(len(usage) for usage, _ in lines)
    return "\n".join(f"{usage:{width}}  {text}" for usage, text in lines)


def _shown(parameters: ChatParameters, name: str) -> str:
    """A value in one line, as `/set` takes it."""
    value = parameters.value(name)
    if isinstance(value, (list, dict)):
        return json.dumps(value, ensure_ascii=False)
    return parameters.text(name).replace("\n", "\\n")


COMMANDS = {
    command.name: command
    for command in (
        Command("/file", "PATH", "attach a text file to the next question", _file),
        Command("/edit", "", "write the next question in $EDITOR", _edit),
        Command("/regenerate", "", "answer the last question again", _regenerate),
        Command("/continue", "", "continue the last answer", _continue),
        Command("/new", "", "start a new conversation", lambda host, _: host.new()),
        Command(
            "/model", "NAME", "use another model; without a name, list them", lambda host, name: host.choose_model(name)
        ),
        Command("/system", "TEXT", "change the system prompt; without a text, show it; off removes it", _system),
        Command("/set", "NAME VALUE", "change a parameter, for example: /set temperature 0.3", _set),
        Command("/params", "", "show the parameters", _params),
        Command("/reset", "", "restore the parameters that the chat started with", _reset),
        Command("/think", "show|hide|on|off", "show or hide reasoning; request it on or off, if the model can", _think),
        Command("/title", "TEXT", "rename the conversation; without a text, show its title", _title),
        Command("/save", "FILE", "save the conversation to a new file (.json, else Markdown)", _save),
        Command("/help", "", "show this help", lambda host, _: host.show_help()),
        Command("/quit", "", "leave", _quit),
    )
}
"""The commands by name, in the order in which the help lists them."""

_ALIASES = {"/exit": "/quit", "/?": "/help", "/retry": "/regenerate", "/clear": "/new", "/models": "/model"}
