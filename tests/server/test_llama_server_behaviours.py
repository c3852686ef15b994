"""What llama-server's own tests check, in its files' order: tokens, prompts, texts and models.

docs/serving.md explains what differs. Messages, responses, tools and access are in
test_llama_server_behaviours_protocols.py; some lines are checked by the other files in this folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx2
import pytest
from reasoning_bundle import bundle_with
from serving import Served
from wire import chat, events, post

ASKED: list[Any] = [{"role": "user", "content": "What is the capital of France?"}]
SYSTEM = {"role": "system", "content": "Today is a good day."}
PROMPT = "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
# Reasoning as in Qwen's template, and the date as in Llama's.
THINKING = (
    "{{ strftime_now('%Y-%m-%d') }}\n{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}"
    "{% elif enable_thinking is defined %}{{ '<think>\n' }}{% endif %}{% endif %}"
)


@pytest.fixture(scope="module")
def served(tiny_bundle: Path, models_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("models")
    (folder / "tiny").symlink_to(models_folder / "tiny")
    added, delimiters = {320: "<think>", 321: "</think>"}, {"start": 320, "end": 321}
    bos: dict[str, Any] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}}],
        "pair": [],
    }
    bos["single"].append({"Sequence": {"id": "A", "type_id": 0}})
    bos["special_tokens"] = {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [0], "tokens": ["<|endoftext|>"]}}
    bundle_with(
        tiny_bundle,
        folder / "thinker",
        added,
        special=True,
        template=THINKING,
        post_processor=bos,
        reasoning=delimiters,
    )
    server = Served(folder, models={"default": "tiny", "precision": "fp32"})
    yield server
    server.stop()


# ---- test_basic, test_metrics


def test_health_properties_and_models_describe_the_server(served: Served) -> None:
    assert httpx2.get(f"{served.url}/health").status_code == 200
    properties = httpx2.get(f"{served.url}/props").json()
    assert (properties["model_path"], properties["total_slots"]) == ("tiny", 8)
    assert properties["default_generation_settings"]["n_ctx"] == 1024
    assert {card["id"] for card in httpx2.get(f"{served.url}/models").json()["data"]} == {"tiny", "thinker"}
    assert httpx2.get(served.url).text.startswith("<!doctype html>")
    assert "llm_edge_requests_total" in httpx2.get(f"{served.url}/metrics").text


# ---- test_chat_completion


def test_an_answer_has_an_id_a_fingerprint_and_exact_counts(served: Served) -> None:
    found = post(served, "/v1/chat/completions", messages=ASKED, max_tokens=5).json()
    assert found["id"].startswith("chatcmpl-")
    assert found["system_fingerprint"]
    assert found["choices"][0]["finish_reason"] == "length"
    tokens = post(served, "/tokenize", content=PROMPT, parse_special=True).json()["tokens"]
    assert found["usage"]["prompt_tokens"] == len(tokens)
    assert found["usage"]["completion_tokens"] == 5
    assert found["usage"]["total_tokens"] == len(tokens) + 5
    assert len({post(served, "/v1/chat/completions", messages=ASKED, max_tokens=1).json()["id"] for _ in "ab"}) == 2


@pytest.mark.parametrize("parts", [1, 3])
def test_parts_of_a_content_are_joined(served: Served, parts: int) -> None:
    text = ASKED[0]["content"]
    size = -(-len(text) // parts)
    content = [{"type": "text", "text": text[at : at + size]} for at in range(0, len(text), size)]
    whole = post(served, "/apply-template", messages=[{"role": "user", "content": content}]).json()
    assert whole["prompt"] == PROMPT


@pytest.mark.parametrize("stop", [False, True])
def test_a_stream_equals_the_whole_answer(served: Served, stop: bool) -> None:
    fields: dict[str, Any] = {"temperature": 0, "max_tokens": 12}
    text = chat(served, ASKED, **fields)["message"]["content"]
    fields |= {"stop": [text[4:6]]} if stop else {}
    whole = chat(served, ASKED, **fields)
    chunks = events(post(served, "/v1/chat/completions", messages=ASKED, stream=True, **fields))
    choices = [chunk["choices"][0] for chunk in chunks]
    assert "".join(choice["delta"].get("content", "") for choice in choices) == whole["message"]["content"]
    assert choices[-1]["finish_reason"] == whole["finish_reason"] == ("stop" if stop else "length")
    assert choices[-1]["delta"] == {}
    assert not any(choice["finish_reason"] for choice in choices[:-1])
    assert len({chunk["id"] for chunk in chunks}) == 1


@pytest.mark.parametrize("role", ["user", "assistant"])
@pytest.mark.parametrize("generation_prompt", [True, False])
def test_prompts_are_rendered_as_asked(served: Served, generation_prompt: bool, role: str) -> None:
    messages = [*ASKED, {"role": "user", "content": "Hi"}] if role == "user" else [*ASKED]
    messages += [{"role": "assistant", "content": "Paris"}] if role == "assistant" else []
    found = post(served, "/apply-template", messages=messages, add_generation_prompt=generation_prompt).json()
    head = "".join(
        f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages[: None if role == "user" else 1]
    )
    if role == "assistant":
        wanted = f"{head}<|im_start|>assistant\nParis" + ("" if generation_prompt else "<|im_end|>\n")
    else:
        wanted = head + ("<|im_start|>assistant\n" if generation_prompt else "")
    assert found["prompt"] == wanted


@pytest.mark.parametrize(
    ("fields", "wanted"),
    [
        ({"response_format": {"type": "json_object", "schema": {"const": "42"}}}, '"42"'),
        ({"response_format": {"type": "json_schema", "json_schema": {"schema": {"const": "foo"}}}}, '"foo"'),
        ({"json_schema": {"const": "bar"}}, '"bar"'),
        ({"grammar": 'root ::= "a" [b] "c"'}, "abc"),
    ],
)
def test_answers_keep_to_formats(served: Served, fields: dict[str, Any], wanted: str) -> None:
    assert chat(served, ASKED, **fields)["message"]["content"] == wanted


@pytest.mark.parametrize(
    "fields",
    [
        {"response_format": {"type": "sound"}},
        {"response_format": {"type": 123}},
        {"response_format": {"type": "json_object", "schema": 123}},
        {"response_format": {"type": "json_object", "schema": {"type": 123}}},
        {"response_format": {"type": "json_object", "schema": {"type": "hiccup"}}},
        {"json_schema": "no schema"},
        {"grammar": 'root ::= "unterminated'},
        *(
            {"messages": messages}
            for messages in (None, "string", [123], [{}], [{"role": 123}], [{"role": "user", "content": 1}])
        ),
    ],
)
def test_invalid_formats_and_messages_are_refused(served: Served, fields: dict[str, Any]) -> None:
    for stream in (False, True):
        response = post(served, "/v1/chat/completions", **{"messages": ASKED, "stream": stream, **fields})
        assert response.status_code == 400, fields
        assert response.json()["error"]["message"]


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_spell_the_text(served: Served, stream: bool) -> None:
    """Tokens may be parts of characters, so their bytes are what adds up."""
    fields = {"logprobs": True, "top_logprobs": 4, "temperature": 0.8, "seed": 1, "max_tokens": 60, "stream": stream}
    response = post(served, "/v1/chat/completions", messages=ASKED, **fields)
    if stream:
        choices = [chunk["choices"][0] for chunk in events(response)]
        text = "".join(choice["delta"].get("content", "") for choice in choices)
        content = [each for choice in choices if choice["logprobs"] for each in choice["logprobs"]["content"]]
    else:
        (choice,) = response.json()["choices"]
        text, content = choice["message"]["content"], choice["logprobs"]["content"]
    assert b"".join(bytes(each["bytes"]) for each in content).decode(errors="replace") == text
    assert any(bytes(each["bytes"]).decode(errors="replace") != each["token"] for each in content)
    for each in content:
        assert each["logprob"] <= 0
        assert len(each["top_logprobs"]) == 4


def test_biases_ban_tokens(served: Served) -> None:
    fields: dict[str, Any] = {"temperature": 0, "max_tokens": 1}
    text = chat(served, ASKED, **fields)["message"]["content"]
    (token,) = post(served, "/tokenize", content=text).json()["tokens"]
    for bias in ({str(token): -100}, [[token, -100]]):
        assert chat(served, ASKED, logit_bias=bias, **fields)["message"]["content"] != text
    assert post(served, "/v1/chat/completions", messages=ASKED, logit_bias={text: -100}).status_code == 400


def test_the_cache_serves_repeated_beginnings(served: Served) -> None:
    fields = {"messages": [SYSTEM, *ASKED], "max_tokens": 2}
    for _ in "ab":
        used = post(served, "/v1/chat/completions", **fields).json()["usage"]
    assert 0 < used["prompt_tokens_details"]["cached_tokens"] < used["prompt_tokens"]


# ---- test_completion, test_ctx_shift, test_ignore_eos


def test_completions_take_texts_tokens_and_several_prompts(served: Served) -> None:
    fields = {"max_tokens": 6, "temperature": 0}
    tokens = post(served, "/tokenize", content="The quick", add_special=True).json()["tokens"]
    wanted = post(served, "/completions", prompt="The quick", **fields).json()["choices"][0]["text"]
    for prompt in (tokens, ["The quick"] * 3, [tokens, tokens]):
        choices = post(served, "/v1/completions", prompt=prompt, **fields).json()["choices"]
        assert {choice["text"] for choice in choices} == {wanted}
        assert [choice["index"] for choice in choices] == list(range(len(choices)))
    streamed = events(post(served, "/v1/completions", prompt=tokens, stream=True, **fields))
    assert "".join(chunk["choices"][0]["text"] for chunk in streamed) == wanted
    assert post(served, "/v1/completions", prompt=[1, "mixed"]).status_code == 400


@pytest.mark.parametrize("slots", [1, 2, 4])
def test_parallel_requests_are_answered_alike_on_any_number_of_slots(models_folder: Path, slots: int) -> None:
    server = Served(models_folder, models={"default": "tiny", "precision": "fp32", "parallel": slots})
    try:
        fields = {"messages": ASKED, "temperature": 1.0, "max_tokens": 16}

        def ask(seed: int) -> str:
            return str(chat(server, seed=seed, **fields)["message"]["content"])

        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(ask, [1, 2, 3, 1, 2, 3]))
        assert found[:3] == found[3:] == [ask(seed) for seed in (1, 2, 3)]
        assert len(set(found)) == 3
    finally:
        server.stop()


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions", "/v1/messages", "/v1/responses"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_that_is_too_long_is_refused_before_the_stream(served: Served, path: str, stream: bool) -> None:
    text = "word " * 2000
    fields = {"messages": [{"role": "user", "content": text}], "prompt": text, "input": text}
    response = post(served, path, stream=stream, max_tokens=5, **fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["n_prompt_tokens"] > error["n_ctx"] == 1024
    assert "context" in error["message"]


def test_an_answer_beyond_the_context_ends_with_length(served: Served) -> None:
    messages = [{"role": "user", "content": "word " * 240}]
    fields = {"max_tokens": 5000, "temperature": 1, "ignore_eos": True}
    found = post(served, "/v1/chat/completions", messages=messages, **fields).json()
    assert found["choices"][0]["finish_reason"] == "length"
    assert found["usage"]["total_tokens"] in (1024, 1025)


def test_end_tokens_can_be_ignored(served: Served) -> None:
    fields = {"max_tokens": 40, "temperature": 0, "logit_bias": {"2": 100}}
    assert post(served, "/v1/chat/completions", messages=ASKED, **fields).json()["usage"]["completion_tokens"] == 1
    fields["ignore_eos"] = True
    assert post(served, "/v1/chat/completions", messages=ASKED, **fields).json()["usage"]["completion_tokens"] == 40


# ---- test_template


@pytest.mark.parametrize(
    ("fields", "end"),
    [
        ({}, "assistant\n"),
        ({"reasoning_effort": "none"}, "<think>\n\n</think>\n\n"),
        ({"reasoning_budget": 0}, "<think>\n\n</think>\n\n"),
        ({"chat_template_kwargs": {"enable_thinking": False}}, "<think>\n\n</think>\n\n"),
        ({"reasoning_effort": "high"}, "assistant\n<think>\n"),
        ({"chat_template_kwargs": {"enable_thinking": True}}, "assistant\n<think>\n"),
        ({"reasoning_effort": "high", "add_generation_prompt": False}, "<|im_end|>\n"),
    ],
)
def test_reasoning_is_switched_by_the_prompt(served: Served, fields: dict[str, Any], end: str) -> None:
    before = datetime.now().strftime("%Y-%m-%d")
    prompt = post(served, "/apply-template", model="thinker", messages=ASKED, **fields).json()["prompt"]
    assert prompt.endswith(end)
    assert prompt[:10] in (before, datetime.now().strftime("%Y-%m-%d"))


@pytest.mark.parametrize("stream", [False, True])
def test_reasoning_is_returned_apart_from_the_text(served: Served, stream: bool) -> None:
    fields = {"model": "thinker", "reasoning_budget": 6, "temperature": 1, "seed": 3, "max_tokens": 30}
    response = post(served, "/v1/chat/completions", messages=ASKED, stream=stream, **fields)
    messages = (
        [c["choices"][0]["delta"] for c in events(response)] if stream else [chat(served, ASKED, **fields)["message"]]
    )
    assert "".join(message.get("reasoning_content", "") for message in messages)
    text = "".join(message.get("content", "") for message in messages)
    assert text
    assert "think>" not in text
    assert "reasoning_content" not in chat(served, ASKED, max_tokens=4)["message"]


# ---- test_tokenize


@pytest.mark.parametrize("text", ["What is it?", "Äpfel 你好", "🙂🦙 mixed ünïcode\n", "<|im_end|>"])
def test_tokens_round_trip_and_their_pieces_spell_the_text(served: Served, text: str) -> None:
    tokens = post(served, "/tokenize", content=text).json()["tokens"]
    assert post(served, "/detokenize", tokens=tokens).json()["content"] == text
    pieces = post(served, "/tokenize", content=text, with_pieces=True).json()["tokens"]
    assert [piece["id"] for piece in pieces] == tokens
    written = [piece["piece"] for piece in pieces]
    assert b"".join(piece.encode() if isinstance(piece, str) else bytes(piece) for piece in written) == text.encode()


def test_special_tokens_are_added_or_parsed_on_request(served: Served) -> None:
    plain, special = (
        post(served, "/tokenize", content="<|im_end|>", parse_special=parse).json()["tokens"] for parse in (False, True)
    )
    assert len(plain) > 1
    assert special == [2]
    fields = {"model": "thinker", "content": "Hello"}
    plain = post(served, "/tokenize", **fields).json()["tokens"]
    assert post(served, "/tokenize", add_special=True, **fields).json()["tokens"] == [0, *plain]


# ---- test_stream: an answer over several events of the page is in test_web_api.py


def test_events_are_json_and_end_with_done(served: Served) -> None:
    response = post(served, "/v1/chat/completions", messages=ASKED, stream=True, n=2, max_tokens=3, seed=1)
    *chunks, done, end = response.text.split("\n\n")
    assert (done, end) == ("data: [DONE]", "")
    found = [json.loads(chunk.removeprefix("data: "))["choices"][0] for chunk in chunks]
    assert [choice["index"] for choice in found if choice["finish_reason"]] in ([0, 1], [1, 0])
