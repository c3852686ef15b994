"""Tool calls through the official client: any model, constrained by its format; and canitoolcall's probe.

The probe's models are tiny ones whose logits follow a script, so that template, grammar, parser and server are real.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import openai
import pytest
from canitoolcall.probe import BUILTIN_SCENARIOS, Scenario, probe
from reasoning_bundle import bundle_with
from serving import Served
from tool_templates import TEMPLATES, export_with

from llm_edge.runtime.bundle import Bundle
from llm_edge.runtime.sampling.sampler import Sampler
from llm_edge.runtime.text.chat_template import ChatTemplate
from llm_edge.runtime.text.tokenizer import Tokenizer

WEATHER = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 12}, "unit": {"enum": ["c", "f"]}},
    "required": ["city", "unit"],
    "additionalProperties": False,
}
ADD = {
    "type": "object",
    "properties": {"x": {"type": "integer", "minimum": 0, "maximum": 99}, "y": {"enum": [1, 2]}},
    "required": ["x", "y"],
    "additionalProperties": False,
}
SCHEMAS = {"get_weather": WEATHER, "add": ADD}
TOOLS: list[Any] = [
    {"type": "function", "function": {"name": name, "description": "d", "parameters": schema}}
    for name, schema in SCHEMAS.items()
]
ASKED: list[Any] = [{"role": "user", "content": "What is the weather in Paris?"}]


THOUGHT = "9.9 is larger than 9.11."
THINKING = TEMPLATES["hermes"].replace("assistant\n' }}", "assistant\n<think>' }}")
EVENT = {
    "title": "Design review",
    "start": "2026-10-01T15:00:00Z",
    "attendees": [{"name": "Ana", "email": "ana@example.com"}, {"name": "Bo", "email": "bo@example.com"}],
    "location": {"city": "Berlin", "room": "4.12"},
}
NOTE = {"title": "Grüße aus Zürich", "body": "Café ☕ in 東京 — naïve résumé 🚀"}
ANSWERS: dict[str, str | list[tuple[str, dict[str, Any]]]] = {
    "single-call": [("get_weather", {"city": "Paris"})],
    "parallel-calls": [("get_weather", {"city": "Paris"}), ("get_weather", {"city": "Tokyo"})],
    "no-call": "42",
    "nested-args": [("create_event", EVENT)],
    "unicode-args": [("save_note", NOTE)],
    "empty-args": [("get_server_time", {})],
    "forced-tool-choice": [("get_weather", {"city": "Lisbon"})],
    "tool-result-followup": "It is 18 degrees, and the sky is clear.",
    "reasoning-then-call": [("record_answer", {"answer": "9.9"})],
}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("tools")
    for name, template in TEMPLATES.items():
        export_with(template, folder / "models" / name, folder / "source" / name, max_position_embeddings=4096)
    shutil.rmtree(folder / "source")
    added, delimiters = {320: "<think>", 321: "</think>"}, {"start": 320, "end": 321}
    hermes, thinker = folder / "models" / "hermes", folder / "models" / "thinker"
    bundle_with(hermes, thinker, added, special=True, template=THINKING, reasoning=delimiters)
    server = Served(folder / "models")
    yield server
    server.stop()


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="unused", max_retries=0) as created:
        yield created


def ask(client: openai.OpenAI, model: str, **fields: Any) -> Any:
    defaults = {"messages": ASKED, "tools": TOOLS, "temperature": 1.0, "max_tokens": 400}
    return client.chat.completions.create(model=model, **{**defaults, **fields})


def check(calls: Any) -> None:
    """Every call names a tool, and its arguments conform to that tool's schema."""
    for call in calls:
        jsonschema.validate(json.loads(call.function.arguments), SCHEMAS[call.function.name])
    assert len({call.id for call in calls}) == len(calls)


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_export_records_how_the_template_writes_calls(served: Served, name: str) -> None:
    recorded = Bundle.open(served.config.models.folder / name).manifest.get("tool_calls")
    assert (recorded is not None) == (name != "none")


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("seed", range(3))
def test_required_calls_are_well_formed(client: openai.OpenAI, name: str, seed: int) -> None:
    found = ask(client, name, tool_choice="required", seed=seed).choices[0]
    if found.finish_reason == "length":  # a random model may repeat calls until then
        found.message.tool_calls.pop()
    else:
        assert found.finish_reason == "tool_calls"
        assert not found.message.content
    check(found.message.tool_calls)
    assert found.message.tool_calls or found.finish_reason == "length"


@pytest.mark.parametrize("name", TEMPLATES)
def test_one_named_call_at_most_without_parallel_calls(client: openai.OpenAI, name: str) -> None:
    picked = {"type": "function", "function": {"name": "add"}}
    found = ask(client, name, tool_choice=picked, parallel_tool_calls=False, seed=4).choices[0]
    assert found.finish_reason == "tool_calls"
    (call,) = found.message.tool_calls
    assert call.function.name == "add"
    check([call])


@pytest.mark.parametrize("name", TEMPLATES)
def test_streamed_calls_concatenate_to_whole_ones(client: openai.OpenAI, name: str) -> None:
    fields = {"tool_choice": "required", "parallel_tool_calls": False, "seed": 2}
    whole = ask(client, name, **fields).choices[0].message.tool_calls[0]
    names, arguments, finish = [], "", None
    for chunk in ask(client, name, stream=True, **fields):
        choice = chunk.choices[0]
        finish = choice.finish_reason or finish
        for call in choice.delta.tool_calls or ():
            assert call.index == 0
            if call.id:
                names.append(call.function.name)
            arguments += call.function.arguments
    assert (names, arguments, finish) == ([whole.function.name], whole.function.arguments, "tool_calls")


@pytest.mark.parametrize("name", TEMPLATES)
def test_without_a_choice_text_streams_and_may_call(client: openai.OpenAI, name: str) -> None:
    found = ask(client, name, seed=1, max_tokens=40).choices[0]
    assert found.message.content or found.message.tool_calls
    if found.finish_reason != "length":
        check(found.message.tool_calls or ())


@pytest.mark.parametrize("fields", [{"tool_choice": "none"}, {"tools": []}, {"tools": openai.omit}])
def test_no_tools_no_calls(client: openai.OpenAI, fields: dict[str, Any]) -> None:
    message = ask(client, "hermes", max_tokens=8, **fields).choices[0].message
    assert message.tool_calls is None


@pytest.mark.parametrize("name", TEMPLATES)
def test_results_of_tools_continue_the_conversation(client: openai.OpenAI, name: str) -> None:
    call = {"id": "abcdefghi", "type": "function", "function": {"name": "add", "arguments": '{"x": 1, "y": 2}'}}
    history = [
        *ASKED,
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "abcdefghi", "content": "3"},
    ]
    found = ask(client, name, messages=history, tool_choice="none", max_tokens=4)
    assert found.choices[0].message.content is not None


def test_a_schema_holds_where_no_tool_is_called(client: openai.OpenAI) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "n", "schema": ADD}}
    found = ask(client, "hermes", response_format=form, seed=3, max_tokens=200).choices[0]
    if found.message.tool_calls:
        check(found.message.tool_calls)
    elif found.finish_reason == "stop":
        jsonschema.validate(json.loads(found.message.content), ADD)


def test_sixty_large_tools_are_accepted(client: openai.OpenAI) -> None:
    many = [
        {
            "type": "function",
            "function": {
                "name": f"tool_{number}",
                "parameters": {"type": "object", "properties": {f"p{k}": {"type": "string"} for k in range(6)}},
            },
        }
        for number in range(60)
    ]
    with pytest.raises(openai.BadRequestError, match="context"):  # of 4,096 tokens
        ask(client, "hermes", tools=many, max_tokens=4)


# ---- canitoolcall's probe


def written(model: str, answer: str | list[tuple[str, dict[str, Any]]]) -> str:
    """An answer as the model's template writes it."""
    if isinstance(answer, str):
        text = answer
    else:
        template = TEMPLATES[model if model in TEMPLATES and model != "none" else "hermes"]
        calls = [{"type": "function", "function": {"name": name, "arguments": given}} for name, given in answer]
        message = {"role": "assistant", "content": "", "tool_calls": calls}
        rendered = ChatTemplate(template, {}).render([message], add_generation_prompt=False)
        text = rendered.removeprefix("<|im_start|>assistant\n").removesuffix("<|im_end|>\n")
    return (f"{THOUGHT}</think>\n\n" if model == "thinker" else "") + text + "<|im_end|>"


def follow(patch: pytest.MonkeyPatch, bundle: Path, model: str, scenarios: Sequence[Scenario]) -> None:
    """Let the tokens of the answers have the largest logits, after prompts with the scenario's question."""
    tokenizer = Tokenizer.from_files(bundle / "tokenizer.json", {}, None)
    script = {
        each.messages[0]["content"]: tokenizer.encode(written(model, ANSWERS[each.id]), parse_special=True)
        for each in scenarios
    }
    candidates = Sampler.candidates

    def scripted(self: Sampler, logits: Any) -> Any:
        done = self.generated
        prompt = tokenizer.decode(self.tokens[: len(self.tokens) - len(done)])
        (tokens,) = [tokens for question, tokens in script.items() if question in prompt]
        if tuple(tokens[: len(done)]) == done and len(done) < len(tokens):
            logits = np.array(logits)
            logits[tokens[len(done)]] = 1000.0
        return candidates(self, logits)

    patch.setattr(Sampler, "candidates", scripted)


@pytest.mark.parametrize("model", [*TEMPLATES, "thinker"])
def test_every_scenario_of_the_probe_passes(served: Served, model: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # Llama's format has one call per answer.
    scenarios = [each for each in BUILTIN_SCENARIOS if (model, each.id) != ("llama", "parallel-calls")]
    follow(monkeypatch, served.config.models.folder / model, model, scenarios)
    report = probe(f"{served.url}/v1", model, scenarios=scenarios)
    assert report.summary()["pass"] == 3 * len(scenarios), report.render_text()
    assert not any(outcome.warnings for outcome in report.outcomes), report.render_text()
    if model == "thinker":
        assert {outcome.observed.reasoning_content for outcome in report.outcomes if outcome.observed} == {THOUGHT}
