"""Renders Markdown that grows as lines for a terminal."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import ClassVar

from pygments.styles import get_style_by_name
from rich.color import Color
from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
from rich.markdown import CodeBlock, Heading, Markdown, MarkdownElement
from rich.segment import Segment
from rich.style import Style
from rich.syntax import Syntax
from rich.text import Text
from rich.theme import Theme

from llm_edge.chat.markdown_blocks import MAX_BLOCK, MAX_CODE_LINE, MAX_PARAGRAPH, MarkdownBlocks, parser
from llm_edge.chat.text import printable

# Colors that are legible on the background of code; on a dark one, the rest of rich's defaults are.
_ON_DARK = {"markdown.block_quote": Style(color="#d0a8e8")}
_ON_LIGHT = {
    "markdown.link": Style(color="#0b4fb3"),
    "markdown.link_url": Style(color="#0b4fb3", underline=True),
    "markdown.block_quote": Style(color="#6b2d7c"),
    "markdown.table.header": Style(color="#00586b", bold=True),
    "markdown.table.border": Style(color="#00586b"),
    "markdown.item.number": Style(color="#00586b"),
    "markdown.hr": Style(color="#555555"),
}

Line = list[Segment]
"""The segments of one line, without a line break."""

_CODE_CHUNK = 50  # lines of code that are highlighted together, so that a growing block costs no more when it is long


class _Heading(Heading):
    """A heading aligned to the left."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        self.text.justify = "left"
        yield self.text


class _CodeBlock(CodeBlock):
    """A code block with a background up to the right edge."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).rstrip()
        yield Syntax(code, self.lexer_name, theme=self.theme, word_wrap=True, padding=(0, 1), tab_size=4)


class _Blocks(Markdown):
    elements: ClassVar[dict[str, type[MarkdownElement]]] = {
        **Markdown.elements,
        "heading_open": _Heading,
        "fence": _CodeBlock,
        "code_block": _CodeBlock,
    }


class MarkdownLines:
    """Renders a Markdown text as lines; the result does not depend on how the text has grown."""

    def __init__(self, code_theme: str = "monokai") -> None:
        self.code_theme = code_theme
        self._parser = parser()
        self._parser.core.ruler.enableOnly(["normalize", "block"])
        self._blocks = MarkdownBlocks(self._render)
        self._width = 0

    def lines(self, text: str, width: int) -> list[Line]:
        """The lines of a text; if it continues the previous one, only its last blocks are rendered."""
        if width != self._width:
            self._width, self._blocks = width, MarkdownBlocks(self._render)
        found: list[Line] = []
        for lines in self._blocks.update(text):
            if found and lines:
                found.append([])
            found += lines
        return found

    def _render(self, text: str) -> list[Line]:
        """A block's lines, free of control characters, including those written as Markdown entities."""
        tokens = self._parser.parse(text)
        if len(tokens) == 1 and tokens[0].type in ("fence", "code_block"):
            lines = printable(tokens[0].content).expandtabs(4).rstrip().split("\n")
            language = tokens[0].info.strip().partition(" ")[0]
            chunks = ("\n".join(lines[start : start + _CODE_CHUNK]) for start in range(0, len(lines), _CODE_CHUNK))
            return [line for chunk in chunks for line in _code(chunk, language, self.code_theme, self._width)]
        shown = printable(text).expandtabs(4)
        spans = (len(token.content) for token in tokens if token.type == "inline")
        if len(text) > MAX_BLOCK or max(spans, default=0) > MAX_PARAGRAPH:
            return _lines(Text(shown), self._width, self.code_theme)
        return _trimmed(
            _lines(_Blocks(shown, code_theme=self.code_theme, hyperlinks=False), self._width, self.code_theme)
        )


@functools.lru_cache(maxsize=256)
def _code(code: str, language: str, theme: str, width: int) -> list[Line]:
    """Highlighted code with a background up to the right edge."""
    lexer = language or "text"
    if max(map(len, code.split("\n"))) > MAX_CODE_LINE:
        lexer = "text"
    return _lines(Syntax(code, lexer, theme=theme, word_wrap=True, padding=(0, 1), tab_size=4), width, theme)


@functools.cache
def _console(code_theme: str) -> Console:
    """A console for Markdown; inline code has the same background as code blocks."""
    background = get_style_by_name(code_theme).background_color
    light = sum(Color.parse(background).get_truecolor()) > 3 * 128
    styles = {
        **(_ON_LIGHT if light else _ON_DARK),
        "markdown.code": Style(bold=True, color="#202020" if light else "cyan", bgcolor=background),
    }
    return Console(color_system="truecolor", force_terminal=True, width=80, legacy_windows=False, theme=Theme(styles))


def _lines(whole: RenderableType, width: int, code_theme: str) -> list[Line]:
    console = _console(code_theme)
    options = console.options.update(width=max(width, 8), height=None)
    lines = console.render_lines(whole, options, pad=False, new_lines=False)
    return [[Segment(printable(each.text), each.style) for each in line] for line in lines]


def code_blocks(text: str) -> list[str]:
    """The code blocks of a Markdown text, without their fences."""
    return [token.content for token in parser().parse(text) if token.type in ("fence", "code_block")]


def _trimmed(lines: Sequence[Line]) -> list[Line]:
    """The lines without empty ones at the start and end."""
    full = [index for index, line in enumerate(lines) if any(segment.text.strip() for segment in line)]
    return list(lines[full[0] : full[-1] + 1]) if full else []
