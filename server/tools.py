"""Tool calls of a request: what the model is plain, the constraint on its answer, and the events of its calls."""

from __future__ import annotations

import json
import secrets
import string
from collections.abc import Mapping, Sequence
from typing import Any

from llm_edge.runtime.results import GenerationChunk
from llm_edge.runtime.sampling.constraint import Constraint
from llm_edge.runtime.sampling.tool_grammar import tool_constraint
from llm_edge.runtime.text.tokenizer import Tokenizer
from llm_edge.runtime.text.tool_call_parser import CallStarted, ToolCallParser, text_types
from llm_edge.runtime.text.tool_format import ToolFormat
from llm_edge.server.events import Event, TextDelta, ToolCallDelta, ToolCallStarted
from llm_edge.server.request import Tool, ToolUse

_ALPHABET = string.ascii_letters + string.digits
_ID_LENGTH = 9  # Mistral's templates accept no other

_INSTRUCTIONS = """You can call functions. Their signatures, as JSON schemas:
{tools}
To call one, write exactly this and nothing else:
<tool_call>
{{"name": "NAME", "arguments": {{...}}}}
</tool_call>"""


def constraint_for(
    form: ToolFormat, use: ToolUse, tokenizer: Tokenizer, otherwise: Constraint | None
) -> Constraint | None:
    """The constraint on an answer; `otherwise` = the one that was requested besides."""
    if not use.callable:
        return otherwise
    tools = [(tool.name, tool.parameters) for tool in use.callable]
    required = use.choice == "required"
    return tool_constraint(
        form, tools, special_texts(tokenizer), required=required, parallel=use.parallel, otherwise=otherwise
    )


def special_texts(tokenizer: Tokenizer) -> dict[str, int]:
    """The special tokens of a vocabulary by their text."""
    return {text: number for number in tokenizer.special_ids if (text := tokenizer.token_text(number))}


def with_instructions(messages: Sequence[Mapping[str, Any]], tools: Sequence[Tool]) -> list[Mapping[str, Any]]:
    """Messages for a template without tools: the system message lists them, and calls and results become text."""
    written = list(map(_as_text, messages))
    if not tools:
        return written
    text = _INSTRUCTIONS.format(tools="\n".join(json.dumps(tool.to_json(), ensure_ascii=False) for tool in tools))
    if written and written[0]["role"] == "system":
        return [{**written[0], "content": f"{written[0]['content']}\n\n{text}"}, *written[1:]]
    return [{"role": "system", "content": text}, *written]


def _as_text(message: Mapping[str, Any]) -> Mapping[str, Any]:
    if message["role"] == "tool":
        return {"role": "user", "content": f"<tool_response>\n{message['content']}\n</tool_response>"}
    if message.get("tool_calls"):
        calls = [json.dumps(call["function"], ensure_ascii=False) for call in message["tool_calls"]]
        written = [f"<tool_call>\n{call}\n</tool_call>" for call in calls]
        plain = {name: value for name, value in message.items() if name != "tool_calls"}
        return {**plain, "content": "\n".join(filter(None, (message.get("content"), *written)))}
    return message


class CallEvents:
    """Turns the text of one choice into events of text and calls."""

    def __init__(self, choice: int, form: ToolFormat, use: ToolUse, tokenizer: Tokenizer) -> None:
        self._choice = choice
        self._parser = ToolCallParser(form, text_types({tool.name: tool.parameters for tool in use.callable}))
        written = json.dumps(form.to_json())
        specials = special_texts(tokenizer).items()
        self._spelled = {number: text for text, number in specials if json.dumps(text)[1:-1] in written}
        self._count = 0

    @property
    def called(self) -> bool:
        """Whether a tool has been called."""
        return self._count > 0

    def feed(self, chunk: GenerationChunk) -> list[Event]:
        """The events of a chunk of the answer proper."""
        text = chunk.text + self._spelled.get(-1 if chunk.token is None else chunk.token, "")
        events = self._events(self._parser.feed(text))
        if chunk.finish_reason is not None:
            events += self._events(self._parser.finish())
        if chunk.logprob is not None:
            events.append(TextDelta(self._choice, "", (chunk.logprob,)))
        return events

    def _events(self, parts: Sequence[Any]) -> list[Event]:
        events: list[Event] = []
        for part in parts:
            if isinstance(part, str):
                events.append(TextDelta(self._choice, part))
            elif isinstance(part, CallStarted):
                events.append(ToolCallStarted(self._choice, self._count, new_call_id(), part.name))
                self._count += 1
            else:
                events.append(ToolCallDelta(self._choice, self._count - 1, part.text))
        return events


def new_call_id() -> str:
    """A new id of a call."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(_ID_LENGTH))
