"""`Thinking`: separates reasoning from the answer, for endpoints that leave it between `<think>` and `</think>`.

Servers without a reasoning parser do that for DeepSeek-R1, QwQ and many other models.
"""

from __future__ import annotations

from collections.abc import Iterator

from llm_edge.runtime.text.holdback import TagSplitter


class Thinking:
    """Separates the text of one answer. White space around the tags is dropped.

    Args:
        enabled: False = everything is answer.

    Attributes:
        inside: the text to come is reasoning, as far as is known.
    """

    def __init__(self, enabled: bool = True) -> None:
        self.inside = False
        self._tags = TagSplitter("<think>", "</think>") if enabled else None
        self._after_tag = False  # nothing but white space since
        self._space = ""  # held back: a tag may follow

    def push(self, text: str) -> Iterator[tuple[str, bool]]:
        """Add text; yields what is final now, and whether it is reasoning."""
        if self._tags is None:
            yield text, False
            return
        first, *others = self._tags.push(text)
        yield from self._section(first)
        for part in others:
            self.inside, self._after_tag, self._space = not self.inside, True, ""
            yield from self._section(part)

    def flush(self) -> Iterator[tuple[str, bool]]:
        """Yield the text that is held back, because no more text follows."""
        held = self._space + (self._tags.flush() if self._tags is not None else "")
        if held:
            yield held, self.inside

    def _section(self, text: str) -> Iterator[tuple[str, bool]]:
        text = self._space + (text.lstrip() if self._after_tag else text)
        final = text.rstrip() if self.inside or not text.strip() else text
        self._space = text[len(final) :]
        if final:
            self._after_tag = False
            yield final, self.inside
