"""Turns the messages of OpenAI-style requests into those that chat templates expect."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from llm_edge.server.errors import invalid
from llm_edge.server.request import Tool, ToolUse

_ROLES = {"developer": "system", "function": "tool"}
_TEXT_PARTS = ("text", "input_text", "output_text", "refusal")


def chat_messages(messages: Any) -> list[dict[str, Any]]:
    """Messages as chat templates expect them: contents are strings, and arguments of calls are objects.

    `developer` becomes `system`. Reasoning is accepted as `reasoning_content`, `reasoning` and `thinking`.

    Raises:
        ApiError: a message is malformed, or has content other than text.
    """
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise invalid("messages: give a list of at least one message", "messages")
    names: dict[str, str] = {}  # of the functions called, by the call's id
    return [_message(message, f"messages.{number}", names) for number, message in enumerate(messages)]


def _message(message: Any, where: str, names: dict[str, str]) -> dict[str, Any]:
    if not isinstance(message, Mapping):
        raise invalid(f"{where}: give an object with a role and content", where)
    role = message.get("role")
    if not isinstance(role, str) or not role:
        raise invalid(f"{where}.role: give a string, such as user", f"{where}.role")
    role = _ROLES.get(role, role)
    result: dict[str, Any] = {"role": role, "content": text_of(message.get("content"), f"{where}.content")}
    if role == "assistant":
        reasoning = next((message[k] for k in ("reasoning_content", "reasoning", "thinking") if message.get(k)), None)
        if isinstance(reasoning, str):
            result["reasoning_content"] = reasoning
        calls = _calls(message.get("tool_calls"), f"{where}.tool_calls")
        if calls:
            result["tool_calls"] = calls
            names.update({call["id"]: call["function"]["name"] for call in calls if "id" in call})
    elif role == "tool":
        call = message.get("tool_call_id")
        if isinstance(call, str):
            result["tool_call_id"] = call
        name = message.get("name") or message.get("tool_name") or names.get(call if isinstance(call, str) else "")
        if isinstance(name, str):
            result["name"] = name
    elif message.get("content") is None:
        raise invalid(f"{where}.content: give a string", f"{where}.content")
    return result


def text_of(content: Any, where: str) -> str:
    """The text of a content field: a string, null, or a list of text parts."""
    if content is None:
        return ""
    if isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise invalid(f"{where}: give a string or a list of parts", where)
    texts = []
    for number, part in enumerate(content):
        place = f"{where}.{number}"
        if isinstance(part, str):
            texts.append(part)
            continue
        if not isinstance(part, Mapping):
            raise invalid(f"{place}: give an object with a type", place)
        if part.get("type") not in _TEXT_PARTS:
            raise invalid(f"{place}: the model reads text only, not {str(part.get('type'))[:40]!r}", place)
        text = part.get("text", part.get("refusal"))
        if not isinstance(text, str):
            raise invalid(f"{place}.text: give a string", place)
        texts.append(text)
    return "".join(texts)


def _calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if calls is None:
        return []
    if not isinstance(calls, Sequence) or isinstance(calls, str):
        raise invalid(f"{where}: give a list", where)
    return [_call(call, f"{where}.{number}") for number, call in enumerate(calls)]


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise invalid(f"{where}: give a function with a name and arguments", where)
    found: dict[str, Any] = {
        "type": "function",
        "function": {"name": function["name"], "arguments": arguments_of(function.get("arguments"))},
    }
    if isinstance(call.get("id"), str):
        found["id"] = call["id"]
    return found


def arguments_of(value: Any) -> dict[str, Any]:
    """The arguments of a call as an object; a text that is not a JSON object is kept under the key `arguments`."""
    if isinstance(value, Mapping):
        return dict(value)
    if value is None or value == "":
        return {}
    try:
        parsed = json.loads(value)
    except (TypeError, ValueError, RecursionError):
        parsed = None
    return parsed if isinstance(parsed, dict) else {"arguments": value if isinstance(value, str) else str(value)}


def tool_use(tools: Any, choice: Any, parallel: Any = None) -> ToolUse:
    """The tools of an OpenAI-style request; entries that are not functions are ignored.

    Args:
        tools: `[{"type": "function", "function": {...}}]`, or with the function's fields beside the type.
        choice: "auto", "none", "required", or an object that names a function.
        parallel: `parallel_tool_calls`.

    Raises:
        ApiError: malformed, or the chosen function is not among the tools.
    """
    if tools is not None and (not isinstance(tools, Sequence) or isinstance(tools, str)):
        raise invalid("tools: give a list", "tools")
    found = tuple(tool for number, entry in enumerate(tools or ()) if (tool := _tool(entry, f"tools.{number}")))
    names = [tool.name for tool in found]
    if len(set(names)) < len(names):
        raise invalid("tools: two functions have the same name", "tools")
    only = None
    if isinstance(choice, Mapping):
        function = choice.get("function", choice)
        only = function.get("name") if isinstance(function, Mapping) else None
        if only not in names:
            raise invalid(f"tool_choice names {only!r}, which is not among the tools", "tool_choice")
        choice = "required"
    choice = "auto" if choice is None else "required" if choice == "any" else choice
    if choice not in ("auto", "none", "required"):
        raise invalid(f"tool_choice is {choice!r}: use auto, none, required or a function", "tool_choice")
    if choice == "required" and not found:
        raise invalid("tool_choice requires a call, but there are no tools", "tool_choice")
    return ToolUse(found, choice, only, parallel is not False)


def _tool(entry: Any, where: str) -> Tool | None:
    if not isinstance(entry, Mapping):
        raise invalid(f"{where}: give an object", where)
    if entry.get("type", "function") not in ("function", "custom_function"):
        return None  # built-in tools of other services
    function = entry.get("function", entry)
    name = function.get("name") if isinstance(function, Mapping) else None
    if not isinstance(name, str) or not name or len(name) > 256:
        raise invalid(f"{where}.function.name: give a string of 1 to 256 characters", where)
    parameters = function.get("parameters", function.get("input_schema"))
    if parameters is None:
        parameters = {"type": "object", "properties": {}}
    if not isinstance(parameters, Mapping):
        raise invalid(f"{where}.function.parameters: give a JSON schema, an object", where)
    description = function.get("description")
    return Tool(name, description if isinstance(description, str) else "", dict(parameters))
