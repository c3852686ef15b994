"""The parser of tool calls against the fixtures of canitoolcall, for the formats that chat templates of ours have."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest
from canitoolcall.fixtures import Fixture, default_fixtures_dir, load_fixtures

from llm_edge.runtime.text.tool_call_parser import CallStarted, ToolCallParser, text_types
from llm_edge.runtime.text.tool_format import GENERIC, ParameterFormat, ToolFormat

JSON = ('{"name": "', '", "arguments": ', "}")
FORMATS = {
    "qwen3-hermes": GENERIC,
    "qwen3-xml": ToolFormat(
        "<tool_call>\n<function=",
        ">\n",
        "</function>\n</tool_call>",
        separator="\n",
        parameters=ParameterFormat("<parameter=", ">\n", "\n</parameter>\n"),
    ),
    "llama-json": ToolFormat('{"name": "', '", "parameters": ', "}"),
    "llama-pythonic": ToolFormat(
        "", "(", ")", "[", "]", ", ", parameters=ParameterFormat("", "=", "", ", ", quoted=True)
    ),
    "mistral-v3": ToolFormat(*JSON, "[TOOL_CALLS] [", "]", ", "),
    "mistral-v11": ToolFormat("[TOOL_CALLS]", "[ARGS]", "", separator=""),
}
# Fixtures of texts that answers cannot contain, because a grammar holds them to the template's own form.
OTHER_FORMS = {
    "malformed": "parts of the format are missing",
    "x-no-newlines": "without the line breaks of the template",
    "x-python-literals": "True and False instead of JSON",
    "x-key-order": "arguments before the name",
    "x-arguments-key": "another key than the template's",
    "x-python-tag-prefix": "special tokens are not part of the text",
    "x-extra-type-key": "a further key",
    "x-v11-call-id": "ids of calls, which have no place in our record of formats",
    "x-marker-in-reasoning": "reasoning is separated before",
}
OTHER_FIXTURES = {
    "qwen3-xml/bug-coder-number-outside-int64": "without the line breaks of the template",
    "qwen3-xml/q38-numeric-and-literal-arguments": "null where a string may be: the text null is kept",
    "qwen3-xml/coder-next-json-literals": "as before",
    "mistral/vllm-v3-no-space": "without the spaces of the template",
    "mistral/vllm-v3-parallel": "as before",
    "mistral/vllm-v3-content-before-call": "as before",
}


def form_of(fixture: Fixture) -> str | None:
    tags = fixture.tags
    if fixture.expected is None or fixture.id in OTHER_FIXTURES or not OTHER_FORMS.keys().isdisjoint(tags):
        return None
    if "truncated" in tags:  # an answer that ends within a call has that call
        return None
    match fixture.family:
        case "llama":
            form = "llama-pythonic" if "x-llama-pythonic" in tags else "llama-json"
            return None if form == "llama-pythonic" and "'" in fixture.raw_output else form  # JSON has no such strings
        case "mistral":
            return "mistral-v3" if "x-v3-json-array" in tags else "mistral-v11"
        case family:
            return family if family in FORMATS else None


def fixtures() -> Iterator[Any]:
    for family in ("qwen3-hermes", "qwen3-xml", "llama", "mistral"):
        for fixture in load_fixtures([default_fixtures_dir() / family]):
            if (form := form_of(fixture)) is not None:
                yield pytest.param(form, fixture, id=fixture.id)


def parsed(form: str, fixture: Fixture, size: int) -> tuple[str, list[tuple[str, str]]]:
    """The text and the calls of an answer that comes in pieces of so many characters, without its reasoning."""
    answer = fixture.raw_output
    for end in ("</think>", "[/THINK]"):
        answer = answer.split(end, 1)[-1]
    schemas = {tool["function"]["name"]: tool["function"].get("parameters", {}) for tool in fixture.tools}
    parser = ToolCallParser(FORMATS[form], text_types(schemas))
    parts = [part for at in range(0, len(answer), size) for part in parser.feed(answer[at : at + size])]
    text, calls = "", list[tuple[str, str]]()
    for part in [*parts, *parser.finish()]:
        if isinstance(part, str):
            text += part
        elif isinstance(part, CallStarted):
            calls.append((part.name, ""))
        else:
            calls[-1] = (calls[-1][0], calls[-1][1] + part.text)
    return text, calls


FIXTURES = list(fixtures())


@pytest.mark.parametrize(("form", "fixture"), FIXTURES)
def test_calls_are_found_however_the_answer_is_split(form: str, fixture: Fixture) -> None:
    assert fixture.expected is not None
    wanted = [(call.name, dict(call.arguments)) for call in fixture.expected.tool_calls]
    for size in (1, 3, 10, 10_000):
        text, calls = parsed(form, fixture, size)
        assert [(name, json.loads(arguments)) for name, arguments in calls] == wanted
        assert text.strip() == (fixture.expected.content or "").strip()


def test_every_format_has_fixtures() -> None:
    assert {param.values[0] for param in FIXTURES} == set(FORMATS)


@pytest.mark.parametrize("size", [1, 4, 100])
def test_text_that_deviates_from_the_format_stays_text(size: int) -> None:
    text = "See: <tool_call> is a tag. [and more]\n\n  indented"
    parser = ToolCallParser(GENERIC)
    parts = [part for at in range(0, len(text), size) for part in parser.feed(text[at : at + size])]
    assert "".join(map(str, [*parts, *parser.finish()])) == text.replace("See: <", "See:<")
    assert not parser.called
