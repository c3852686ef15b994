"""Formats of rows: what each is read as, and what is wrong with the others."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llm_edge.finetune.data.formats import Conversation, parse_row
from llm_edge.finetune.data.problems import RowError

USER, ANSWER = {"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}


def messages(*entries: dict[str, Any], **row: Any) -> Conversation:
    return parse_row({"messages": list(entries), **row})


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [USER, ANSWER]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Q"}]}, ANSWER], "source": "x"},
        {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
        {"conversations": [USER, ANSWER]},
        {"data": ["Q", "A"]},
        {"prompt": "Q", "completion": "A"},
        {"prompt": [USER], "completion": [ANSWER]},
    ],
)
def test_every_format_reads_as_the_same_conversation(row: dict[str, Any]) -> None:
    read = parse_row(row)
    assert read.messages == (USER, ANSWER)
    assert read.trained == (False, True)
    assert read.key() == messages(USER, ANSWER).key()


def test_reasoning_fields_are_read_as_one() -> None:
    keys = {messages(USER, {**ANSWER, name: " R\n"}).key() for name in ("thinking", "reasoning_content", "reasoning")}
    assert keys == {messages(USER, {**ANSWER, "reasoning_content": "R"}).key()}
    assert messages(USER, {**ANSWER, "thinking": " "}).key() == messages(USER, ANSWER).key()


def test_tools_and_template_variables_are_kept() -> None:
    tools = [{"type": "function", "function": {"name": "f"}}]
    row = messages(USER, CALL, {"role": "tool", "content": "2"}, ANSWER, tools=tools)
    assert row.tools == tuple(tools)
    assert messages(USER, ANSWER, tools=json.dumps(tools)).tools == tuple(tools)
    assert messages(USER, ANSWER, tools="").tools is messages(USER, ANSWER, tools=[]).tools is None
    assert row.messages[1]["tool_calls"] == CALL["tool_calls"]
    assert row.trained == (False, True, False, True)
    assert messages(USER, ANSWER, chat_template_kwargs={"a": 1}).variables == {"a": 1}


def test_sharegpt_has_a_system_prompt_and_calls() -> None:
    row = parse_row(
        {
            "system": "S",
            "conversations": [
                {"from": "human", "value": "Q"},
                {"from": "function_call", "value": '[{"name": "f", "arguments": {}}]'},
                {"from": "observation", "value": "2"},
                {"from": "gpt", "value": "A", "weight": 1},
            ],
        }
    )
    roles = [message["role"] for message in row.messages]
    assert roles == ["system", "user", "assistant", "tool", "assistant"]
    assert row.messages[2]["tool_calls"] == CALL["tool_calls"]


def test_the_prompt_of_a_pair_of_message_lists_is_not_trained() -> None:
    row = parse_row({"prompt": [USER, ANSWER, USER], "completion": [ANSWER]})
    assert row.trained == (False, False, False, True)


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (3, "not a JSON object"),
        ({"text": "Q"}, "unknown format"),
        ({"messages": []}, "messages is empty"),
        ({"messages": "Q"}, "messages is not a list of messages"),
        ({"messages": [USER, "A"]}, "messages is not a list of messages"),
        ({"messages": [USER, {"role": "robot", "content": "A"}]}, "a message without role"),
        ({"messages": [USER, {"content": "A"}]}, "a message without role"),
        ({"messages": [USER, {"role": "assistant", "content": 3}]}, "content is not a text"),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "image"}]}]}, "content is not a text"),
        ({"messages": [USER, {"role": "assistant", "content": " "}]}, "an answer is empty"),
        ({"messages": [{"role": "user"}, ANSWER]}, "a question is empty"),
        ({"messages": [USER, USER, ANSWER]}, "roles out of order: user after user"),
        ({"messages": [ANSWER, USER]}, "roles out of order: assistant first"),
        ({"messages": [USER, {"role": "tool", "content": "2"}, ANSWER]}, "roles out of order: tool after user"),
        ({"messages": [USER, {"role": "system", "content": "S"}, ANSWER]}, "roles out of order: system after user"),
        ({"messages": [USER, ANSWER, USER]}, "no answer: the last message is of the role user"),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "nothing to train"),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "a weight that is neither 0 nor 1"),
        ({"messages": [USER, {**ANSWER, "thinking": 1}]}, "reasoning that is not a text"),
        ({"messages": [USER, {**ANSWER, "tool_calls": [{}]}]}, "tool_calls is not a list of calls"),
        ({"messages": [USER, {**ANSWER, "tool_calls": "f"}]}, "tool_calls is not a list of calls"),
        ({"messages": [USER, {**ANSWER, "content": "\ud800"}]}, "a lone surrogate"),
        ({"messages": [USER, ANSWER], "tools": "f("}, "tools is a text that is not JSON"),
        ({"messages": [USER, ANSWER], "tools": {"name": "f"}}, "tools is not a list of JSON schemas"),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": 1}, "chat_template_kwargs is not an object"),
        ({"conversations": "Q"}, "conversations is not a list of objects"),
        ({"conversations": [{"from": "robot", "value": "Q"}]}, "'from' is not human"),
        ({"conversations": [{"from": "human", "value": None}]}, "'value' is not a text"),
        ({"conversations": [{"from": "function_call", "value": "f()"}]}, "a function_call is not JSON"),
        ({"data": "Q"}, "data is not a list of texts"),
        ({"data": ["Q", 1]}, "data is not a list of texts"),
        ({"data": ["Q", "A", "Q"]}, "data has an odd number of texts"),
        ({"data": []}, "data has an odd number of texts"),
        ({"prompt": "Q", "completion": [ANSWER]}, "prompt and completion are neither"),
    ],
)
def test_an_unusable_row_has_a_reason(row: object, reason: str) -> None:
    with pytest.raises(RowError, match=reason):
        parse_row(row)


KEYS = st.sampled_from(
    [
        *("messages", "conversations", "data", "prompt", "completion", "role", "content", "from", "value", "weight"),
        *("tools", "tool_calls", "function", "name", "thinking", "text", "type", "chat_template_kwargs", "system"),
    ]
)
TEXTS = st.sampled_from(["user", "assistant", "tool", "system", "human", "gpt", "function_call", "{}", "[1]", "", "x"])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-1, 2) | TEXTS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(KEYS, inner, max_size=4),
    max_leaves=24,
)


@settings(max_examples=300, deadline=None)
@given(JSON)
def test_any_row_is_a_conversation_or_has_a_reason(row: object) -> None:
    try:
        conversation = parse_row(row)
    except RowError:
        return
    assert any(conversation.trained)
    assert conversation.key()
