"""`TitleWriter`: asks the model for a title of a conversation whose first question makes a poor one."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from llm_edge.chat.attachments import split_attachments
from llm_edge.chat.history.conversation import TITLE_LENGTH, USER, Conversation, title_of
from llm_edge.chat.responder import Responder
from llm_edge.chat.running_answer import DeferredReply
from llm_edge.chat.stream_reader import StreamReader
from llm_edge.chat.text import one_line, printable
from llm_edge.runtime.errors import LlmEdgeError
from llm_edge.runtime.results import GenerationChunk
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.runtime.text.prompts import Message as Prompt

_REQUEST = "Write a title for this conversation, of at most six words. Answer with the title only."
_PARAMS = SamplingParams(temperature=0.0, max_tokens=24)
_MAX_WORDS = 10
# A first question that is one of these is replaced as the title once there is a second one.
_GREETINGS = {
    "hi",
    "hello",
    "hey",
    "hi there",
    "hello there",
    "good morning",
    "hallo",
    "hola",
    "bonjour",
    "ciao",
    "test",
}
_EXCERPT = 1_000  # characters of each message that an endpoint is sent again


def needs_title(conversation: Conversation) -> bool:
    """Whether the title was taken from a first question that is too long, a greeting, or only files."""
    path = conversation.path()
    if len(path) not in (2, 4) or path[0].role != USER or conversation.title != title_of(path[0].content):
        return False
    attachments, question = split_attachments(path[0].content)
    if len(path) == 2:
        return (bool(attachments) and not question.strip()) or conversation.title.endswith("…")
    return question.strip(" !.,?\n").lower() in _GREETINGS


def cleaned_title(text: str) -> str:
    """The title in a model's answer; empty if it is not usable."""
    line = next((line for line in printable(text).splitlines() if line.strip()), "")
    line = re.sub(r"^\W*title\s*:", "", line.strip().strip("*#"), flags=re.IGNORECASE)
    line = one_line(line.strip("\"'`*_ \u201c\u201d\u2018\u2019").rstrip("."))
    usable = 2 < len(line) <= TITLE_LENGTH and len(line.split()) <= _MAX_WORDS and re.search(r"\w", line)
    return line if usable else ""


class TitleWriter:
    """A title while it is generated; `poll` until it has ended, or `cancel`."""

    def __init__(self, responder: Responder, messages: Sequence[Prompt]) -> None:
        if not responder.adjusts:  # an endpoint, which would read everything again
            messages = [{**each, "content": str(each["content"])[:_EXCERPT]} for each in messages]
        request: list[Prompt] = [*messages, {"role": "user", "content": _REQUEST}]
        variables: dict[str, Any] = {"enable_thinking": False} if responder.adjusts else {}
        self._text = ""
        self._reader: StreamReader[GenerationChunk] = StreamReader(
            DeferredReply(lambda: responder.answer(request, _PARAMS, template_variables=variables))
        )

    def poll(self) -> str | None:
        """The title once it has ended, empty if it is not usable; None while it is generated."""
        for item in self._reader.drain():
            if isinstance(item, LlmEdgeError):
                return ""
            if not item.reasoning:
                self._text += item.text
            if item.finish_reason is not None:
                return cleaned_title(self._text)
        return None

    def cancel(self) -> None:
        """Stop, and wait for the end."""
        self._reader.cancel()
        self._reader.join()
