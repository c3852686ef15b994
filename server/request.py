"""`ChatRequest` and `TextRequest`: what every protocol's request becomes before it reaches a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from llm_edge.runtime.sampling.constraint import Constraint
from llm_edge.runtime.sampling.params import PARAMETERS
from llm_edge.server.errors import invalid

MAX_CHOICES = 16
# Tokens of reasoning that an effort allows; None = no limit.
EFFORTS: Mapping[str, int | None] = {
    "none": 0, "minimal": 128, "low": 512, "medium": 2048, "high": None, "xhigh": None, "max": None,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Tool:
    """A function that the model may call; `parameters` is the JSON schema of its arguments."""

    name: str
    description: str
    parameters: Mapping[str, Any]

    def to_json(self) -> dict[str, Any]:
        """The form that chat templates expect."""
        function = {"name": self.name, "description": self.description, "parameters": self.parameters}
        return {"type": "function", "function": function}


@dataclass(frozen=True, slots=True)
class ToolUse:
    """Which tools the model may and must call.

    Attributes:
        tools: the functions.
        choice: "auto", "none" or "required".
        only: the one function that has to be called; `choice` is then "required".
        parallel: several calls in one answer are allowed.
    """

    tools: tuple[Tool, ...] = ()
    choice: str = "auto"
    only: str | None = None
    parallel: bool = True

    @property
    def callable(self) -> tuple[Tool, ...]:
        """The functions that this answer may call."""
        if self.choice == "none":
            return ()
        return tuple(tool for tool in self.tools if self.only in (None, tool.name))


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A conversation to be answered.

    Attributes:
        model: name of the model; "" = the default.
        messages: as chat templates expect them; if the last is the assistant's, the answer continues it.
        overrides: sampling parameters that differ from the model's defaults, by name.
        tool_use: the tools.
        count: number of answers.
        template_variables: further variables of the chat template.
    """

    model: str
    messages: Sequence[Mapping[str, Any]]
    overrides: Mapping[str, Any] = field(default_factory=dict)
    tool_use: ToolUse = ToolUse()
    count: int = 1
    template_variables: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class TextRequest:
    """A text, or its token ids, to be continued; fields as in `ChatRequest`."""

    model: str
    prompt: str | Sequence[int]
    overrides: Mapping[str, Any] = field(default_factory=dict)
    count: int = 1


def sampling_overrides(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The sampling parameters in a request body, by our name.

    Every parameter is accepted under its own name and under OpenAI's and llama-server's; null means not given. Besides
    these: `max_completion_tokens`, `ignore_eos`, `grammar`, `regex` and `response_format`.
    """
    found: dict[str, Any] = {}
    for name, spec in PARAMETERS.items():
        if name in ("constraint", "logprobs"):  # `logprobs` means different things in different protocols
            continue
        for key in (spec.api.llamacpp, spec.api.openai, name):
            if key is not None and fields.get(key) is not None:
                found[name] = fields[key]
    if fields.get("max_completion_tokens") is not None:
        found["max_tokens"] = fields["max_completion_tokens"]
    if found.get("stop") == [] or found.get("stop") == "":
        del found["stop"]
    if fields.get("ignore_eos"):
        found["min_tokens"] = found.get("max_tokens", PARAMETERS["min_tokens"].default)
    constraint = constraint_of(fields)
    if constraint is not None:
        found["constraint"] = constraint
    return found


def constraint_of(fields: Mapping[str, Any]) -> Constraint | None:
    """The constraint that a body requests with `response_format`, `json_schema`, `grammar` or `regex`."""
    given = [name for name in ("response_format", "json_schema", "grammar", "regex") if fields.get(name)]
    if not given:
        return None
    if len(given) > 1:
        raise invalid(f"{' and '.join(given)} exclude each other: give one of them", given[1])
    name, value = given[0], fields[given[0]]
    match name:
        case "response_format":
            return _response_format(value)
        case "json_schema":
            return Constraint.json_schema(value)
        case "grammar":
            return Constraint.lark(_lark(value))
        case _:
            return Constraint.regex(value)


def _response_format(value: Any) -> Constraint | None:
    if not isinstance(value, Mapping):
        raise invalid("response_format: give an object with a type", "response_format")
    match value.get("type"):
        case "text":
            return None
        case "json_object":
            return Constraint.json_schema(value["schema"]) if value.get("schema") else Constraint.json()
        case "json_schema":
            wrapper = value.get("json_schema", value)  # Responses has no inner object
            schema = wrapper.get("schema") if isinstance(wrapper, Mapping) else None
            if not isinstance(schema, Mapping):
                raise invalid("response_format: json_schema needs a schema, a JSON object", "response_format")
            return Constraint.json_schema(schema)
        case other:
            raise invalid(f"response_format.type is {other!r}: use text, json_object or json_schema", "response_format")


def _lark(grammar: Any) -> str:
    """A grammar in llguidance's Lark; llama.cpp's GBNF is translated."""
    if not isinstance(grammar, str):
        raise invalid("grammar: give the text of a Lark or GBNF grammar", "grammar")
    if "::=" not in grammar:
        return grammar
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return gbnf_to_lark(grammar)
    except Exception as error:
        raise invalid(f"grammar: not GBNF: {error}", "grammar") from error


def reasoning_overrides(effort: Any, budget: Any = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sampling overrides and template variables for an effort (`none` to `max`) or a budget in tokens."""
    if effort is None and budget is None:
        return {}, {}
    if effort is not None and effort not in EFFORTS:
        raise invalid(f"reasoning effort is {effort!r}: use one of {', '.join(EFFORTS)}", "reasoning_effort")
    tokens = budget if budget is not None else EFFORTS[effort]
    variables: dict[str, Any] = {"enable_thinking": tokens != 0}
    if effort is not None:
        variables["reasoning_effort"] = effort
    return ({} if tokens is None else {"reasoning_budget": tokens}), variables


def choices(value: Any) -> int:
    """The number of answers a request asks for."""
    if value is None:
        return 1
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= MAX_CHOICES:
        raise invalid(f"n is {value!r}: use 1 to {MAX_CHOICES}", "n")
    return value
