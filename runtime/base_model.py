"""What `Model` and `Engine` have in common for those who call them. Knows no graph and no thread."""

from __future__ import annotations

import abc
import time
from collections.abc import Mapping, Sequence
from typing import Any, Generic, TypeVar

from llm_edge.runtime.bundle import Bundle, PrecisionInfo
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.runtime.text.prompts import Message, PromptProcessor
from llm_edge.runtime.text.tokenizer import Tokenizer

Reply = TypeVar("Reply")


class BaseModel(abc.ABC, Generic[Reply]):
    """A bundle that answers.

    Attributes:
        bundle: what was loaded, and
        tokenizer: its own, and
        precision: which of its graphs.
        context_length: tokens that prompt and answer hold together at most.
        default_params: the model's own sampling, from its generation_config.json and the guards of its manifest.
    """

    def __init__(self, bundle: Bundle, tokenizer: Tokenizer, precision: PrecisionInfo, limit: int) -> None:
        self.bundle = bundle
        self.tokenizer = tokenizer
        self.precision = precision
        self.context_length = limit
        self._text = PromptProcessor(bundle, tokenizer)
        self.default_params = self._text.default_params
        self.encode_chat = self._text.encode_chat

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        template_variables: Mapping[str, Any] | None = None,
        begin: str = "",
        thought: str = "",
    ) -> Reply:
        """Answer a conversation in the model's own chat format; see `PromptProcessor.encode_chat`.

        Args:
            messages: the conversation.
            params: None for `default_params`.
            template_variables: what the chat template knows beyond the messages, as `enable_thinking` or `tools`.
            begin: what the answer begins with already; what comes continues it, and so it does
            thought: what its reasoning begins with; all of it, where there is a `begin`.

        Raises:
            ParameterError: `template_variables` is no mapping, or the constraint cannot be used.
            TemplateError: the model has no chat template, or it refuses these messages or variables.
            ContextLengthError: the conversation does not fit.
            BusyError: (`Engine`) too many requests are waiting.
        """
        began = time.perf_counter()
        tokens = self.encode_chat(messages, template_variables)
        if begin or thought:
            tokens = self._text.continued(tokens, begin, thought)
        return self._begin(tokens, params, began)

    def generate(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Reply:
        """Continue a text (plain text: special tokens spelled in it stay text) or a list of token ids.

        Raises:
            ParameterError: the prompt is empty or holds ids outside of the vocabulary, or a constraint cannot be used.
            ContextLengthError: the prompt does not fit.
            BusyError: (`Engine`) too many requests are waiting.
        """
        began = time.perf_counter()
        return self._begin(self._text.encode_prompt(prompt), params, began)

    @abc.abstractmethod
    def _begin(self, tokens: list[int], params: SamplingParams | None, began: float) -> Reply:
        """Begin an answer; `began` is when the caller asked, by `time.perf_counter`."""
