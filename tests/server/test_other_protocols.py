"""Anthropic's and Ollama's APIs through their clients, and the original service's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import anthropic
import httpx2
import ollama
import pytest
from serving import Served

from llm_edge.runtime import Model, SamplingParams

ASKED: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
TOOL = {
    "name": "add",
    "description": "adds",
    "input_schema": {
        "type": "object",
        "properties": {"x": {"enum": [1, 2]}},
        "required": ["x"],
        "additionalProperties": False,
    },
}


@pytest.fixture(scope="module")
def claude(served: Served) -> Iterator[anthropic.Anthropic]:
    with anthropic.Anthropic(base_url=served.url, api_key="unused", max_retries=0) as created:
        yield created


@pytest.fixture(scope="module")
def greedy(served: Served) -> str:
    model = Model.load(served.config.models.folder / "tiny", "fp32", threads=1)
    return model.chat(ASKED, SamplingParams(temperature=0, max_tokens=9)).result().text


def greedily(**fields: Any) -> dict[str, Any]:
    return {"model": "tiny", "max_tokens": 9, "messages": ASKED, "extra_body": {"temperature": 0}, **fields}


def test_a_message_is_the_models_text(claude: anthropic.Anthropic, greedy: str) -> None:
    found = claude.messages.create(**greedily(system="", metadata={"user_id": "x"}))
    assert [block.text for block in found.content] == [greedy]  # type: ignore[union-attr]
    assert found.stop_reason == "max_tokens"
    assert found.usage.output_tokens == 9
    assert found.usage.input_tokens + (found.usage.cache_read_input_tokens or 0) > 9


def test_a_streamed_message_equals_the_whole_one(claude: anthropic.Anthropic, greedy: str) -> None:
    with claude.messages.stream(**greedily()) as stream:
        assert "".join(stream.text_stream) == greedy
        final = stream.get_final_message()
    assert final.stop_reason == "max_tokens"
    assert final.usage.output_tokens == 9


def test_events_of_a_stream_are_numbered_and_closed(served: Served) -> None:
    body = {**greedily(stream=True), "temperature": 0}
    body.pop("extra_body")
    text = httpx2.post(f"{served.url}/v1/messages", json=body).text
    events = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: ")]
    assert events[0]["type"] == "message_start"
    assert events[0]["message"]["content"] == []
    assert events[0]["message"]["usage"]["input_tokens"] > 0
    assert [event["type"] for event in events[1:3]] == ["content_block_start", "content_block_delta"]
    assert [event["type"] for event in events[-3:]] == ["content_block_stop", "message_delta", "message_stop"]
    assert {event["index"] for event in events if "index" in event} == {0}


def test_a_stop_sequence_is_named(claude: anthropic.Anthropic, greedy: str) -> None:
    found = claude.messages.create(**greedily(stop_sequences=["never", greedy[3:5]]))
    assert (found.stop_reason, found.stop_sequence) == ("stop_sequence", greedy[3:5])


@pytest.mark.parametrize("stream", [False, True])
def test_tools_are_called(claude: anthropic.Anthropic, stream: bool) -> None:
    choice = {"type": "tool", "name": "add", "disable_parallel_tool_use": True}
    fields = greedily(tools=[TOOL], tool_choice=choice, max_tokens=200)
    if stream:
        with claude.messages.stream(**fields) as events:
            found = events.get_final_message()
    else:
        found = claude.messages.create(**fields)
    assert found.stop_reason == "tool_use"
    block = found.content[-1]
    assert block.type == "tool_use"
    assert block.name == "add"
    assert block.input in ({"x": 1}, {"x": 2})
    result = {"type": "tool_result", "tool_use_id": block.id, "content": [{"type": "text", "text": "3"}]}
    history = [*ASKED, {"role": "assistant", "content": found.content}, {"role": "user", "content": [result]}]
    after = claude.messages.create(**greedily(messages=history, tools=[TOOL], tool_choice={"type": "none"}))
    assert after.stop_reason in ("end_turn", "max_tokens")


def test_tokens_are_counted_as_they_are_used(claude: anthropic.Anthropic) -> None:
    fields: Any = {"model": "tiny", "messages": ASKED, "system": [{"type": "text", "text": "Be brief."}]}
    counted = claude.messages.count_tokens(**fields).input_tokens
    used = claude.messages.create(**fields, max_tokens=1).usage
    assert counted == used.input_tokens + (used.cache_read_input_tokens or 0)


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image", "source": {}}]}]}, "text only"),
        ({"tool_choice": {"type": "magic"}}, "tool_choice"),
        ({"max_tokens": 0}, "max_tokens"),
    ],
)
def test_bad_requests_name_the_field(served: Served, fields: dict[str, Any], field: str) -> None:
    body = {"model": "tiny", "max_tokens": 4, "messages": ASKED, **fields}
    response = httpx2.post(f"{served.url}/v1/messages", json=body)
    assert response.status_code == 400
    assert response.json()["type"] == "error"
    assert field in response.json()["error"]["message"]


@pytest.fixture(scope="module")
def local(served: Served) -> Iterator[ollama.Client]:
    created = ollama.Client(served.url)
    yield created
    created._client.close()


def test_ollama_answers_whole_and_streamed(local: ollama.Client, greedy: str) -> None:
    options = {"temperature": 0, "num_predict": 9}
    whole = local.chat("tiny:fp32", ASKED, options=options)
    assert whole.message.content == greedy
    assert whole.done_reason == "length"
    assert whole.eval_count == 9
    parts = list(local.chat("tiny:fp32", ASKED, options=options, stream=True))
    assert "".join(part.message.content or "" for part in parts) == greedy
    assert [part.done for part in parts][-2:] == [False, True]


def test_ollama_calls_tools_and_keeps_to_schemas(local: ollama.Client) -> None:
    schema = TOOL["input_schema"]
    found = local.chat("tiny", ASKED, format=schema, options={"temperature": 0})  # type: ignore[arg-type]
    assert json.loads(found.message.content or "") in ({"x": 1}, {"x": 2})
    function = {"name": "add", "description": "adds", "parameters": schema}
    called = local.chat("tiny", ASKED, tools=[{"type": "function", "function": function}], options={"num_predict": 4})
    assert called.done


def test_ollama_lists_shows_and_continues(local: ollama.Client, served: Served) -> None:
    assert "tiny:int8" in {model.model for model in local.list().models}
    assert local.show("tiny").modelinfo
    assert {model.model for model in local.ps().models} >= {"tiny:fp32"}
    model = Model.load(served.config.models.folder / "tiny", "fp32", threads=1)
    wanted = model.generate("The quick", SamplingParams(temperature=0, max_tokens=4)).result().text
    options = {"temperature": 0, "num_predict": 4}
    assert local.generate("tiny", "The quick", raw=True, options=options).response == wanted
    with pytest.raises(ollama.ResponseError, match="no model"):
        local.chat("missing", ASKED)


def test_the_original_endpoints_have_their_shapes(served: Served) -> None:
    def get(path: str) -> Any:
        return httpx2.get(served.url + path).json()

    assert get("/health") == {"status": "healthy", "model_loaded": True, "config_loaded": True}
    info = get("/model/info")
    assert info.keys() == {"model_name", "parameters", "vocab_size", "max_sequence_length", "device"}
    assert info["vocab_size"] == 331
    named = {"type": "local", "description": "Local model: tiny", "name": "tiny"}
    assert named in get("/models/available")
    assert get("/models/current") == {**named, "loaded": True}
    body = {"messages": ASKED, "max_length": 3, "temperature": None, "stream": False}
    answer = httpx2.post(f"{served.url}/chat", json=body).json()
    assert answer.keys() == {"response", "usage", "model_info"}
    assert answer["usage"]["output_tokens"] == 3
    assert answer["model_info"] == {"model": "tiny", "version": "0.1.0"}
    refused = httpx2.post(f"{served.url}/chat", json={**body, "stream": True})
    assert (refused.status_code, refused.json()["detail"]) == (400, "Use /chat/stream for streaming responses")
    assert httpx2.post(f"{served.url}/chat", json={"messages": 5}).status_code == 422
    generated = httpx2.post(f"{served.url}/generate", params={"prompt": "The", "max_length": 2}).json()
    assert generated.keys() == {"generated_text"}
    assert httpx2.post(f"{served.url}/model/reload").json() == {"message": "Model reload initiated"}


def test_the_original_stream_keeps_newlines_and_spaces(served: Served, greedy: str) -> None:
    body = {"messages": ASKED, "max_length": 9, "temperature": 0}
    response = httpx2.post(f"{served.url}/chat/stream", json=body)
    assert response.headers["content-type"].startswith("text/plain")
    events = response.text.split("\n\n")[:-1]
    assert events.pop() == "data: [DONE]"
    texts = ["\n".join(line[6:] for line in event.split("\n") if line.startswith("data: ")) for event in events]
    assert "".join(texts) == greedy.replace("\r", "")


def test_the_original_switch_reports_failures_with_200(served: Served) -> None:
    def switch(name: str) -> Any:
        return httpx2.post(f"{served.url}/models/switch", json={"model_name": name}).json()

    assert switch("missing")["success"] is False
    assert switch("other") == {"success": True, "message": "Switched to other", "model_name": "other"}
    assert httpx2.get(f"{served.url}/models/current").json()["name"] == "other"
    assert switch("tiny")["success"] is True
