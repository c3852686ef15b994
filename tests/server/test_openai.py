"""OpenAI's endpoints through the official client."""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import openai
import pytest
from serving import Served

from llm_edge.runtime import Model, SamplingParams

ASKED: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
LONG = [{"role": "user", "content": "word " * 2000}]


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0) as created:
        yield created


@pytest.fixture(scope="module")
def model(models_folder: Path) -> Model:
    return Model.load(models_folder / "tiny", "fp32", threads=1)


def expected(model: Model, **params: Any) -> Any:
    return model.chat(ASKED, SamplingParams(**params)).result()


def test_models_are_listed_and_found_by_name(client: openai.OpenAI) -> None:
    assert {each.id for each in client.models.list()} == {"tiny", "other"}
    assert client.models.retrieve("tiny:int8").id == "tiny:int8"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("missing")


@pytest.mark.parametrize("precision", ["fp32", "int8"])
def test_greedy_text_equals_the_models_alone_and_next_to_others(
    client: openai.OpenAI, models_folder: Path, precision: str
) -> None:
    model = Model.load(models_folder / "tiny", precision, threads=1)
    wanted = model.chat(ASKED, SamplingParams(temperature=0, max_tokens=24)).result().text

    def ask(number: int) -> str:
        name = f"tiny:{precision}"
        if number % 2:
            whole = client.chat.completions.create(model=name, messages=ASKED, temperature=0, max_tokens=24)
            return whole.choices[0].message.content or ""
        chunks = client.chat.completions.create(model=name, messages=ASKED, temperature=0, max_tokens=24, stream=True)
        return "".join(chunk.choices[0].delta.content or "" for chunk in chunks)

    assert ask(0) == ask(1) == wanted
    with ThreadPoolExecutor(16) as pool:
        assert set(pool.map(ask, range(16))) == {wanted}


def test_a_stream_has_the_shape_that_clients_expect(served: Served) -> None:
    body = {"messages": ASKED, "max_tokens": 4, "stream": True, "stream_options": {"include_usage": True}}
    lines = httpx2.post(f"{served.url}/v1/chat/completions", json=body).text.split("\n\n")
    assert lines.pop() == ""
    assert lines.pop() == "data: [DONE]"
    chunks = [json.loads(line.removeprefix("data: ")) for line in lines]
    assert len({chunk["id"] for chunk in chunks}) == 1
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert all("role" not in chunk["choices"][0]["delta"] for chunk in chunks[1:-1])
    assert [chunk["choices"][0]["finish_reason"] for chunk in chunks[:-1]][-1] == "length"
    assert chunks[-1]["choices"] == []
    assert chunks[-1]["usage"]["completion_tokens"] == 4
    assert all(chunk["usage"] is None for chunk in chunks[:-1])


def test_usage_is_streamed_only_when_requested(served: Served) -> None:
    body = {"messages": ASKED, "max_tokens": 2, "stream": True}
    text = httpx2.post(f"{served.url}/v1/chat/completions", json=body).text
    assert '"usage"' not in text


def test_usage_can_be_streamed_with_every_chunk(client: openai.OpenAI) -> None:
    options: Any = {"include_usage": True, "continuous_usage_stats": True}
    chunks = client.chat.completions.create(
        model="tiny", messages=ASKED, max_tokens=5, temperature=0, stream=True, stream_options=options
    )
    counts = [chunk.usage.completion_tokens for chunk in chunks if chunk.usage is not None]
    assert counts == sorted(counts)
    assert (counts[0], counts[-1]) == (1, 5)


def test_usage_counts_prompt_answer_and_cached_tokens(client: openai.OpenAI, model: Model) -> None:
    prompt = len(model.encode_chat(ASKED))
    for _ in range(2):
        used = client.chat.completions.create(model="tiny", messages=ASKED, max_tokens=5).usage
    assert used is not None
    assert (used.prompt_tokens, used.completion_tokens, used.total_tokens) == (prompt, 5, prompt + 5)
    assert used.prompt_tokens_details is not None
    assert 0 < (used.prompt_tokens_details.cached_tokens or 0) < prompt


def test_several_answers_with_a_seed_differ_and_repeat(client: openai.OpenAI) -> None:
    def ask() -> list[str | None]:
        found = client.chat.completions.create(
            model="tiny", messages=ASKED, n=3, seed=5, temperature=1.5, max_tokens=12
        )
        assert [choice.index for choice in found.choices] == [0, 1, 2]
        return [choice.message.content for choice in found.choices]

    first = ask()
    assert ask() == first
    assert len(set(first)) == 3


def test_several_answers_can_be_streamed(client: openai.OpenAI) -> None:
    texts: dict[int, str] = {}
    chunks = client.chat.completions.create(
        model="tiny", messages=ASKED, n=3, seed=5, temperature=1.5, max_tokens=12, stream=True
    )
    for chunk in chunks:
        choice = chunk.choices[0]
        texts[choice.index] = texts.get(choice.index, "") + (choice.delta.content or "")
    whole = client.chat.completions.create(model="tiny", messages=ASKED, n=3, seed=5, temperature=1.5, max_tokens=12)
    assert texts == {choice.index: choice.message.content for choice in whole.choices}


def test_stop_strings_over_several_tokens_never_leak(client: openai.OpenAI, model: Model) -> None:
    text = expected(model, temperature=1.3, seed=11, max_tokens=60).text
    stop = text[12:17]
    chunks = client.chat.completions.create(
        model="tiny", messages=ASKED, temperature=1.3, seed=11, max_tokens=60, stop=[stop], stream=True
    )
    shown = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(shown) == text[: text.index(stop)]


def test_logprobs_belong_to_the_tokens_of_the_text(client: openai.OpenAI) -> None:
    found = client.chat.completions.create(
        model="tiny", messages=ASKED, max_tokens=6, temperature=0, logprobs=True, top_logprobs=3
    ).choices[0]
    assert found.logprobs is not None
    content = found.logprobs.content or []
    assert len(content) == 6
    assert "".join(each.token for each in content) == found.message.content
    for each in content:
        assert each.logprob <= 0
        assert bytes(each.bytes or ()).decode() == each.token
        assert each.top_logprobs[0].token == each.token
        assert len(each.top_logprobs) == 3


def test_logit_bias_bans_and_forces_tokens(client: openai.OpenAI, model: Model) -> None:
    token = model.tokenizer.encode("x")[0]
    forced = client.chat.completions.create(
        model="tiny", messages=ASKED, max_tokens=3, temperature=0, logit_bias={str(token): 100}
    )
    assert forced.choices[0].message.content == "xxx"


@pytest.mark.parametrize(
    "form",
    [
        {"type": "json_object"},
        {
            "type": "json_schema",
            "json_schema": {
                "name": "answer",
                "strict": True,
                "schema": {
                    "type": "object",
                    "properties": {"ok": {"type": "boolean"}, "size": {"enum": [1, 2, 3]}},
                    "required": ["ok", "size"],
                    "additionalProperties": False,
                },
            },
        },
    ],
)
def test_response_format_constrains_the_answer(client: openai.OpenAI, form: Any) -> None:
    found = client.chat.completions.create(
        model="tiny", messages=ASKED, response_format=form, seed=1, temperature=1, max_tokens=300
    )
    if found.choices[0].finish_reason == "stop":
        value = json.loads(found.choices[0].message.content or "")
        assert isinstance(value, dict)
        assert form["type"] == "json_object" or set(value) == {"ok", "size"}


@pytest.mark.parametrize(
    ("extra", "pattern"),
    [
        ({"regex": "[ab]{3}"}, "ab"),
        ({"grammar": "start: /[ab]{3}/"}, "ab"),
        ({"grammar": "root ::= [ab] [ab] [ab]"}, "ab"),
    ],
)
def test_regular_expressions_and_grammars_are_local_extras(
    client: openai.OpenAI, extra: dict[str, str], pattern: str
) -> None:
    text = client.chat.completions.create(model="tiny", messages=ASKED, extra_body=extra).choices[0].message.content
    assert text is not None
    assert len(text) == 3
    assert set(text) <= set(pattern)


def test_a_last_message_of_the_assistant_is_continued(client: openai.OpenAI, model: Model) -> None:
    prefix = "Paris is"
    wanted = model.chat(ASKED, SamplingParams(temperature=0, max_tokens=6), assistant_prefix=prefix).result().text
    messages: Any = [*ASKED, {"role": "assistant", "content": [{"type": "text", "text": prefix}]}]
    found = client.chat.completions.create(model="tiny", messages=messages, temperature=0, max_tokens=6)
    assert found.choices[0].message.content == wanted


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_beyond_the_context_is_refused_with_both_counts(client: openai.OpenAI, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=LONG, stream=stream)  # type: ignore[call-overload]
    body: Any = caught.value.body
    assert body["code"] == "context_length_exceeded"
    assert body["n_ctx"] == 1024
    assert body["n_prompt_tokens"] > 1024


@pytest.mark.parametrize(
    "bad",
    [
        {"messages": None},
        {"messages": []},
        {"messages": ["text"]},
        {"messages": [123]},
        {"messages": [{}]},
        {"messages": [{"role": 123, "content": "x"}]},
        {"messages": [{"role": "user", "content": 123}]},
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "file:///x"}}]}]},
        {"n": 0},
        {"n": 1_000_000},
        {"temperature": -1},
        {"temperature": "hot"},
        {"max_tokens": 0},
        {"top_p": 2},
        {"seed": -1},
        {"stop": [""]},
        {"stop": 5},
        {"logit_bias": {"x": 1}},
        {"top_logprobs": 3},
        {"logprobs": True, "top_logprobs": 21},
        {"response_format": {"type": "xml"}},
        {"response_format": {"type": "json_schema"}},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"type": "nothing"}}}},
        {"tools": [{"type": "function"}]},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": 5}}]},
        {"tool_choice": "required"},
        {"tool_choice": {"type": "function", "function": {"name": "g"}}},
        {"reasoning_effort": "maximal"},
        {"regex": "(", "stream": True},
        {"grammar": "start: nothing"},
        {"chat_template_kwargs": {"messages": []}},
    ],
)
def test_bad_requests_get_400_and_a_message(served: Served, bad: dict[str, Any]) -> None:
    response = httpx2.post(f"{served.url}/v1/chat/completions", json={"messages": ASKED, **bad})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["message"]
    assert error["type"] == "invalid_request_error"


@pytest.mark.parametrize("name", ["temperature", "top_p", "top_k", "max_tokens", "seed", "n", "presence_penalty"])
@pytest.mark.parametrize("value", ["-1", "0", "2147483648", "9223372036854775808", "1e12", "NaN", "Infinity", "-1e400"])
def test_extreme_numbers_never_fail_the_server(served: Served, name: str, value: str) -> None:
    body = f'{{"messages": {json.dumps(ASKED)}, "max_tokens": 2, "{name}": {value}}}'
    headers = {"content-type": "application/json"}
    response = httpx2.post(f"{served.url}/v1/chat/completions", content=body, headers=headers)
    assert response.status_code in (200, 400), response.text


@pytest.mark.parametrize(
    "history",
    [
        [{"role": "system", "content": "a"}, {"role": "system", "content": "b"}],
        [{"role": "developer", "content": "a"}],
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "tool_calls": []}],
        [
            {"role": "user", "content": "q"},
            {
                "role": "assistant",
                "content": None,
                "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{broken"}}],
            },
            {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "5"}]},
        ],
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning": "r"}],
        [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "r"}],
    ],
)
def test_histories_of_other_clients_are_accepted(client: openai.OpenAI, history: Any) -> None:
    found = client.chat.completions.create(model="tiny", messages=[*history, *ASKED], max_tokens=2)
    assert found.choices[0].finish_reason in ("length", "stop")


def test_completions_continue_texts_and_tokens(client: openai.OpenAI, model: Model) -> None:
    wanted = model.generate("The quick", SamplingParams(temperature=0, max_tokens=5)).result().text
    found = client.completions.create(model="tiny", prompt="The quick", max_tokens=5, temperature=0, logprobs=2)
    assert found.choices[0].text == wanted
    assert found.choices[0].logprobs is not None
    assert found.choices[0].logprobs.text_offset == [*np.cumsum([0, *map(len, found.choices[0].logprobs.tokens)])][:5]
    tokens = model.tokenizer.encode("The quick", add_special_tokens=True)
    many = client.completions.create(model="tiny", prompt=[tokens, tokens], max_tokens=5, temperature=0, echo=True)
    assert [choice.text for choice in many.choices] == ["The quick" + wanted] * 2
    assert [choice.index for choice in many.choices] == [0, 1]


def test_embeddings_need_a_bundle_with_hidden_states(client: openai.OpenAI) -> None:
    with pytest.raises(openai.APIStatusError) as caught:
        client.embeddings.create(model="tiny", input="text")
    assert caught.value.status_code == 400
    assert "--hidden-states" in caught.value.message


def test_responses_are_answered_and_streamed(client: openai.OpenAI) -> None:
    schema = {"type": "object", "properties": {"ok": {"type": "boolean"}}, "required": ["ok"]}
    form: Any = {"format": {"type": "json_schema", "name": "n", "schema": {**schema, "additionalProperties": False}}}
    whole = client.responses.create(model="tiny", input=ASKED, text=form, temperature=0)
    assert whole.status == "completed"
    assert json.loads(whole.output_text).keys() == {"ok"}
    kinds, numbers, text = [], [], ""
    with client.responses.stream(model="tiny", input=ASKED, temperature=0, text=form) as stream:
        for event in stream:
            kinds.append(event.type)
            numbers.append(event.sequence_number)
            if event.type == "response.output_text.delta":
                text += event.delta
        final = stream.get_final_response()
    assert text == final.output_text == whole.output_text
    assert numbers == sorted(set(numbers))
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-4:] == [
        "response.output_text.done",
        "response.content_part.done",
        "response.output_item.done",
        "response.completed",
    ]
    assert final.usage is not None
    assert final.usage.output_tokens > 0


def test_unknown_tools_of_responses_are_ignored(client: openai.OpenAI) -> None:
    tools: Any = [{"type": "web_search"}, {"type": "namespace", "name": "n", "tools": []}]
    found = client.responses.create(model="tiny", input="hi", tools=tools, max_output_tokens=4)
    assert found.status == "incomplete"
    assert found.incomplete_details is not None
    assert found.incomplete_details.reason == "max_output_tokens"
