"""Renders answers as HTML that is safe whatever the model wrote.

Markdown is parsed without HTML, and the result passes an allow-list of tags and attributes. Pictures become links,
because loading one would tell another server about the conversation.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Sequence
from html import escape
from typing import Any

import nh3
from markdown_it import MarkdownIt
from markdown_it.renderer import RendererHTML
from markdown_it.token import Token
from markdown_it.utils import OptionsDict
from pygments import highlight
from pygments.formatters.html import HtmlFormatter
from pygments.lexers import get_lexer_by_name
from pygments.util import ClassNotFound

from llm_edge.chat.markdown_blocks import MAX_BLOCK, MAX_CODE_LINE, MAX_PARAGRAPH, MarkdownBlocks, parser
from llm_edge.chat.text import printable
from llm_edge.server.web.tool_cards import ShownCall, find_calls

_MAX_HIGHLIGHTED = 40_000  # characters of a code block
_TAGS = {
    *("p", "br", "hr", "h1", "h2", "h3", "h4", "h5", "h6", "strong", "em", "s", "code", "pre", "span", "blockquote"),
    *("ul", "ol", "li", "a", "table", "thead", "tbody", "tr", "th", "td", "details", "summary"),
}
_SCHEMES = ("http", "https", "mailto")
_ATTRIBUTES = {
    "a": {"href", "title"},
    "code": {"class"},
    "details": {"class", "open"},
    "ol": {"start"},
    "pre": {"class", "data-language"},
    "span": {"class"},
    "td": {"class"},
    "th": {"class"},
}
_FORMATTER = HtmlFormatter(nowrap=True, classprefix="t-")


class AnswerBlocks:
    """The blocks of an answer that grows, as HTML."""

    def __init__(self) -> None:
        self._blocks = MarkdownBlocks(render_block)

    def update(self, text: str) -> tuple[str, ...]:
        """The blocks of a text; if it continues the previous one, only its last blocks are rendered."""
        before, calls = find_calls(text.lstrip("\n"))
        shown = [_call(part) if isinstance(part, ShownCall) else render_block(part) for part in calls]
        return (*self._blocks.update(before), *shown)


@functools.lru_cache(maxsize=512)
def render(text: str) -> tuple[str, ...]:
    """The blocks of a whole answer, as HTML."""
    return AnswerBlocks().update(text)


def render_block(text: str) -> str:
    """A block of Markdown as HTML, free of control characters."""
    shown = printable(text).expandtabs(4)
    tokens = _outline_parser().parse(shown)
    spans = (len(token.content) for token in tokens if token.type == "inline")
    if max(spans, default=0) > MAX_PARAGRAPH or (len(text) > MAX_BLOCK and tokens[0].type != "fence"):
        return _clean(f'<pre class="plain">{escape(shown)}</pre>')
    return _clean(str(_markdown().render(shown)))


@functools.cache
def _markdown() -> MarkdownIt:
    found = parser().disable("image")
    found.options["html"] = False
    found.renderer = _Renderer()
    return found


@functools.cache
def _outline_parser() -> MarkdownIt:
    """Finds blocks only: what stands in them may take too long to parse."""
    found = parser()
    found.core.ruler.enableOnly(["normalize", "block"])
    return found


def _clean(html: str) -> str:
    return nh3.clean(
        html,
        tags=_TAGS,
        attributes=_ATTRIBUTES,
        url_schemes=set(_SCHEMES),
        attribute_filter=lambda _tag, name, value: value if name != "href" or _absolute(value) else None,
        link_rel="noopener noreferrer nofollow",
        set_tag_attribute_values={"a": {"target": "_blank"}},
    )


def _absolute(url: str) -> bool:
    """Whether a link leads to another site: one to a path would call our own API."""
    return url.partition(":")[0].lower() in _SCHEMES


class _Renderer(RendererHTML):
    """Highlights code, and aligns table cells by class: the page allows no inline styles."""

    def fence(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: Any) -> str:  # noqa: ARG002
        token = tokens[idx]
        language = token.info.strip().partition(" ")[0][:40]
        name = f' data-language="{escape(language)}"' if language else ""
        return f"<pre{name}><code>{_code(token.content, language)}</code></pre>"

    def code_block(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: Any) -> str:  # noqa: ARG002
        return f"<pre><code>{escape(tokens[idx].content)}</code></pre>"

    def th_open(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: Any) -> str:  # noqa: ARG002
        return _cell("th", tokens[idx])

    def td_open(self, tokens: Sequence[Token], idx: int, options: OptionsDict, env: Any) -> str:  # noqa: ARG002
        return _cell("td", tokens[idx])


def _cell(tag: str, token: Token) -> str:
    side = str(token.attrs.get("style", "")).partition("text-align:")[2]
    return f'<{tag} class="{escape(side)}">' if side else f"<{tag}>"


def _code(code: str, language: str) -> str:
    long = len(code) > _MAX_HIGHLIGHTED or max(map(len, code.split("\n"))) > MAX_CODE_LINE
    if not language or long:
        return escape(code)
    try:
        lexer = get_lexer_by_name(language, stripnl=False)
    except ClassNotFound:
        return escape(code)
    return str(highlight(code, lexer, _FORMATTER))


def _call(call: ShownCall) -> str:
    if not call.name:
        return _clean(f"<pre><code>{escape(printable(call.arguments))}</code></pre>")
    try:
        arguments = json.dumps(json.loads(call.arguments), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        arguments = call.arguments
    code = _code(printable(arguments), "json")
    title = f"<summary>Tool call: <code>{escape(printable(call.name))}</code></summary>"
    shown = f'<pre data-language="json"><code>{code}</code></pre>'
    return _clean(f'<details class="call" open>{title}{shown}</details>')
