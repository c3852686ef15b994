"""What llama-server's own tests check, in its files' order: responses, messages, tools, access and several models."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest
from reasoning_bundle import bundle_with
from serving import Served
from wire import chat, events, post

ASKED: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
MESSAGE: dict[str, Any] = {"model": "tiny", "max_tokens": 6, "temperature": 0, "messages": ASKED}
CODE = "print('Hello, world!')\nif True:\n    print(\"twice\")\n"
PARAMETERS = {
    "type": "object",
    "properties": {"code": {"enum": [CODE]}},
    "required": ["code"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "python", "description": "runs code", "parameters": PARAMETERS}}
THINKING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{{ '<|im_start|>assistant\n' }}{% if enable_thinking is not defined or enable_thinking %}<think>{% endif %}"
)


@pytest.fixture(scope="module")
def served(tiny_bundle: Path, models_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("models")
    for name in ("tiny", "other"):
        (folder / name).symlink_to(models_folder / name)
    added, delimiters = {320: "<think>", 321: "</think>"}, {"start": 320, "end": 321}
    bundle_with(tiny_bundle, folder / "thinker", added, special=True, template=THINKING, reasoning=delimiters)
    server = Served(folder, models={"default": "tiny", "precision": "fp32"})
    yield server
    server.stop()


# ---- test_compat_oai_responses


@pytest.mark.parametrize(
    ("form", "wanted"),
    [
        ({"type": "json_schema", "name": "n", "schema": {"const": "foo"}}, '"foo"'),
        ({"type": "json_object", "schema": {"const": "foo"}}, '"foo"'),
        ({"type": "text"}, None),
    ],
)
def test_responses_keep_to_formats(served: Served, form: dict[str, Any], wanted: str | None) -> None:
    found = post(served, "/v1/responses", input="Hi", text={"format": form}, max_output_tokens=8).json()
    (item,) = found["output"]
    assert found["id"].startswith("resp_")
    assert item["id"].startswith("msg_")
    assert wanted is None or item["content"][0]["text"] == wanted


def test_a_format_of_responses_needs_a_schema(served: Served) -> None:
    form = {"type": "json_schema", "name": "n"}
    assert post(served, "/v1/responses", input="Hi", text={"format": form}).status_code == 400


def test_events_of_a_response_belong_to_one_item(served: Served) -> None:
    found = events(post(served, "/v1/responses", input=ASKED, stream=True, temperature=0, max_output_tokens=8))
    items = {event["item_id"] for event in found if "item_id" in event}
    items |= {event["item"]["id"] for event in found if "item" in event}
    assert len(items) == 1
    assert len({event["response"]["id"] for event in found if "response" in event}) == 1
    deltas = [event["delta"] for event in found if event["type"] == "response.output_text.delta"]
    (done,) = [event["text"] for event in found if event["type"] == "response.output_text.done"]
    last = found[-1]["response"]
    assert "".join(deltas) == done == last["output"][0]["content"][0]["text"]
    assert last["usage"]["output_tokens"] == 8


# ---- test_compat_anthropic


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"system": "Be brief."},
        {"system": [{"type": "text", "text": "Be brief."}, {"type": "text", "text": "Be kind."}]},
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hello"}, {"type": "text", "text": "!"}]}]},
        {"messages": [*ASKED, {"role": "assistant", "content": "Paris."}, *ASKED]},
        {"temperature": 0.5, "top_p": 0.9, "top_k": 20, "metadata": {"user_id": "u"}},
        {"stop_sequences": ["never"], "thinking": {"type": "enabled", "budget_tokens": 1024}},
        {"thinking": {"type": "disabled"}, "service_tier": "auto"},
    ],
)
def test_messages_have_anthropics_shape(served: Served, fields: dict[str, Any]) -> None:
    found = post(served, "/v1/messages", **{**MESSAGE, **fields}).json()
    assert found["id"].startswith("msg_")
    assert (found["type"], found["role"], found["stop_reason"]) == ("message", "assistant", "max_tokens")
    assert [block["type"] for block in found["content"]] == ["text"]
    assert found["usage"]["output_tokens"] == 6
    assert found["usage"]["input_tokens"] + found["usage"]["cache_read_input_tokens"] > 10
    assert "timings" not in found
    counted = {name: fields[name] for name in ("system", "messages") if name in fields}
    tokens = post(served, "/v1/messages/count_tokens", model="tiny", **{"messages": ASKED, **counted}).json()
    assert tokens == {"input_tokens": found["usage"]["input_tokens"] + found["usage"]["cache_read_input_tokens"]}


def test_thinking_is_a_signed_block_before_the_text(served: Served) -> None:
    thinking = {"type": "enabled", "budget_tokens": 5}
    fields = {**MESSAGE, "model": "thinker", "temperature": 1, "seed": 2, "max_tokens": 40, "thinking": thinking}
    whole = post(served, "/v1/messages", **fields).json()["content"]
    assert [block["type"] for block in whole] == ["thinking", "text"]
    found = events(post(served, "/v1/messages", stream=True, **fields))
    assert found[0]["message"]["content"] == []
    assert found[0]["message"]["usage"]["input_tokens"] > 0
    blocks = [event for event in found if event["type"].startswith("content_block")]
    kinds = [(event["index"], event.get("delta", event.get("content_block", event))["type"]) for event in blocks]
    assert list(dict.fromkeys(kinds)) == [
        (0, "thinking"),
        (0, "thinking_delta"),
        (0, "signature_delta"),
        (0, "content_block_stop"),
        (1, "text"),
        (1, "text_delta"),
        (1, "content_block_stop"),
    ]
    text = "".join(event["delta"]["text"] for event in blocks if event.get("delta", {}).get("type") == "text_delta")
    assert text == whole[1]["text"]
    assert found[-2]["usage"]["output_tokens"] > 0


def test_calls_of_messages_have_objects_and_streams_their_json(served: Served) -> None:
    tool = {"name": "python", "input_schema": PARAMETERS}
    choice = {"type": "any", "disable_parallel_tool_use": True}
    fields = {**MESSAGE, "max_tokens": 400, "tools": [tool], "tool_choice": choice}
    whole = post(served, "/v1/messages", **fields).json()
    assert whole["stop_reason"] == "tool_use"
    (call,) = whole["content"]
    assert (call["type"], call["name"], call["input"]) == ("tool_use", "python", {"code": CODE})
    found = events(post(served, "/v1/messages", stream=True, **fields))
    parts = [event["delta"]["partial_json"] for event in found if event["type"] == "content_block_delta"]
    assert json.loads("".join(parts)) == {"code": CODE}
    for content in ("done", [{"type": "text", "text": "done"}], None):
        for failed in (False, True):
            result = {"type": "tool_result", "tool_use_id": call["id"], "content": content, "is_error": failed}
            history = [*ASKED, {"role": "assistant", "content": [call]}]
            history.append({"role": "user", "content": [result, {"type": "text", "text": "And now?"}]})
            after = post(served, "/v1/messages", **{**MESSAGE, "messages": history, "tools": [tool]})
            assert after.status_code == 200


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": None},
        {"messages": [{"role": "user", "content": [{"type": "image", "source": {"type": "url", "url": "http://x"}}]}]},
    ],
)
def test_messages_without_text_are_refused(served: Served, fields: dict[str, Any]) -> None:
    response = post(served, "/v1/messages", **{**MESSAGE, **fields})
    assert response.status_code == 400
    assert response.json()["error"]["message"]


# ---- test_tool_call; each format is in test_tools.py


@pytest.mark.parametrize("model", ["tiny", "thinker"])
@pytest.mark.parametrize("stream", [False, True])
def test_code_is_passed_to_a_tool_as_it_is(served: Served, model: str, stream: bool) -> None:
    fields = {"model": model, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    fields |= {"reasoning_budget": 4, "max_tokens": 400, "temperature": 1, "seed": 1}
    if stream:
        deltas = [
            chunk["choices"][0]["delta"]
            for chunk in events(post(served, "/v1/chat/completions", messages=ASKED, stream=True, **fields))
        ]
    else:
        deltas = [chat(served, ASKED, **fields)["message"]]
    calls = [call for delta in deltas for call in delta.get("tool_calls", ())]
    assert calls[0]["function"]["name"] == "python"
    assert json.loads("".join(call["function"]["arguments"] for call in calls)) == {"code": CODE}
    assert len([call for call in calls if "id" in call]) == 1
    assert not any(delta.get("content") for delta in deltas)
    assert any(delta.get("reasoning_content") for delta in deltas) == (model == "thinker")


@pytest.mark.parametrize("choice", ["auto", "required", "none", None])
@pytest.mark.parametrize("stream", [False, True])
def test_choices_of_tools_hold_whole_and_streamed(served: Served, choice: str | None, stream: bool) -> None:
    fields = {"tools": [TOOL], "tool_choice": choice, "parallel_tool_calls": False, "max_tokens": 300, "seed": 5}
    if stream:
        response = post(served, "/v1/chat/completions", messages=ASKED, stream=True, **fields)
        choices = [chunk["choices"][0] for chunk in events(response)]
        called = any(each["delta"].get("tool_calls") for each in choices)
        finish = choices[-1]["finish_reason"]
    else:
        found = chat(served, ASKED, **fields)
        called, finish = "tool_calls" in found["message"], found["finish_reason"]
    assert called == (finish == "tool_calls")
    assert choice not in ("required", "none") or called == (choice == "required")


def test_a_result_is_answered_without_a_call(served: Served) -> None:
    function = {"name": "python", "arguments": json.dumps({"code": CODE})}
    call = {"id": "abc123def", "type": "function", "function": function}
    history = [*ASKED, {"role": "assistant", "content": "", "tool_calls": [call]}]
    history.append({"role": "tool", "tool_call_id": "abc123def", "content": "Hello, world!"})
    message = chat(served, history, tools=[TOOL], tool_choice="none", max_tokens=4)["message"]
    assert message["content"]
    assert "tool_calls" not in message


# ---- test_security


def test_keys_protect_everything_but_the_page_and_health(models_folder: Path) -> None:
    server = Served(models_folder, models={"precision": "fp32"}, api_keys=("sk-test-key",))
    try:
        for path in ("/health", "/", "/static/app.js", "/static/app.css"):
            assert httpx2.get(server.url + path).status_code == 200
        for key in (None, "invalid-key"):
            headers = {"authorization": f"Bearer {key}"} if key else {}
            response = httpx2.post(f"{server.url}/completions", json={"prompt": "Hi"}, headers=headers)
            assert response.status_code == 401
            assert response.json()["error"]["type"] == "authentication_error"
        for headers in ({"authorization": "Bearer sk-test-key"}, {"x-api-key": "sk-test-key"}):
            response = httpx2.post(f"{server.url}/completions", json={"prompt": "Hi", "max_tokens": 1}, headers=headers)
            assert response.status_code == 200
        assert httpx2.options(f"{server.url}/v1/models", headers={"origin": server.url}).status_code == 204
    finally:
        server.stop()


def test_the_official_client_needs_no_v1_in_its_address(served: Served) -> None:
    with openai.OpenAI(base_url=served.url, api_key="unused") as client:
        assert client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=1).choices
        assert client.completions.create(model="tiny", prompt="Hi", max_tokens=1).choices
        assert client.responses.create(model="tiny", input="Hi", max_output_tokens=1).output
        assert {model.id for model in client.models.list()} == {"tiny", "other", "thinker"}


@pytest.mark.parametrize(
    "url", ["file:///etc/passwd", "file://../../etc/passwd", "http://127.0.0.1:1/x.png", "data:,x"]
)
def test_media_are_refused_and_never_read(served: Served, url: str) -> None:
    content = [{"type": "text", "text": "What is it?"}, {"type": "image_url", "image_url": {"url": url}}]
    response = post(served, "/v1/chat/completions", messages=[{"role": "user", "content": content}])
    assert response.status_code == 400
    assert "text only" in response.json()["error"]["message"]


# ---- test_router; unloading and draining are in test_operation.py


@pytest.mark.parametrize("stream", [False, True])
def test_an_unknown_model_is_refused_before_the_stream(served: Served, stream: bool) -> None:
    response = post(served, "/v1/chat/completions", model="missing", messages=ASKED, stream=stream)
    assert response.status_code == 404
    assert response.json()["error"]["code"] == "model_not_found"


def test_requests_for_a_model_that_is_not_loaded_share_one_load(models_folder: Path) -> None:
    server = Served(models_folder, models={"default": "tiny", "precision": "fp32"})
    try:
        with ThreadPoolExecutor(8) as pool:
            found = list(pool.map(lambda _: chat(server, ASKED, model="other", temperature=0, max_tokens=8), range(8)))
        assert len({choice["message"]["content"] for choice in found}) == 1
        loaded = [model["name"] for model in httpx2.get(f"{server.url}/api/ps").json()["models"]]
        assert sorted(loaded) == ["other:fp32", "tiny:fp32"]
    finally:
        server.stop()
