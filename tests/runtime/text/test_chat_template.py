"""Chat templates: rendering matches transformers, and hostile templates yield a one-line error."""

from __future__ import annotations

import contextlib
import json
import resource
import time
import warnings
from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from llm_edge.runtime.errors import TemplateError
from llm_edge.runtime.text import chat_template as chat
from llm_edge.runtime.text.chat_template import ChatTemplate
from llm_edge.runtime.text.template_budget import FILTER_COSTS

TOKENS = {"bos_token": "<s>", "eos_token": "</s>"}

CHATML = """\
{% if messages[0]['role'] != 'system' %}{{ '<|im_start|>system\\nYou help.<|im_end|>\\n' }}{% endif %}
{% for message in messages %}
    {{- '<|im_start|>' ~ message['role'] + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{% endfor %}
{# the answer's start #}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}
"""

LLAMA3 = """\
{%- set date = date_string if date_string is defined else '26 Jul 2024' -%}
{%- if messages[0]['role'] == 'system' -%}
    {%- set system = messages[0]['content'] | trim -%}{%- set rest = messages[1:] -%}
{%- else -%}
    {%- set system = '' -%}{%- set rest = messages -%}
{%- endif -%}
{{- bos_token -}}<|start_header_id|>system<|end_header_id|>

Today: {{ date }}
{% if tools is not none %}
{%- for tool in tools %}
{{- tool | tojson(indent=4) }}{{ "\\n\\n" }}
{%- endfor %}
{%- endif %}
{{- system }}<|eot_id|>
{%- for message in rest %}
    {%- if not (message.role == 'tool' or 'tool_calls' in message) -%}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n' + message['content'] | trim -}}
        {{- '<|eot_id|>' -}}
    {%- elif message.tool_calls -%}
        {%- for call in message.tool_calls -%}
        {{- '{"name": "' + call.function.name + '", "parameters": ' }}{{ call.function.arguments | tojson }}}
        {%- endfor -%}<|eot_id|>
    {%- else -%}
        {{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' -}}
        {%- if message.content is mapping or message.content is iterable and message.content is not string -%}
            {{- message.content | tojson -}}
        {%- else -%}{{- message.content -}}{%- endif -%}{{- '<|eot_id|>' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}{%- endif -%}
"""

MISTRAL = """\
{%- if messages[0]["role"] == "system" %}{% set loop_messages = messages[1:] %}{% else %}
{%- set loop_messages = messages %}{% endif -%}
{%- set ns = namespace(index=0) -%}
{{- bos_token }}
{%- for message in loop_messages if message.role in ("user", "assistant") and message.content %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("After the optional system message, roles must alternate user/assistant") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
    {%- if message["role"] == "user" %}
        {%- if loop.last and messages[0]["role"] == "system" %}
            {{- "[INST] " + messages[0]["content"] + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}{{- "[INST] " + message["content"] + "[/INST]" }}{%- endif %}
    {%- else %}{{- " " + message["content"] | trim + eos_token }}{%- endif %}
{%- endfor %}
"""

GEMMA = """\
{{ bos_token }}{% for message in messages %}
{% if message.role == 'system' %}{% continue %}{% endif %}
{%- macro text(content) -%}
    {%- if content is string -%}{{ content | trim }}
    {%- else -%}{%- for part in content if part.type == 'text' -%}{{ part['text'] | trim }}{%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{% set role = 'model' if message['role'] == 'assistant' else message['role'] %}
{{ '<start_of_turn>' + role + '\\n' + text(message['content'] or '') }}
{%- generation %}{{ '<end_of_turn>' }}{% endgeneration %}

{% endfor %}
{% if add_generation_prompt %}{{'<start_of_turn>model\\n'}}{% endif %}
"""

TOOLS = """\
{%- for message in messages %}
{%- if loop.first and tools %}
{{- '<|im_start|>system\\n# Tools\\n<tools>' }}
{%- for tool in tools %}{{ '\\n' ~ (tool | tojson) }}{% endfor %}
{{- '\\n</tools>\\n' ~ tools | map(attribute='function.name') | join(', ') ~ '<|im_end|>\\n' }}
{%- endif %}
<|{{ message.role }}|>{{ loop.index0 }}/{{ messages | length }}:
{%- for call in message.tool_calls or [] %}
{{ {'n': call.function.name, 'a': call.function.arguments} | tojson(sort_keys=true, separators=(',', ':')) }}
{%- for key, value in call.function.arguments | dictsort %}{{ ' %s=%r' | format(key, value) }}{% endfor %}
{%- for key, value in call.function.arguments.items() %}{{ ' {}:{!s:>5}'.format(key, value) }}{% endfor %}
{%- endfor %}
{{- message.content | default('', true) | string | indent(2) | replace('\\n', ' ⏎ ') }}{{ message | length }}
{%- if loop.previtem is defined and loop.previtem.role == message.role %}again{% endif %}{{ loop.cycle('a', 'b') }}
{%- set parts = [message.role, 1] + ['x'] * 2 %}{{ parts }}{{ parts[1:] | reverse | list }}{{ (3, 4) | sum ** 2 }}
{%- endfor %}{{ eos_token }}{{ messages | selectattr('role', 'equalto', 'user') | list | count }}
{%- set ns = namespace(a=1) %}{% set ns.a = ns.a + 1 %}{{ ns.a // 2 }}{{ 7 / 2 }}{{ undefined_one }}
{%- filter upper %}{% set block %}é{{ 1.5 | round | int }}{% endset %}{{ block }}{% endfilter %}
{%- for x in [[1, [2]], 3] recursive %}{{ loop(x) if x is iterable else x }}{% else %}none{% endfor %}
"""

QWEN3 = """\
{%- set ns = namespace(multi_step=true, last=messages | length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages | length - 1) - loop.index0 %}
    {%- if ns.multi_step and message.role == "user" and message.content is string
           and not (message.content.startswith('<tool_response>') and message.content.endswith('</tool_response>')) %}
        {%- set ns.multi_step = false %}{%- set ns.last = index %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if message.reasoning_content is string %}{%- set reasoning = message.reasoning_content %}
        {%- elif '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1].lstrip('\\n') %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {%- if loop.index0 > ns.last and (loop.last or reasoning) %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n\\n' + content }}
        {%- else %}{{- '<|im_start|>' + message.role + '\\n' + content }}{%- endif %}
        {{- '<|im_end|>\\n' }}
    {%- else %}{{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\\n\\n</think>\\n\\n' }}{%- endif %}
{%- endif %}
"""

TEMPLATES = {
    "chatml": CHATML, "llama3": LLAMA3, "mistral": MISTRAL, "gemma": GEMMA, "tools": TOOLS, "qwen3": QWEN3
}  # fmt: skip
TOOL = {
    "type": "function",
    "function": {"name": "wéather", "parameters": {"properties": {"city": {"type": "string", "enum": ["<b>", "'"]}}}},
}
CALL = {"type": "function", "function": {"name": "wéather", "arguments": {"city": "Köln & <b>", "days": 2}}}
USER = {"role": "user", "content": "Hello, wörld! 你好 🎉"}
CONVERSATIONS: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
    ([USER], {}),
    ([USER], {"add_generation_prompt": False}),
    ([{"role": "system", "content": " Be brief.\n"}, USER, {"role": "assistant", "content": " A\n\n- a\n "}, USER], {}),
    ([USER, {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt is 4."}, USER], {"enable_thinking": False}),
    ([USER, {"role": "assistant", "content": "4", "reasoning_content": "2+2"}], {}),
    ([USER, {"role": "assistant", "content": "4", "thinking": "2+2", "tool_calls": None}], {}),
    ([{"role": "user", "content": ""}], {"tools": [TOOL, TOOL], "date_string": "1 May 2025"}),
    ([{"role": "user", "content": "a\r\n\tb\x00\u2028 {{ 1 }} {% if %} <b>&amp;"}], {"tools": []}),
    (
        [USER, {"role": "assistant", "content": "", "tool_calls": [CALL] * 2}, {"role": "tool", "content": "1°"}, USER],
        {"tools": [TOOL]},
    ),
]  # fmt: skip


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("case", range(len(CONVERSATIONS)))
def test_rendering_matches_transformers(name: str, case: int) -> None:
    messages, variables = CONVERSATIONS[case]
    arguments = {"add_generation_prompt": True, **variables}
    kept = [{key: value for key, value in message.items() if value is not None} for message in messages]
    before = json.dumps(messages)
    if (name, case) == ("mistral", len(CONVERSATIONS) - 1):
        with pytest.raises(TemplateError, match="After the optional system message, roles must alternate"):
            ChatTemplate(TEMPLATES[name], TOKENS).render(messages, **variables)
    else:
        expected = render_jinja_template([kept], chat_template=TEMPLATES[name], **{**TOKENS, **arguments})[0][0]
        assert ChatTemplate(TEMPLATES[name], TOKENS).render(messages, **variables) == expected
    assert json.dumps(messages) == before


def test_long_conversations_are_accepted() -> None:
    messages = [{"role": "user" if i % 2 == 0 else "assistant", "content": f"turn {i} " * 100} for i in range(1000)]
    messages.append({"role": "user", "content": "word < " * 100_000})
    for name, template in TEMPLATES.items():
        rendered = ChatTemplate(template, TOKENS).render(messages)
        assert "turn 999" in rendered, name


def test_templates_can_use_todays_date() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}", {}).render([USER]) == time.strftime("%Y")


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        ("hello", "at least one message"),
        ([], "at least one message"),
        (["hello"], r"messages\[0\]"),
        ([USER, {"content": "x"}], r"messages\[1\].*'role'"),
        ([{"role": 1, "content": "x"}], "'role'"),
        ([{"role": "user", "content": b"x"}], r"messages\[0\].content: bytes is not plain"),
        ([{"role": "user", "content": {1: "x"}}], "the key 1 is not a string"),
        ([{"role": "user", "content": json.loads("[" * 500 + "]" * 500)}], "nested too deeply"),
    ],
)
def test_invalid_conversations_are_rejected(messages: Any, reason: str) -> None:
    with pytest.raises(TemplateError, match=reason) as caught:
        ChatTemplate(CHATML, TOKENS).render(messages)
    assert "\n" not in str(caught.value)


def test_invalid_tools_are_rejected() -> None:
    with pytest.raises(TemplateError, match="tools"):
        ChatTemplate(CHATML, TOKENS).render([USER], tools=["x"])  # type: ignore[list-item]


def loop(body: str, start: str = "", count: int = 99_999) -> str:
    return (
        "{% set n = namespace(x="
        + (start or "1")
        + ") %}{% for i in range("
        + str(count)
        + ") %}"
        + body
        + "{% endfor %}"
    )


BIG = "{% set a = 'x' * 8000000 %}{% set b = 'x' * 8000000 %}"
ATTACKS = {
    # time
    "loops": "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
    "long body": loop("{% if a %}{% endif %}" * 3000),
    "macro": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "macro tree": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "calls": "{% macro f(n) %}{% if n %}{% call f(n-1) %}{% endcall %}{{ f(n-1) }}{% endif %}{% endmacro %}{{f(60)}}",
    "loop in itself": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "loop tree": "{% for x in [1] * 99 recursive %}{% if loop.depth < 9 %}{{ loop([1] * 99) }}{% endif %}{% endfor %}",
    "range": "{{ range(10**12) | list }}",
    "compare": BIG + loop("{% if a == b and a in b %}{% endif %}"),
    "slices": BIG + loop("{% set c = a[1:] %}"),
    "count": BIG + loop("{% set c = a.count('x') %}"),
    "is lower": BIG + loop("{% if a is lower %}{% endif %}"),
    "rfind": BIG + "{{ a.rfind('y' + 'x' * 4000000) }}",
    "strip": BIG + "{{ a.strip('yx' * 1000000) }}",
    "trim": BIG + "{{ a | trim('yx' * 1000000) }}",
    "reject": "{% set r = range(99999) | list %}" + loop("{% set c = r | reject | list %}"),
    "sort": "{% set r = range(99999) | list %}" + loop("{% set c = r | sort %}"),
    "hashes": loop("{{ d[n.x] }}{{ d.get(n.x) }}", "(1,) * 300000").replace("{% for", "{% set d = {} %}{% for", 1),
    "dag": loop("{% set n.x = [n.x, n.x] %}", count=90) + "{{ n.x == n.x[0] }}",
    "dag of tuples": loop("{% set n.x = (n.x, n.x) %}", count=90) + "{{ {n.x: 1} }}",
    "namespaces": loop("{% set m = namespace(a=n.x, b=n.x) %}{% set n.x = m %}", count=90) + "{{ n.x }}{{ n.x.a.z.z }}",
    "deep tuple": loop("{% set n.x = (n.x,) %}") + "{{ {n.x: 1} }}",
    "power": "{{ 10**(10**10) }}",
    "squares": loop("{% set n.x = n.x * n.x %}", "10"),
    "round": "{{ 5 | round(-1000000000) }}",
    "round up": "{{ 5 | round(1000000000, 'ceil') }}",
    "int": "{{ ('z' * 1000000) | int(base=36) }}",
    "sum of lists": "{{ ([[1] * 90] * 5000) | sum(start=[]) }}",
    "attribute": "{{ [1] | map(attribute='a.' * 1000000) | list }}",
    "many nodes": "{{a}}" * 100_000,
    "many parentheses": "{{ " + "(" * 50_000,
    "long sum": "{{ " + "a+" * 20_000 + "a }}",
    "many branches": "{% if a %}" + "{% elif b %}" * 5000 + "{% endif %}",
    "open tags": "{%-" * 300_000,
    "long source": "x" * (2 << 20),
    # memory
    "repeat": "{{ 'a' * 10**10 }}",
    "repeat, turned": "{{ 10**10 * 'a' }}",
    "repeat a list": "{{ [1] * 10**10 }}",
    "doubling": loop("{% set n.x = n.x + n.x %}", "'aaaaaaaaaa'"),
    "doubling ~": loop("{% set n.x = n.x ~ n.x %}", "'aaaaaaaaaa'"),
    "doubling list": loop("{% set n.x = n.x + n.x %}", "[1]"),
    "doubling replace": loop("{% set n.x = n.x.replace('a', 'aa') %}", "'aa'"),
    "hoard": loop("{% set n.x = n.x + ['x' * 100000 ~ i] %}", "[]"),
    "list grows": loop("{% set n.x = n.x + [i] %}", "[]"),
    "output": loop("x" * 10_000),
    "set blocks": loop("{% set c %}" + "x" * 10_000 + "{% endset %}"),
    "constants": "{{ " + " ~ ".join(["'x' | center(8000000)"] * 2000) + " }}",
    "format": "{{ '%1000000000s' | format('') }}",
    "format *": "{{ '%*d' | format(1000000000, 1) }}",
    "format .": "{{ '%.999999999f' % 1.0 }}",
    "format repeats": "{{ ('%(a)s' * 100000) | format(a='x' * 1000000) }}",
    "str.format": "{{ '{:1000000000}'.format(1) }}",
    "str.format nested": "{{ '{:{}}'.format(1, 10**9) }}",
    "str.format repeats": "{{ ('{0}' * 100000).format('x' * 1000000) }}",
    "center": "{{ 'a' | center(10**10) }}",
    "ljust": "{{ 'a'.ljust(10**10) }}",
    "zfill": "{{ 'a'.zfill(10**10) }}",
    "indent": "{{ ('a\n' * 100000) | indent(10**6) }}",
    "indent text": "{{ ('a\n' * 100000) | indent('x' * 10000) }}",
    "replace": "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "str.replace": "{{ ('a' * 1000000).replace(new='b' * 1000000, old='') }}",
    "join": "{{ (['x' * 1000000] * 10) | join('y' * 1000000) }}",
    "str.join": "{{ ('y' * 1000000).join(['x'] * 100000) }}",
    "split": "{{ ('a ' * 4000000).split() }}",
    "splitlines": "{{ ('\n' * 4000000).splitlines() }}",
    "letters": "{{ ('a' * 8000000) | list }}",
    "batch": "{{ [1] | batch(10**10, 'x') | list }}",
    "slice": "{{ [1] | slice(10**10) | list }}",
    "tojson": "{{ [[1] * 1000] | tojson(indent=10**9) }}",
    "tojson separators": "{{ ([1] * 100000) | tojson(separators=('a' * 100000, ':')) }}",
    "tojson deep": loop("{% set n.x = [n.x] * 2 %}", "[1]", 15) + "{{ n.x | tojson(indent=60) * 9 }}",
    "date": "{{ strftime_now('%c' * 1000000) }}",
    "escape": "{{ ('<' * 4000000) | e }}",
    # access
    "class": "{{ ''.__class__.__mro__ }}",
    "class []": "{{ ''['__class__']['__mro__'] }}",
    "class attr": "{{ (''|attr('__class__')).x }}",
    "class map": "{{ ([''] | map(attribute='__class__') | first).x }}",
    "class format": "{{ '{0.__class__.__mro__}'.format('') }}",
    "class format_map": "{{ '{a.__class__.__mro__}'.format_map({'a': 1}) }}",
    "class format attr": "{{ ('{0.__class__.__mro__}' | attr('format'))('') }}",
    "self": "{{ self.__init__.__globals__ }}",
    "self context": "{{ self._TemplateReference__context.x }}",
    "cycler": "{{ cycler.__init__.__globals__ }}",
    "cycler ()": "{{ cycler(1).__init__.__globals__ }}",
    "joiner": "{{ joiner().__call__.__globals__ }}",
    "namespace": "{{ namespace(_a=1)._Namespace__attrs.x }}",
    "lipsum": "{{ lipsum.__globals__ }}",
    "lipsum ()": "{{ lipsum(n=10000000) }}",
    "macro's function": "{% macro f() %}{% endmacro %}{{ f._func.__globals__ }}",
    "loop's": "{% for a in [1] %}{{ loop._iterator.gi_frame.f_globals }}{% endfor %}",
    "generator": "{{ (messages | map('upper')).gi_frame.f_globals }}",
    "append": "{{ messages.append(1) }}",
    "update": "{{ messages[0].update(a=1) }}",
    "setitem": "{{ messages.__setitem__(0, 1) }}",
    "to_bytes": "{{ (1).to_bytes(10**10, 'big') }}",
    "encode": "{{ 'a'.encode() }}",
    "call text": "{{ 'a'() }}",
    "include": "{% include 'x' %}",
    "import": "{% import 'x' as y %}",
    "extends": "{% extends 'x' %}",
    "block": "{% block a %}{{ self.a() }}{% endblock %}",
    "hook": "{{ 1 | <spend> }}",
    # ordinary mistakes
    "raise": "{{ raise_exception('no\nsuch role') }}",
    "undefined": "{{ foo.bar }}",
    "syntax": "{% if %}",
    "unclosed": "{{ 'a",
    "division": "{{ 1 / 0 }}",
    "filter": "{{ 1 | nonsense }}",
    "type": "{{ 'a' + 1 }}",
}  # fmt: skip


@pytest.mark.parametrize("name", ATTACKS)
def test_hostile_templates_fail_quickly_with_one_line(name: str) -> None:
    memory, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time()
    with pytest.raises(TemplateError) as caught:
        ChatTemplate(ATTACKS[name], TOKENS).render([USER])
    assert time.process_time() - began < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 300 * 1024  # KiB
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 600
    assert name != "raise" or "no such role" in str(caught.value)


def test_the_budget_applies_to_each_rendering_separately() -> None:
    template = ChatTemplate(loop("{% set c = 1 %}", count=50_000), {})
    assert [template.render([USER]) for _ in range(4)] == [""] * 4
    assert not hasattr(chat._BUDGET.get(None), "left")


# Every filter on inputs of several shapes; what takes no time for one value is repeated in a loop.
SHAPES = {
    "a word": "aB c",
    "a text": "aB c, <d>\n" * 100,
    "a long text": "a" * 290_000,
    "numbers": [3, 1, 2] * 1000,
    "words": ["ab", "cd"] * 1000,
    "objects": [{"a": i % 7, "b": "x"} for i in range(1000)],
    "an object": {f"k{i}": i for i in range(1000)},
}
ARGUMENTS = {"replace": "('a', 'b')", "batch": "(3)", "slice": "(3)", "center": "(1000)", "groupby": "('a')"}
ARGUMENTS |= {"map": "('upper')", "select": "('string')", "reject": "('string')", "attr": "('a')"}
ARGUMENTS |= {"selectattr": "('a')", "rejectattr": "('a')"}


@pytest.mark.parametrize("name", sorted(FILTER_COSTS))
def test_a_filter_in_a_loop_ends_within_the_budget(name: str) -> None:
    for shape, value in SHAPES.items():
        body = f"{{% set c = x | {name}{ARGUMENTS.get(name, '')} | string %}}"
        ends = "{% endfor %}" * 2
        template = ChatTemplate("{% for i in range(9999) %}{% for j in range(9999) %}" + body + ends, {})
        began = time.process_time()
        with pytest.raises(TemplateError) as caught:
            template.render([USER], x=value)
        assert time.process_time() - began < 3, shape
        assert "\n" not in str(caught.value)


def test_every_available_filter_has_a_cost() -> None:
    names = {name for name in chat._SANDBOX.filters if not name.startswith("<")}
    assert names == FILTER_COSTS.keys()


@pytest.mark.parametrize(
    "source", ["{{ none[::-1] }}", "{{ 1 is sameas 1 }}{{ (1)() }}", "{{ ('a')(2) }}", "{{ [1]('a') }}"]
)
def test_python_prints_no_warnings_about_templates(source: str) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with contextlib.suppress(TemplateError):
            ChatTemplate(source, {}).render([{"role": "user", "content": "Hi"}])
    assert caught == []
