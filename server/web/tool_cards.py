"""`find_calls`: the calls of tools in the text of an answer, in the formats that chat templates write."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace

from llm_edge.runtime.text.tool_call_parser import CallArguments, CallStarted, ToolCallParser
from llm_edge.runtime.text.tool_format import GENERIC, ParameterFormat, ToolFormat

_JSON_LIST = ToolFormat('{"name": "', '", "arguments": ', "}", "[", "]", ", ")
_XML = ToolFormat(
    begin="<tool_call>\n<function=",
    between=">\n",
    end="</function>\n</tool_call>",
    separator="\n",
    parameters=ParameterFormat("<parameter=", ">\n", "\n</parameter>\n"),
)
# Formats that begin with a tag, which no other text contains; the longer prefix first.
_TAGGED = (_XML, GENERIC, replace(_JSON_LIST, opening="[TOOL_CALLS]["))
# Formats that other text may begin like, so only whole answers in them are calls. Mistral's tag is a special token,
# which is not part of the text of an answer.
_UNTAGGED = (
    (re.compile(r'\{"name": "'), ToolFormat('{"name": "', '", "parameters": ', "}")),
    (re.compile(r'\[\{"name": "'), _JSON_LIST),
    (
        re.compile(r"\[[A-Za-z_][\w.]*\("),
        ToolFormat("", "(", ")", "[", "]", ", ", parameters=ParameterFormat("", "=", "", ", ", quoted=True)),
    ),
)


@dataclass
class ShownCall:
    """A call; `arguments` is JSON, or the text so far of a call that is not complete."""

    name: str
    arguments: str = ""


def find_calls(text: str) -> tuple[str, Sequence[ShownCall | str]]:
    """The text before the first call, and the calls with the texts between them; none = there is no call."""
    starts = [(at, form) for form in _TAGGED if (at := text.find(form.trigger)) >= 0]
    for at, form in starts:
        parts, unfinished = _parsed(text[at:], form)
        if any(isinstance(part, ShownCall) for part in parts):
            if unfinished and isinstance(parts[-1], ShownCall):
                parts[-1].arguments += unfinished
            return text[:at].rstrip(), parts
    if starts:
        at = min(at for at, _ in starts)
        return text[:at].rstrip(), [ShownCall("", text[at:])]
    for pattern, form in _UNTAGGED:
        if pattern.match(text.lstrip()):
            parts, unfinished = _parsed(text.strip(), form)
            if parts and unfinished is None and all(isinstance(part, ShownCall) for part in parts):
                return "", parts
    return text, ()


def _parsed(text: str, form: ToolFormat) -> tuple[list[ShownCall | str], str | None]:
    """The calls and texts, and the part of the last call that is not complete; None = it is."""
    parser = ToolCallParser(form)
    parts: list[ShownCall | str] = []
    for part in parser.feed(text):
        match part:
            case CallStarted(name):
                parts.append(ShownCall(name))
            case CallArguments(more):
                call = parts[-1]
                assert isinstance(call, ShownCall)
                call.arguments += more
            case str() if part.strip():
                parts.append(part)
    return parts, parser.unfinished
