"""Rendering Markdown as lines: independent of how the text is split, and without control sequences."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from llm_edge.tui.widgets.markdown import Line, MarkdownLines, code_blocks

BLOCKS = (
    """# Title\n|\n|\n\n|text |more text\n|- item\n|  - inner\n|1. one\n|```python\n|x = 1\n|```\n|> quoted\n|---\n"""
)
SPANS = """    code\n|**bold** |`code` |[a](b) |<b>|&amp;|* other\n|===\n"""
PIECES = st.sampled_from([*BLOCKS.split("|"), *SPANS.split("|"), "| a | b |\n", "|---|---|\n", "| 1 | 2 |\n"])


def texts(lines: list[Line]) -> list[str]:
    return ["".join(segment.text for segment in line).rstrip() for line in lines]


@given(st.lists(PIECES, max_size=30), st.integers(1, 7))
@settings(max_examples=150, deadline=None)
def test_lines_do_not_depend_on_how_the_text_is_split(parts: list[str], size: int) -> None:
    whole = "".join(parts)
    growing = MarkdownLines()
    for end in range(size, len(whole) + size, size):
        found = growing.lines(whole[:end], 40)
    if whole:
        assert texts(found) == texts(MarkdownLines().lines(whole, 40))


def test_a_code_block_is_shown_while_open_and_when_closed() -> None:
    text = "Look:\n\n```python\ndef greet():\n    return 1\n```\n\nDone."
    growing = MarkdownLines()
    for end in range(1, len(text) + 1):
        shown = "\n".join(texts(growing.lines(text[:end], 60)))
        if "def greet" in text[:end]:
            assert "def greet" in shown
    assert "return 1" in shown
    assert "```" not in shown
    assert shown.endswith("Done.")
    styles = {segment.text.strip(): segment.style for line in growing.lines(text, 60) for segment in line}
    assert styles["def"] is not None
    assert styles["def"].color is not None
    assert styles["def"].color != styles["Done."].color if styles["Done."] is not None else True


def test_lines_contain_no_control_sequences() -> None:
    evil = "a\x1b]52;c;aGk=\x07b \x9b31m &#x202e;c &#27;[2J `x\x1b[31m`\n\n```\n\x1b[0m\u2066\n```\n[l](http://x\x1b/)"
    shown = "\n".join(texts(MarkdownLines().lines(evil, 60)))
    assert not {"\x1b", "\x07", "\x9b", "\u202e", "\u2066"} & set(shown)


def test_lines_fit_the_width() -> None:
    text = "word " * 50 + "\n\n```\n" + "x" * 300 + "\n```\n\n| " + "cell " * 30 + "| b |\n|---|---|\n| 1 | 2 |\n"
    for width in (20, 60):
        assert max(map(len, texts(MarkdownLines().lines(text, width)))) <= width


def test_a_huge_block_is_shown_unformatted() -> None:
    shown = texts(MarkdownLines().lines("*a" * 25_000, 100))
    assert "".join(shown) == "*a" * 25_000
    code = "\n".join(f"line {number}" for number in range(1000))
    assert [line.strip() for line in texts(MarkdownLines().lines(f"```\n{code}\n```", 40))] == code.split("\n")


def test_code_blocks_are_found() -> None:
    assert code_blocks("a\n```py\nx = 1\n```\nb\n\n    indented\n") == ["x = 1\n", "indented\n"]
    assert code_blocks("none") == []
