"""`PromptProcessor`: turns conversations and texts into the token ids of a prompt."""

from __future__ import annotations

import operator
import reprlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from llm_edge.runtime.bundle import MANIFEST, Bundle, Guards, ReasoningTags, ReasoningTokens
from llm_edge.runtime.errors import BundleError, ContextLengthError, ParameterError, TemplateError
from llm_edge.runtime.sampling.generation_config import read_generation_config
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.runtime.text.answer_stream import separate_reasoning
from llm_edge.runtime.text.reasoning_parser import ReasoningDelimiters, reasoning_parser
from llm_edge.runtime.text.tokenizer import PreparedChat, Tokenizer

_GENERATION_CONFIG = "generation_config.json"

Message = Mapping[str, Any]
"""`{"role": "user", "content": "…"}`, and whatever else the model's chat template supports."""


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """What determines a model's prompts besides its tokenizer, and its default sampling.

    Attributes:
        where: the model's folder, for messages.
        vocab_size: number of rows of its embedding.
        context_length: maximum number of tokens of prompt and answer.
        generation: content of generation_config.json.
        reasoning: delimiters of reasoning; None for models without reasoning.
        guards: None if the model has no such defaults.
    """

    where: Path
    vocab_size: int
    context_length: int
    generation: Mapping[str, Any]
    reasoning: ReasoningTokens | ReasoningTags | None = None
    guards: Guards | None = None

    @classmethod
    def of_bundle(cls, bundle: Bundle) -> PromptFormat:
        """The format of a bundle's model."""
        shape, generation = bundle.shape, bundle.json(_GENERATION_CONFIG)
        return cls(
            bundle.path, shape.vocab_size, shape.max_position_embeddings, generation, bundle.reasoning, bundle.guards
        )


class PromptProcessor:
    """Encodes prompts for one model. Thread-safe.

    Attributes:
        format: of the model's prompts.
        default_params: the model's default sampling, from generation_config.json and the manifest's guards.
        end_tokens: ids that end an answer.
        delimiters: of reasoning; None for models without reasoning.
    """

    def __init__(self, prompt_format: PromptFormat, tokenizer: Tokenizer) -> None:
        self.format = prompt_format
        self.tokenizer = tokenizer
        self._limit = prompt_format.context_length
        source = prompt_format.where / _GENERATION_CONFIG
        self.end_tokens = frozenset(_end_tokens(prompt_format.generation, source))
        self.default_params = _default_params(prompt_format, source, self.end_tokens)
        self.delimiters = _delimiters(prompt_format, tokenizer)

    def encode_chat(
        self,
        messages: Sequence[Message],
        template_variables: Mapping[str, Any] | None = None,
        *,
        assistant_prefix: str = "",
        reasoning_prefix: str = "",
    ) -> list[int]:
        """The prompt of a conversation, in the model's chat format.

        Message text that spells a special token stays text, with one exception: an assistant message may contain its
        reasoning up to the end delimiter. Where the template does not see that delimiter because it is special, the
        reasoning is passed as the message's `reasoning_content`, which may also be given directly; most templates omit
        it from all but the last turn.

        Args:
            messages: the conversation.
            template_variables: further variables of the chat template, such as `enable_thinking` or `tools`.
            assistant_prefix: beginning of the answer, which the model continues.
            reasoning_prefix: beginning of the reasoning, or all of it if there is an `assistant_prefix`.

        Raises:
            ParameterError: `template_variables` is not a mapping.
            TemplateError: the model has no chat template, or the template rejects these messages or variables.
            ContextLengthError: the conversation has more characters than the context could hold.
            InputError: the tokenizer cannot encode the conversation.
        """
        prepared = self.prepare_chat(messages, template_variables)
        tokens = prepared.encode(prepared.render(), self._limit)
        if assistant_prefix or reasoning_prefix:
            tokens = self._with_prefix(tokens, assistant_prefix, reasoning_prefix)
        return tokens

    def prepare_chat(
        self, messages: Sequence[Message], template_variables: Mapping[str, Any] | None = None
    ) -> PreparedChat:
        """A conversation, ready to be rendered in the model's chat format and encoded, as `encode_chat` does it.

        Raises:
            ParameterError: `template_variables` is not a mapping.
            TemplateError: the model has no chat template, or the messages or variables are malformed.
        """
        if not isinstance(template_variables, Mapping | None):
            raise ParameterError(f"template_variables is {reprlib.repr(template_variables)}: give a mapping by name")
        variables = dict(template_variables or {})
        if not all(isinstance(name, str) and name not in ("messages", "self") for name in variables):
            raise TemplateError("template_variables: give a mapping by name, without 'messages' and 'self'")
        if self.delimiters is not None and self.tokenizer.special_ids.intersection(self.delimiters.closing):
            messages = separate_reasoning(messages, self.delimiters.start, self.delimiters.end)
        return self.tokenizer.prepare_chat(messages, **variables)

    def encode_prompt(self, prompt: str | Sequence[int]) -> list[int]:
        """The ids of a plain text (special tokens spelled in it stay text), or the given ids."""
        if isinstance(prompt, str):
            self.tokenizer.check_length(prompt, self._limit)
            return self.tokenizer.encode(prompt, add_special_tokens=True)
        return [*map(operator.index, prompt)]

    def _with_prefix(self, prompt: Sequence[int], assistant_prefix: str, reasoning_prefix: str) -> list[int]:
        """A prompt followed by the beginning of its answer: of the reasoning, and of the answer proper."""
        for text in (assistant_prefix, reasoning_prefix):
            self.tokenizer.check_length(text, self._limit)
        tokens, delimiters = list(prompt), self.delimiters
        if delimiters is not None:
            inside = reasoning_parser(delimiters, self.tokenizer, prompt, self.end_tokens).inside
            if reasoning_prefix:
                opening = [] if inside else [*delimiters.opening, *self.tokenizer.encode("\n")]
                tokens += [*opening, *self.tokenizer.encode(reasoning_prefix)]
            if assistant_prefix and (inside or reasoning_prefix):
                tokens += [*self.tokenizer.encode("\n"), *delimiters.closing, *self.tokenizer.encode("\n\n")]
        return tokens + self.tokenizer.encode(assistant_prefix)

    def check(self, tokens: Sequence[int], limit: int) -> None:
        """Check that a prompt can be answered in a context of `limit` tokens.

        Raises:
            ParameterError: it is empty or contains ids outside the vocabulary.
            ContextLengthError: it leaves no room for an answer.
        """
        vocab_size = self.format.vocab_size
        if not tokens:
            raise ParameterError("the prompt is empty: give at least one token")
        if not all(0 <= token < vocab_size for token in tokens):
            raise ParameterError(f"the prompt contains ids outside the vocabulary of {vocab_size}")
        if len(tokens) >= limit:
            raise ContextLengthError(len(tokens), limit)


def _default_params(prompt_format: PromptFormat, source: Path, end_tokens: Collection[int]) -> SamplingParams:
    defaults = read_generation_config(prompt_format.generation, end_tokens)
    if defaults.invalid:
        raise BundleError(f"{source}: {defaults.invalid[0]}, or export the bundle again")
    params, guards = dict(defaults.params), prompt_format.guards
    if guards is not None:
        params |= {"max_newlines": guards.max_newlines or 0, "single_think_end": guards.single_think_end}
    return SamplingParams(**params)


def _delimiters(prompt_format: PromptFormat, tokenizer: Tokenizer) -> ReasoningDelimiters | None:
    reasoning = prompt_format.reasoning
    try:
        return ReasoningDelimiters(reasoning, tokenizer) if reasoning is not None else None
    except BundleError as error:
        raise BundleError(f"{prompt_format.where / MANIFEST}: {error}") from error


def _end_tokens(config: Mapping[str, Any], source: Path) -> list[int]:
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise BundleError(f"{source}: eos_token_id is {value!r}, not a token id")
    return ids
