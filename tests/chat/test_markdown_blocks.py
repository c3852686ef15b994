"""Markdown that grows: only its last blocks are rendered again, and the result is that of the whole text."""

from __future__ import annotations

from llm_edge.chat.markdown_blocks import MarkdownBlocks

TEXT = "# One\n\nTwo\nwent on\n===\n\n- three\n- four\n\n```\nfive\n\nsix\n```\n\n> seven\n\neight\n"


def test_blocks_are_those_of_the_whole_text_however_it_grows() -> None:
    whole = MarkdownBlocks(str).update(TEXT)
    assert "".join(whole) == TEXT
    for step in (1, 3, 7):
        growing = MarkdownBlocks(str)
        for end in range(0, len(TEXT) + step, step):
            assert "".join(growing.update(TEXT[:end])) == TEXT[:end]
        assert growing.update(TEXT) == whole


def test_only_the_last_two_blocks_are_rendered_again() -> None:
    rendered: list[str] = []

    def render(block: str) -> str:
        rendered.append(block)
        return block

    blocks = MarkdownBlocks(render)
    blocks.update("a\n\nb\n\nc\n\nd\n\n")
    rendered.clear()
    blocks.update("a\n\nb\n\nc\n\nd\n\ne")
    assert all(block.strip() in ("c", "d", "e") for block in rendered)
    assert blocks.update("another") == ["another"]
