"""`Conversation`, and the formats of rows from which it is read.

    {"messages": [{"role": "user", "content": "…"}, …], "tools": […]}            OpenAI's and TRL's
    {"conversations": [{"from": "human", "value": "…"}, …], "system": "…"}       ShareGPT
    {"data": ["question", "answer", …]}                                         the original project's
    {"prompt": "…", "completion": "…"}                                          pairs; also as two lists of messages

Other keys of a row are ignored, except `chat_template_kwargs`: variables of the chat template, as TRL reads them.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from llm_edge.finetune.data.problems import RowError
from llm_edge.runtime.text.chat_template import REASONING_FIELDS

_ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant", "tool": "tool"}
_SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "assistant", "model"), "assistant"),
    **dict.fromkeys(("observation", "function_response", "tool"), "tool"),
    "system": "system",
    "function_call": "function_call",
}
_FOLLOWS = {  # role -> roles that may precede it; "" is the start
    "system": ("",),
    "user": ("", "system", "assistant"),
    "assistant": ("user", "tool"),
    "tool": ("assistant", "tool"),
}


@dataclass(frozen=True, slots=True)
class Conversation:
    """A conversation of a data file that ends with an answer.

    Attributes:
        messages: with the roles system, user, assistant and tool; reasoning is the field `reasoning_content`.
        trained: for each message, whether it is an answer to be learned.
        tools: JSON schemas of the tools, or None.
        variables: further variables of the chat template.
        pair: the row was a prompt and its completion, as plain text.
    """

    messages: tuple[Mapping[str, Any], ...]
    trained: tuple[bool, ...]
    tools: tuple[Any, ...] | None = None
    variables: Mapping[str, Any] | None = None
    pair: bool = False

    def key(self) -> bytes:
        """A digest that is equal for equal conversations."""
        content = [self.messages, self.trained, self.tools, self.variables]
        return hashlib.sha256(json.dumps(content, sort_keys=True, ensure_ascii=True).encode()).digest()[:16]


def parse_row(row: object) -> Conversation:
    """Read a row of any format; raises RowError."""
    if not isinstance(row, dict):
        raise RowError("not a JSON object")
    read = next((reader for keys, reader in _READERS if all(key in row for key in keys)), None)
    if read is None:
        raise RowError("unknown format: give messages, conversations, data, or prompt and completion")
    messages = read(row)
    variables = row.get("chat_template_kwargs")
    if not isinstance(variables, dict | None):
        raise RowError("chat_template_kwargs is not an object")
    checked = [_checked(message) for message in messages]
    _check_order([message["role"] for message in checked])
    trained = [_is_trained(message) for message in checked]
    if not any(trained):
        raise RowError("nothing to train: every answer has the weight 0")
    return Conversation(
        messages=tuple({key: value for key, value in message.items() if key != "weight"} for message in checked),
        trained=tuple(trained),
        tools=_tools(row),
        variables=variables,
        pair=isinstance(row.get("prompt"), str) and isinstance(row.get("completion"), str) and "messages" not in row,
    )


# ---- formats


def _read_messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return _messages(row["messages"], "messages")


def _read_sharegpt(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    entries = row["conversations"]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise RowError("conversations is not a list of objects")
    if any("role" in entry for entry in entries):  # OpenAI's messages under ShareGPT's key
        return _messages(entries, "conversations")
    messages = [_sharegpt_message(entry) for entry in entries]
    system = row.get("system")
    if isinstance(system, str) and system and not (messages and messages[0]["role"] == "system"):
        messages.insert(0, {"role": "system", "content": system})
    return messages


def _sharegpt_message(entry: Mapping[str, Any]) -> dict[str, Any]:
    role, value = _SHAREGPT_ROLES.get(str(entry.get("from"))), entry.get("value")
    if role is None:
        raise RowError("conversations: 'from' is not human, gpt, system, function_call or observation")
    if not isinstance(value, str):
        raise RowError("conversations: 'value' is not a text")
    if role != "function_call":
        rest = {key: item for key, item in entry.items() if key in (*REASONING_FIELDS, "weight")}
        return {"role": role, "content": value, **rest}
    try:
        calls = json.loads(value)
        functions = [{"name": call["name"], "arguments": call["arguments"]} for call in _listed(calls)]
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise RowError("conversations: a function_call is not JSON with name and arguments") from error
    calls = [{"type": "function", "function": function} for function in functions]
    return {"role": "assistant", "content": "", "tool_calls": calls}


def _read_original(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    texts = row["data"]
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RowError("data is not a list of texts")
    if not texts or len(texts) % 2:
        raise RowError("data has an odd number of texts: give question and answer in turn")
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]


def _read_pair(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        return [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
    if isinstance(prompt, list) and isinstance(completion, list):
        before = [{**message, "weight": 0} for message in _messages(prompt, "prompt")]  # as in TRL: a prompt is masked
        return [*before, *_messages(completion, "completion")]
    raise RowError("prompt and completion are neither two texts nor two lists of messages")


_READERS: tuple[tuple[tuple[str, ...], Callable[[Mapping[str, Any]], list[dict[str, Any]]]], ...] = (
    (("messages",), _read_messages),
    (("conversations",), _read_sharegpt),
    (("data",), _read_original),
    (("prompt", "completion"), _read_pair),
)


# ---- checks


def _messages(value: object, name: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(message, dict) for message in value):
        raise RowError(f"{name} is not a list of messages")
    if not value:
        raise RowError(f"{name} is empty")
    return [dict(message) for message in value]


def _checked(message: dict[str, Any]) -> dict[str, Any]:
    """A message with a known role, text as content, and its reasoning as `reasoning_content`."""
    role = _ROLES.get(message["role"]) if isinstance(message.get("role"), str) else None
    if role is None:
        raise RowError("a message without role system, user, assistant or tool")
    content = _text(message.get("content"))
    reasoning = [message[name] for name in REASONING_FIELDS if message.get(name) is not None]
    if any(not isinstance(text, str) for text in reasoning):
        raise RowError("reasoning that is not a text")
    rest = {
        key: value
        for key, value in message.items()
        if key not in (*REASONING_FIELDS, "role", "content") and value is not None
    }
    _check_tool_calls(rest.get("tool_calls"))
    checked = {"role": role, "content": content, **rest}
    if reasoning and reasoning[0].strip() and role == "assistant":
        checked["reasoning_content"] = reasoning[0].strip()
    if not content.strip() and role == "assistant" and not rest.get("tool_calls"):
        raise RowError("an answer is empty")
    if not content.strip() and role == "user":
        raise RowError("a question is empty")
    return checked


def _text(content: object) -> str:
    """The content of a message, given as text or as parts of the type text."""
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        content = "".join(part["text"] for part in content)
    if not isinstance(content, str | None):
        raise RowError("a message whose content is not a text")
    text = content or ""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise RowError("a lone surrogate, which is not a character") from error
    return text


def _check_tool_calls(calls: object) -> None:
    if calls is None:
        return
    for call in calls if isinstance(calls, list) else [None]:
        function = call.get("function", call) if isinstance(call, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise RowError("tool_calls is not a list of calls with the name of a function")


def _check_order(roles: Sequence[str]) -> None:
    before = ""
    for role in roles:
        if before not in _FOLLOWS[role]:
            where = f"after {before}" if before else "first"
            raise RowError(f"roles out of order: {role} {where}")
        before = role
    if before != "assistant":
        raise RowError(f"no answer: the last message is of the role {before}")


def _is_trained(message: Mapping[str, Any]) -> bool:
    weight = message.get("weight", 1)
    if isinstance(weight, bool) or weight not in (0, 1):
        raise RowError("a weight that is neither 0 nor 1")
    return bool(message["role"] == "assistant" and weight)


def _tools(row: Mapping[str, Any]) -> tuple[Any, ...] | None:
    tools = row.get("tools")
    if isinstance(tools, str):  # as datasets store them whose columns have one type
        try:
            tools = json.loads(tools) if tools.strip() else None
        except (ValueError, RecursionError) as error:
            raise RowError("tools is a text that is not JSON") from error
    if tools is not None and (not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools)):
        raise RowError("tools is not a list of JSON schemas")
    return tuple(tools) if tools else None


def _listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
