"""The slash commands of a chat: `COMMANDS`, and `run_command`, which executes a line."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from llm_edge.chat.history.transcript import save
from llm_edge.chat.parameters import EDITABLE, ChatParameters
from llm_edge.chat.session import ChatSession
from llm_edge.runtime.errors import ParameterError


@dataclass(frozen=True, slots=True)
class Command:
    """A slash command."""

    name: str  # with its slash
    argument: str  # what follows the name, as the help shows it; "" = nothing
    help: str  # one line
    run: Callable[[ChatSession, str], str]  # executes it with its argument, and returns what to show


def run_command(session: ChatSession, line: str) -> str:
    """Execute a line that starts with a slash; returns what to show.

    Raises:
        ParameterError: unknown command, or an argument that it does not take.
        LlmEdgeError: the command failed.
    """
    name, _, argument = line.partition(" ")
    command = COMMANDS.get(name)
    if command is None:
        raise ParameterError(f"{name}: unknown command; /help lists them")
    return command.run(session, argument.strip())


def help_lines() -> list[tuple[str, str]]:
    """Every command with its argument, and its help."""
    return [(f"{command.name} {command.argument}".strip(), command.help) for command in COMMANDS.values()]


def _set(session: ChatSession, argument: str) -> str:
    match = re.fullmatch(r"(\w+)[\s=]\s*=?\s*(.+)", argument)
    if match is None:
        raise ParameterError("/set needs a name and a value, for example: /set temperature 0.3")
    name, value = match.groups()
    session.apply_change(lambda parameters: parameters.set_text(name, value))
    return f"{name} = {_shown(session.parameters, name)}"


def _params(session: ChatSession, _argument: str) -> str:
    names = [*EDITABLE, *(name for name in session.parameters.changed if name not in EDITABLE)]
    return "\n".join(f"{name} = {_shown(session.parameters, name)}" for name in names)


def _reset(session: ChatSession, _argument: str) -> str:
    session.reset_parameters()
    return "(parameters restored)"


def _think(session: ChatSession, argument: str) -> str:
    if argument in ("show", "hide"):
        session.show_reasoning = argument == "show"
        return "(reasoning is shown)" if session.show_reasoning else "(reasoning is hidden)"
    if argument in ("on", "off"):
        session.thinking = argument == "on"
        return f"(reasoning is requested {argument})"
    raise ParameterError("/think needs one of: show, hide, on, off")


def _save(session: ChatSession, argument: str) -> str:
    if not argument:
        raise ParameterError("/save needs a file name, for example: /save talk.md")
    save(argument, session.conversation)
    return f"saved to {argument}"


def _help(_session: ChatSession, _argument: str) -> str:
    return format_help(help_lines())


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
        Command("/set", "NAME VALUE", "change a parameter, for example: /set temperature 0.3", _set),
        Command("/params", "", "show the parameters", _params),
        Command("/reset", "", "restore the parameters that the chat started with", _reset),
        Command("/think", "show|hide|on|off", "show or hide reasoning; request it on or off, if the model can", _think),
        Command("/save", "FILE", "save the conversation to a new file (.json, else Markdown)", _save),
        Command("/help", "", "show this help", _help),
    )
}
"""The commands by name, in the order in which the help lists them."""
