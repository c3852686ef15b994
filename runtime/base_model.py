"""`BaseModel`: the interface that `Model` and `Engine` share."""

from __future__ import annotations

import abc
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from llm_edge.runtime.bundle import Bundle, PrecisionInfo
from llm_edge.runtime.loading import LoadedBundle
from llm_edge.runtime.process import ProcessBound

if TYPE_CHECKING:  # `load` imports these while it waits for onnxruntime
    from llm_edge.runtime.sampling.params import SamplingParams
    from llm_edge.runtime.scheduling.sequence import TokenSequence
    from llm_edge.runtime.speculative.draft_model import DraftModel
    from llm_edge.runtime.text.prompts import Message
    from llm_edge.runtime.text.tokenizer import Tokenizer

Handle = TypeVar("Handle")
"""What a call returns: `Generation` or `AsyncGeneration`."""


class BaseModel(ProcessBound, abc.ABC, Generic[Handle]):
    """A loaded bundle that generates text, in the process that loaded it.

    Attributes:
        bundle: the folder.
        tokenizer: the bundle's tokenizer.
        precision: the graph that was loaded.
        provider: `cpu` or `cuda`.
        context_length: maximum number of tokens in prompt and answer together.
        default_params: the model's default sampling, from generation_config.json and the manifest's guards.
        speculative: propose and verify draft tokens; may be changed between calls.
    """

    def __init__(self, loaded: LoadedBundle, draft: DraftModel | None, speculative: bool) -> None:
        from llm_edge.runtime.scheduling.sequence_factory import SequenceFactory
        from llm_edge.runtime.text.prompts import PromptFormat, PromptProcessor

        super().__init__()
        self.bundle: Bundle = loaded.bundle
        self.tokenizer: Tokenizer = loaded.tokenizer
        self.precision: PrecisionInfo = loaded.precision
        self.provider: str = loaded.session.provider
        self.context_length: int = loaded.session.limit
        self.speculative = speculative
        self._draft = draft
        self._prompts = PromptProcessor(PromptFormat.of_bundle(loaded.bundle), loaded.tokenizer)
        shape = loaded.bundle.shape
        self._sequences = SequenceFactory(
            self._prompts, self.context_length, has_states=shape.has_states, has_windows=shape.window > 0
        )
        self.default_params = self._prompts.default_params
        self.encode_chat = self._prompts.encode_chat
        self.encode_prompt = self._prompts.encode_prompt

    def chat(
        self,
        messages: Sequence[Message],
        params: SamplingParams | None = None,
        *,
        template_variables: Mapping[str, Any] | None = None,
        assistant_prefix: str = "",
        reasoning_prefix: str = "",
    ) -> Handle:
        """Answer a conversation in the model's chat format; see `PromptProcessor.encode_chat`.

        Args:
            messages: the conversation.
            params: None = `default_params`.
            template_variables: further variables of the chat template, such as `enable_thinking` or `tools`.
            assistant_prefix: beginning of the answer, which the model continues.
            reasoning_prefix: beginning of the reasoning, or all of it if there is an `assistant_prefix`.

        Raises:
            ParameterError: `template_variables` is not a mapping, or the constraint cannot be used.
            TemplateError: the model has no chat template, or it rejects these messages or variables.
            ContextLengthError: the conversation does not fit.
            BusyError: (`Engine`) too many requests are waiting.
            ProcessError: in a forked process.
        """
        self.check_process()
        began = time.perf_counter()
        tokens = self.encode_chat(
            messages, template_variables, assistant_prefix=assistant_prefix, reasoning_prefix=reasoning_prefix
        )
        return self._start(tokens, params, began)

    def generate(self, prompt: str | Sequence[int], params: SamplingParams | None = None) -> Handle:
        """Continue a plain text (special tokens spelled in it stay text) or a list of token ids.

        Raises:
            ParameterError: the prompt is empty or contains ids outside the vocabulary; an unusable constraint.
            ContextLengthError: the prompt does not fit.
            BusyError: (`Engine`) too many requests are waiting.
            ProcessError: in a forked process.
        """
        self.check_process()
        began = time.perf_counter()
        return self._start(self._prompts.encode_prompt(prompt), params, began)

    @abc.abstractmethod
    def _start(self, tokens: list[int], params: SamplingParams | None, began: float) -> Handle:
        """Start a generation; `began` is `time.perf_counter()` at the caller's request."""

    def _sequence(self, tokens: list[int], params: SamplingParams, began: float, *, speculative: bool) -> TokenSequence:
        """The decoding state of a generation; raises what `generate` does."""
        from llm_edge.runtime.speculative.draft_model import proposer_for

        self._prompts.check(tokens, self.context_length)
        return self._sequences.create(tokens, params, began, proposer_for(self._draft) if speculative else None)

    def _encode_to_compute(self, text: str | Sequence[int]) -> list[int]:
        """The ids of a text to be scored or embedded, which may fill the context."""
        self.check_process()
        tokens = self._prompts.encode_prompt(text)
        self._prompts.check(tokens, self.context_length + 1)
        return tokens
