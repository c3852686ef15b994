"""Tool calls through the official client: any model, constrained by its format."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from typing import Any

import jsonschema
import openai
import pytest
import tiny
from serving import Served

from llm_edge.exporter.export import export
from llm_edge.exporter.options import ExportOptions
from llm_edge.runtime.bundle import Bundle

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

_TURNS = """{%- if tools %}{{ '<|im_start|>system\n' + (tools | tojson) + '<|im_end|>\n' }}{%- endif %}
{%- for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}{{ message.content or '' }}
{%- if message.tool_calls %}CALLS{%- endif %}{{ '<|im_end|>\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{%- endif %}"""
_HERMES = """{%- for call in message.tool_calls %}{{ '<tool_call>\n{"name": "' + call.function.name + '", "arguments": '
+ (call.function.arguments | tojson) + '}\n</tool_call>' }}{%- if not loop.last %}{{ '\n' }}{%- endif %}{%- endfor %}"""
_LLAMA = """{%- if message.tool_calls | length > 1 %}{{ raise_exception('one call') }}{%- endif %}
{%- for call in message.tool_calls %}{{ '{"name": "' + call.function.name + '", "parameters": '
+ (call.function.arguments | tojson) + '}' }}{%- endfor %}"""
_MISTRAL = """{{ '[TOOL_CALLS][' }}{%- for call in message.tool_calls %}{{ call.function | tojson }}
{%- if not loop.last %}{{ ', ' }}{%- endif %}{%- endfor %}{{ ']' }}"""
_XML = """{%- for call in message.tool_calls %}{{ '<tool_call>\n<function=' + call.function.name + '>\n' }}
{%- for key, value in call.function.arguments.items() %}{{ '<parameter=' + key + '>\n' }}{{ value }}
{{- '\n</parameter>\n' }}{%- endfor %}{{ '</function>\n</tool_call>' }}{%- endfor %}"""
_PYTHONIC = """{{ '[' }}{%- for call in message.tool_calls %}{{ call.function.name + '(' }}
{%- for key, value in call.function.arguments.items() %}{{ key + '=' }}{{ value | tojson }}
{%- if not loop.last %}{{ ', ' }}{%- endif %}{%- endfor %}{{ ')' }}{%- if not loop.last %}{{ ', ' }}{%- endif %}
{%- endfor %}{{ ']' }}"""
TEMPLATES = {
    name: _TURNS.replace("CALLS", calls.replace("\n+", " +").replace("\n{%-", "{%-").replace("\n{{-", "{{-"))
    for name, calls in (
        ("hermes", _HERMES),
        ("llama", _LLAMA),
        ("mistral", _MISTRAL),
        ("xml", _XML),
        ("pythonic", _PYTHONIC),
    )
}
TEMPLATES["none"] = tiny.CHAT_TEMPLATE


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("tools")
    for name, template in TEMPLATES.items():
        source = tiny.save_checkpoint(folder / "source" / name)
        config = json.loads((source / "tokenizer_config.json").read_text())
        (source / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": template}))
        for other in source.glob("chat_template*"):
            other.unlink()
        export(str(source), ExportOptions(folder / "models" / name, precision="fp32", validate=False))
    shutil.rmtree(folder / "source")
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
    with pytest.raises(openai.BadRequestError, match="context"):  # of 1,024 tokens
        ask(client, "hermes", tools=many, max_tokens=4)
