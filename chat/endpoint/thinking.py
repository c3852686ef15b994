"""Takes reasoning out of the text of an answer, for endpoints that leave it there between `<think>` and `</think>`.

Servers do that which run a reasoning model without a parser for it; DeepSeek-R1, QwQ and many others write these tags.
Knows no network.
"""

from __future__ import annotations

from collections.abc import Iterator

from llm_edge.runtime.text.tokenizer import overlap

_START, _END = "<think>", "</think>"


class Thinking:
    """The texts of one answer, in order.

    Only what begins the answer is reasoning: further on, an answer may speak of the tags. The tags and the white space
    around them are left out, and what may still become a tag is held back.

    Args:
        looked_for: False = all is answer.

    Attributes:
        inside: the reasoning has begun and not ended.
    """

    def __init__(self, looked_for: bool = True) -> None:
        self.inside = False
        self._may_begin = looked_for
        self._behind_tag = False  # nothing but white space came since
        self._held = ""

    def push(self, text: str) -> Iterator[tuple[str, bool]]:
        """What is certain now: parts of the text, and whether each is reasoning."""
        text, self._held = self._held + text, ""
        if self._may_begin:
            lead = text.lstrip()
            if _START.startswith(lead):
                self._held = text
                return
            self._may_begin = False
            if lead.startswith(_START):
                self.inside = self._behind_tag = True
                text = lead.removeprefix(_START)
        if self.inside:
            thought, end, text = text.partition(_END)
            if not end:
                certain = thought[: len(thought) - overlap(thought, _END)].rstrip()
                self._held = thought.removeprefix(certain)
                yield from self._part(certain)
                return
            yield from self._part(thought.rstrip())
            self.inside, self._behind_tag = False, True
        yield from self._part(text)

    def flush(self) -> Iterator[tuple[str, bool]]:
        """What was held back, once nothing more comes."""
        held, self._held = self._held, ""
        yield from self._part(held)

    def _part(self, text: str) -> Iterator[tuple[str, bool]]:
        if self._behind_tag:
            text = text.lstrip()
        if text:
            self._behind_tag = False
            yield text, self.inside
