"""`Responder`: a model as the chat uses it; `LocalResponder` is a bundle on this machine."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from llm_edge.runtime.errors import LlmEdgeError
from llm_edge.runtime.results import GenerationChunk
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.runtime.text.prompts import Message
from llm_edge.runtime.text.token_text import token_text

if TYPE_CHECKING:
    from llm_edge.runtime.base_model import BaseModel

_MAX_COUNTED = 50_000  # characters of a question


class Reply(Protocol):
    """An answer being generated."""

    def __iter__(self) -> Iterator[GenerationChunk]:
        """The chunks; the last one has a `finish_reason` and `timings`."""

    def cancel(self) -> None:
        """End the generation within one step. Thread-safe."""

    def adjust(self, params: SamplingParams) -> None:
        """Use these parameters from the next token on, where the model allows it; may be called from any thread."""


class Responder(Protocol):
    """A model that answers conversations, one at a time.

    Attributes:
        name: the model's name.
        detail: its precision, or its host.
        context_length: maximum number of tokens of prompt and answer; None = unknown.
        default_params: the model's defaults.
        settings_key: tells models apart whose parameters are kept separately.
        unsupported: names of parameters that it does not take.
        adjusts: whether replies can be adjusted while they are generated.
        continues_thoughts: whether unfinished reasoning can be continued.
    """

    name: str
    detail: str
    context_length: int | None
    default_params: SamplingParams
    settings_key: str
    unsupported: frozenset[str]
    adjusts: bool
    continues_thoughts: bool

    def answer(
        self,
        messages: Sequence[Message],
        params: SamplingParams,
        *,
        assistant_prefix: str = "",
        reasoning_prefix: str = "",
        template_variables: Mapping[str, Any] | None = None,
    ) -> Reply:
        """Start an answer.

        Args:
            messages: the conversation, including a system prompt.
            params: sampling parameters.
            assistant_prefix: start of the answer, which the reply continues.
            reasoning_prefix: start of its reasoning.
            template_variables: variables of the chat template, such as `enable_thinking`.
        """

    def count(self, messages: Sequence[Message]) -> int | None:
        """Number of prompt tokens of a conversation; None = unknown."""

    def token_text(self, token: int) -> str:
        """A token's text; its spelling in the vocabulary if it is part of a character."""

    def close(self) -> None:
        """Release what the model holds."""


def tokens_of_question(responder: Responder | None, text: str, *, first: bool) -> int:
    """Number of tokens that a question adds to the context; estimated for long ones, 0 if unknown.

    Args:
        responder: counts.
        text: the question.
        first: it starts a conversation, so what the chat template adds before it counts too.
    """
    if responder is None or not text.strip():
        return 0
    share = max(len(text) / _MAX_COUNTED, 1.0)
    try:
        count = responder.count([{"role": "user", "content": text[:_MAX_COUNTED]}]) or 0
        if count and not first:
            count -= responder.count([{"role": "user", "content": ""}]) or 0
    except LlmEdgeError:  # reported when the question is asked
        return 0
    return round(count * share)


class LocalResponder:
    """A `Responder` for a bundle on this machine."""

    unsupported: frozenset[str] = frozenset()
    adjusts = True
    continues_thoughts = True

    def __init__(self, model: BaseModel[Any]) -> None:
        self._model = model
        self.path = model.bundle.path
        self.name = self.settings_key = model.bundle.name
        self.detail = model.precision.name
        self.provider = model.provider
        self.context_length: int | None = model.context_length
        self.default_params = model.default_params

    def answer(
        self,
        messages: Sequence[Message],
        params: SamplingParams,
        *,
        assistant_prefix: str = "",
        reasoning_prefix: str = "",
        template_variables: Mapping[str, Any] | None = None,
    ) -> Reply:
        reply: Reply = self._model.chat(
            messages,
            params,
            assistant_prefix=assistant_prefix,
            reasoning_prefix=reasoning_prefix,
            template_variables=template_variables,
        )
        return reply

    def count(self, messages: Sequence[Message]) -> int | None:
        return len(self._model.encode_chat(messages))

    def token_text(self, token: int) -> str:
        return token_text(self._model.tokenizer, token)

    def close(self) -> None:
        from llm_edge.runtime.model import Model  # loaded already, if it is one

        if isinstance(self._model, Model):  # an engine is shared, and manages its cache itself
            self._model.clear_cache()
