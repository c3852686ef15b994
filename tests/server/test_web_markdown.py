"""Answers as HTML: hostile text stays inert, and growing text gives the same result as whole text."""

from __future__ import annotations

import re

import pytest

from llm_edge.server.web.markdown import AnswerBlocks, render

HOSTILE = [
    "<img src=x onerror=alert(1)>",
    "<script>alert(1)</script>",
    "<svg/onload=alert(1)>",
    "text <b onclick=alert(1)>x</b>",
    "[a](javascript:alert(1))",
    "[a](JaVaScRiPt:alert(1))",
    "[a](data:text/html,<script>alert(1)</script>)",
    "[a](vbscript:x)",
    '![a](x" onerror="alert(1))',
    "![a](http://192.0.2.1/spy.png)",
    "<javascript:alert(1)>",
    "[a](//example.com)",
    "[a](/ui/api/chats/1/export)",
    '[a](https://example.com "title\\" onmouseover=alert(1)")',
    '```"><img src=x onerror=alert(1)>\ncode\n```',
    "```py<script>\n</code></pre><script>alert(1)</script>\n```",
    "    </code></pre><script>alert(1)</script>",
    "|a|\n|:-:|\n|<img src=x onerror=alert(1)>|",
    '<tool_call>\n{"name": "<img src=x onerror=alert(1)>", "arguments": {"<script>": "</pre><script>"}}\n</tool_call>',
    "<tool_call>\n<img src=x onerror=alert(1)>",
    "&lt;img src=x onerror=alert(1)&gt; &#x1b;[31m",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_hostile_text_becomes_inert(text: str) -> None:
    html = "".join(render(text))
    tags = re.findall(r"<[^>]*>", html)
    for tag in tags:
        assert re.match(r"</?(p|br|strong|em|code|pre|span|a|table|thead|tbody|tr|th|td|details|summary)\b", tag), tag
        assert not re.search(r"\bon\w+=", re.sub(r'"[^"]*"', '""', tag)), tag
        assert "style=" not in re.sub(r'"[^"]*"', '""', tag), tag
    for target in re.findall(r'href="([^"]*)"', html):
        assert target.startswith(("http://", "https://", "mailto:")), target
    assert "\x1b" not in html


def test_links_open_elsewhere_without_access_to_the_page() -> None:
    (html,) = render("[site](https://example.com) and <me@example.com>")
    assert html.count('target="_blank"') == 2
    assert html.count('rel="noopener noreferrer nofollow"') == 2


def test_code_is_highlighted_by_class_and_tables_align_by_class() -> None:
    code, table = render("```python\nif x: pass\n```\n\n|a|b|\n|:-|-:|\n|1|2|\n")
    assert '<pre data-language="python"><code><span class="t-k">if</span>' in code
    assert '<td class="right">2</td>' in table
    assert render("```nosuchlanguage\n<x>\n```")[0] == (
        '<pre data-language="nosuchlanguage"><code>&lt;x&gt;\n</code></pre>'
    )


def test_tool_calls_are_shown_apart_from_the_text() -> None:
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome"}}\n</tool_call>'
    text, shown = render(f"Let me look.\n\n{call}")
    assert text == "<p>Let me look.</p>\n"
    assert "Tool call: <code>weather</code>" in shown
    assert "Rome" in shown
    assert len(render(f"{call}\n{call}")) == 2


CARDS = {
    "hermes": '<tool_call>\n{"name": "weather", "arguments": {"city": "Rome", "days": 2}}\n</tool_call>',
    "llama": '{"name": "weather", "parameters": {"city": "Rome", "days": 2}}',
    "mistral": '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Rome", "days": 2}}]',
    "mistral-without-tag": '[{"name": "weather", "arguments": {"city": "Rome", "days": 2}}]',
    "xml": "<tool_call>\n<function=weather>\n<parameter=city>\nRome\n</parameter>\n<parameter=days>\n2\n</parameter>\n"
    "</function>\n</tool_call>",
    "python": '[weather(city="Rome", days=2)]',
}


@pytest.mark.parametrize("name", CARDS)
def test_calls_in_every_format_are_cards(name: str) -> None:
    (card,) = render(CARDS[name])
    assert "Tool call: <code>weather</code>" in card
    shown = re.sub("<[^>]+>", "", card)
    assert '"city": "Rome"' in shown
    assert re.search(r'"days": "?2', shown)
    growing = AnswerBlocks()
    for end in range(len(CARDS[name])):
        assert "".join(growing.update(CARDS[name][:end])) or end < 2
    assert growing.update(CARDS[name]) == (card,)


@pytest.mark.parametrize(
    "text",
    [
        '{"name": "Rome", "population": 3}',
        '[{"name": "Rome"}]',
        "[link](https://example.com)",
        "[f(x)](https://example.com)",
        "[one(1), two(2)]",
        '[weather(city="Rome")] is how you write it',
    ],
)
def test_text_that_begins_like_a_call_stays_text(text: str) -> None:
    assert "Tool call" not in "".join(render(text))


def test_growing_text_gives_the_blocks_of_the_whole_text() -> None:
    text = "# Title\n\nSome *text*\nwent on.\n\n- a\n- b\n\n  more\n\n```python\ndef f():\n    pass\n\n```\n"
    text += "\n|a|\n|-|\n|1|\n"
    growing = AnswerBlocks()
    for end in range(len(text) + 1):
        blocks = growing.update(text[:end])
    assert blocks == render(text)
    assert growing.update("Another text") == render("Another text")


@pytest.mark.parametrize(
    "text", ["*" * 30_000, "[" * 30_000, "> " * 5_000, "`" * 30_001, "a " * 50_000, "```\n" + "x" * 200_000]
)
def test_absurd_text_is_rendered_in_reasonable_time(text: str) -> None:
    assert "".join(render(text))
