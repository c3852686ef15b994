"""Who answers in a chat, as the chat sees it, and a bundle on this machine as one of them. Knows no widgets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

from llm_edge.runtime.errors import LlmEdgeError
from llm_edge.runtime.results import GenerationChunk
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.runtime.text.prompts import Message

_COUNTED = 50_000  # characters


class Reply(Protocol):
    """An answer on its way."""

    def __iter__(self) -> Iterator[GenerationChunk]:
        """The pieces; the last one has a `finish_reason` and `timings`."""

    def cancel(self) -> None:
        """End it soon; from any thread."""

    def adjust(self, params: SamplingParams) -> None:
        """Draw by these parameters from the next token on, as far as that can be; from any thread."""


class Responder(Protocol):
    """A model that answers conversations, one at a time.

    Attributes:
        name: of the model, and
        detail: its precision, or where it is.
        context_length: tokens that prompt and answer hold together; None where nobody says.
        default_params: the model's own.
        adjusts: whether its replies can be adjusted while they come.
        continues_thoughts: whether it can go on with a reasoning that no answer follows yet.
    """

    name: str
    detail: str
    context_length: int | None
    default_params: SamplingParams
    adjusts: bool
    continues_thoughts: bool

    def answer(
        self,
        messages: Sequence[Message],
        params: SamplingParams,
        *,
        assistant_prefix: str = "",
        reasoning_prefix: str = "",
    ) -> Reply:
        """Begin an answer.

        Args:
            messages: the conversation, a system prompt among it.
            params: how to draw.
            begin: what the answer begins with already; what comes continues it, and so it does
            thought: what its reasoning begins with.
        """

    def count(self, messages: Sequence[Message]) -> int | None:
        """Tokens of the prompt that a conversation makes; None where that cannot be known."""

    def token_text(self, token: int) -> str:
        """What a token says; how the vocabulary writes it where that is no text of its own."""

    def close(self) -> None:
        """Let everything go."""


def tokens_of_question(responder: Responder | None, text: str, *, first: bool) -> int:
    """Tokens that a question will take of the context, as far as that can be told; a long one's are estimated.

    Args:
        responder: counts; None = nobody.
        text: the question.
        first: whether it begins a conversation: what a template says before the first question counts too.
    """
    if responder is None or not text.strip():
        return 0
    share = max(len(text) / _COUNTED, 1.0)
    try:
        count = responder.count([{"role": "user", "content": text[:_COUNTED]}]) or 0
        if count and not first:
            count -= responder.count([{"role": "user", "content": ""}]) or 0
    except LlmEdgeError:  # it will be told once it is asked
        return 0
    return round(count * share)


class LocalResponder:
    """A bundle on this machine; see `Responder`."""

    adjusts = True
    continues_thoughts = True

    def __init__(
        self,
        bundle: Path,
        precision: str | None,
        provider: str = "auto",
        threads: int | None = None,
        draft: Path | None = None,
    ) -> None:
        from llm_edge.runtime.model import Model  # takes its time, which a thread beside the screen has

        self._model = Model.load(bundle, precision, provider=provider, threads=threads, draft=draft)
        self.path = self._model.bundle.path
        self.name = self._model.bundle.name
        self.detail = self._model.precision.name
        self.context_length: int | None = self._model.context_length
        self.default_params = self._model.default_params

    def answer(
        self,
        messages: Sequence[Message],
        params: SamplingParams,
        *,
        assistant_prefix: str = "",
        reasoning_prefix: str = "",
    ) -> Reply:
        """See `Responder`."""
        return self._model.chat(messages, params, assistant_prefix=assistant_prefix, reasoning_prefix=reasoning_prefix)

    def count(self, messages: Sequence[Message]) -> int | None:
        """See `Responder`."""
        return len(self._model.encode_chat(messages))

    def token_text(self, token: int) -> str:
        """See `Responder`."""
        tokenizer = self._model.tokenizer
        once = tokenizer.decode([token], skip_special=False)
        text = tokenizer.decode([token, token], skip_special=False)[len(once) :]  # decoders may trim what stands first
        if text and "\ufffd" not in text:
            return text
        return tokenizer.token_text(token) or f"<{token}>"  # a part of a character

    def close(self) -> None:
        """See `Responder`."""
        self._model.clear_cache()
