"""`tool_format_of`: finds how a chat template writes calls of tools, by rendering it with and without a call."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from typing import Any

from llm_edge.runtime.errors import TemplateError
from llm_edge.runtime.text.tool_format import ParameterFormat, ToolFormat

Render = Callable[..., str]
"""`render(messages, **variables)`: the text of a conversation."""

_NAMES = ("firstzqfunction", "secondzqfunction")
_KEYS = ("alphazqkey", "betazqkey")
_VALUES = ("gammazqvalue", "deltazqvalue", "epsilonzqvalue", "zetazqvalue")
_SAID = "thetazqcontent"
_USER = {"role": "user", "content": "iotazqquestion"}
_PARAMETERS = {"type": "object", "properties": {key: {"type": "string"} for key in _KEYS}}
_TOOLS = [
    {"type": "function", "function": {"name": name, "description": "kappazq", "parameters": _PARAMETERS}}
    for name in _NAMES
]


def tool_format_of(render: Render) -> ToolFormat | None:
    """The format of the calls that a template writes; None if it writes none, or in no form known here.

    Args:
        render: renders the template; raises TemplateError where it rejects a conversation.
    """
    one = _written(render, 1, 1)
    if one is None:
        return None
    name, values = _NAMES[0], _VALUES
    before, _, rest = one.partition(name)
    found = _json_arguments(rest, {_KEYS[0]: values[0]})
    wide = _written(render, 1, 2) or ""
    parameters: ParameterFormat | None = None
    item_separator, key_separator = ", ", ": "
    if found is not None:
        start, end = found
        between, after = rest[:start], rest[end:]
        styled = _styles(wide)
        if styled is None:
            return None
        item_separator, key_separator = styled
    else:
        split = _parameters(rest, wide.partition(name)[2])
        if split is None:
            return None
        between, parameters, after = split
    opening, begin, end_text, separator, closing = before, "", after, None, ""
    two = _written(render, 2, 1)
    inner = _between_calls(two, parameters, after) if two is not None else None
    if inner is not None:
        end_text = _common_start(after, inner)
        begin = _common_end(before, inner[len(end_text) :])
        separator = inner[len(end_text) : len(inner) - len(begin)]
        opening, closing = before[: len(before) - len(begin)], after[len(end_text) :]
    else:
        opening, begin = "", before
    made = ToolFormat(begin, between, end_text, opening, closing, separator, item_separator, key_separator, parameters)
    return made if made.trigger and len(made.prefix) <= 200 and "\x00" not in made.prefix else None


def _calls(count: int, arguments: int, *, as_text: bool) -> list[dict[str, Any]]:
    calls = []
    for number in range(count):
        values: Mapping[str, str] = dict(zip(_KEYS[:arguments], _VALUES[2 * number :], strict=False))
        given = json.dumps(values) if as_text else values
        call = {"type": "function", "function": {"name": _NAMES[number], "arguments": given}}
        calls.append({"id": f"call{number}aaaa", **call})
    return calls


def _written(render: Render, count: int, arguments: int) -> str | None:
    """What the template writes for an assistant message with calls, without the turn's frame; None if nothing."""
    try:
        start = render([_USER], tools=_TOOLS, add_generation_prompt=True)
        plain = render([_USER, {"role": "assistant", "content": _SAID}], tools=_TOOLS, add_generation_prompt=False)
    except TemplateError:
        return None
    for as_text in (False, True):
        message = {"role": "assistant", "content": "", "tool_calls": _calls(count, arguments, as_text=as_text)}
        try:
            full = render([_USER, message], tools=_TOOLS, add_generation_prompt=False)
        except TemplateError:
            continue
        at = full.rfind(_NAMES[0])
        shared = len(_common_start(full, start))
        if at < shared or not full[shared:].count(_NAMES[count - 1]):
            return None
        written = full[shared:]
        tail = plain.rpartition(_SAID)[2]
        ends = _common_end(written, tail)
        return written[: len(written) - len(ends)]
    return None


def _json_arguments(text: str, arguments: Mapping[str, str]) -> tuple[int, int] | None:
    """Where the JSON object of the arguments starts and ends in a text."""
    decoder = json.JSONDecoder()
    start = text.find("{")
    while start >= 0:
        try:
            value, end = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            value, end = None, start
        if value == arguments:
            return start, end
        start = text.find("{", start + 1)
    return None


def _styles(wide: str) -> tuple[str, str] | None:
    """The separators of the JSON of two arguments."""
    first, second = _KEYS
    marks = [f'"{first}"', f'"{_VALUES[0]}"', f'"{second}"', f'"{_VALUES[1]}"']
    places = [wide.rfind(mark) for mark in marks]
    if min(places) < 0 or places != sorted(places):
        return None
    key = wide[places[0] + len(marks[0]) : places[1]]
    item = wide[places[1] + len(marks[1]) : places[2]]
    return (item, key) if item.strip() == "," and key.strip() == ":" and "\n" not in item + key else None


def _parameters(rest: str, wide: str) -> tuple[str, ParameterFormat, str] | None:
    """The parts of a call whose arguments are written one by one: the text before them, their format, the end."""
    key, value, other = _KEYS[0], _VALUES[0], _KEYS[1]
    places = [rest.find(key), rest.find(value)]
    if min(places) < 0 or places != sorted(places):
        return None
    before, between = rest[: places[0]], rest[places[0] + len(key) : places[1]]
    after = rest[places[1] + len(value) :]
    inner = wide[wide.find(value) + len(value) : wide.find(other)] if other in wide else None
    if inner is None:
        return None
    end = _common_start(after, inner)
    begin = _common_end(before, inner[len(end) :])
    separator = inner[len(end) : len(inner) - len(begin)]
    quoted = between.endswith('"') and end.startswith('"')
    if quoted:
        between, end = between[:-1], end[1:]
        after = after[1:]
    made = ParameterFormat(begin, between, end, separator, quoted)
    return before[: len(before) - len(begin)], made, after[len(end) :]


def _between_calls(two: str, parameters: ParameterFormat | None, after: str) -> str | None:
    """The text between the arguments of a first call and the name of a second one."""
    value, name = _VALUES[0], _NAMES[1]
    start, end = two.find(value), two.rfind(name)
    if start < 0 or end < start:
        return None
    inner = two[start + len(value) : end]
    if parameters is not None:
        skipped = ('"' if parameters.quoted else "") + parameters.end
        return inner[len(skipped) :] if inner.startswith(skipped) else None
    closed = inner.find("}")
    return inner[closed + 1 :] if closed >= 0 and after else None


def _common_start(one: str, other: str) -> str:
    """The longest text that both start with."""
    pairs = zip(one, other, strict=False)
    end = next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
    return one[:end]


def _common_end(one: str, other: str) -> str:
    """The longest text that both end with."""
    return _common_start(one[::-1], other[::-1])[::-1]
