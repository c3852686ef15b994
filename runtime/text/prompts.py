"""The text side of a bundle: prompts in, the makings of an answer out. Knows no graph and no cache."""

from __future__ import annotations

import functools
import operator
import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from llm_edge.runtime.bundle import MANIFEST, Bundle
from llm_edge.runtime.errors import BundleError, ContextLengthError, ParameterError, TemplateError
from llm_edge.runtime.sampling.constraint import ConstraintProcessor, Constraints
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.runtime.sampling.processors import NewlineLimit, Newlines, SingleThinkEnd, ThinkBudget, TidyThinkEnd
from llm_edge.runtime.sampling.sampler import LogitsProcessor, Sampler
from llm_edge.runtime.scheduling.sequence import SamplingState, TokenSequence
from llm_edge.runtime.speculative.prompt_lookup import DraftProposer
from llm_edge.runtime.text.answer_stream import AnswerStream, apart
from llm_edge.runtime.text.reasoning_parser import ReasoningDelimiters, ReasoningParser, reasoning_parser
from llm_edge.runtime.text.tokenizer import Tokenizer

_GENERATION_CONFIG = "generation_config.json"
_DRAWING_KEYS = ("temperature", "top_k", "top_p", "min_p")
_OTHER_KEYS: Mapping[str, str] = {
    "repetition_penalty": "repetition_penalty",
    "repetition_window": "repetition_window",
    "max_new_tokens": "max_tokens",
}

Message = Mapping[str, Any]
"""`{"role": "user", "content": "…"}` and whatever else the model's chat template knows."""


class PromptProcessor:
    """What `Model` and `Engine` know of a bundle beside its graph; for any threads at once.

    Attributes:
        default_params: the model's own sampling, from its generation_config.json and the guards of its manifest.
        end_tokens: ids that end an answer.
    """

    def __init__(self, bundle: Bundle, tokenizer: Tokenizer) -> None:
        self.bundle = bundle
        self.tokenizer = tokenizer
        source = bundle.file(_GENERATION_CONFIG)
        config = bundle.json(_GENERATION_CONFIG)
        self.default_params = _own_params(config, source, bundle)
        self.end_tokens = frozenset(_end_tokens(config, source))
        self._marks = _marks(bundle, tokenizer)

    def encode_chat(
        self, messages: Sequence[Message], template_variables: Mapping[str, Any] | None = None
    ) -> list[int]:
        """The ids of the prompt that a conversation makes.

        Text inside the messages that spells a special token stays text. One thing is read out of it: an assistant
        message may still hold its reasoning, up to the text of the token that ends it. Where the template does
        not see that token, for it is special, the reasoning becomes the message's `reasoning_content`, which may
        also be given so; most templates leave it out of all turns but the last.

        Args:
            messages: the conversation.
            template_variables: what the chat template knows beyond the messages, as `enable_thinking` or `tools`.

        Raises:
            ParameterError: `template_variables` is no mapping.
            TemplateError: the model has no chat template, or it refuses these messages or variables.
        """
        if not isinstance(template_variables, Mapping | None):
            raise ParameterError(f"template_variables is {reprlib.repr(template_variables)}: give a mapping by name")
        variables = dict(template_variables or {})
        if not all(isinstance(name, str) and name not in ("messages", "self") for name in variables):
            raise TemplateError("template_variables: a mapping by name, without 'messages', was expected")
        if self._marks is not None and self.tokenizer.special_ids.intersection(self._marks.closing):
            messages = apart(messages, self._marks.start, self._marks.end)
        return self.tokenizer.encode_chat(messages, **variables)

    def encode_prompt(self, prompt: str | Sequence[int]) -> list[int]:
        """The ids of a plain text (special tokens spelled in it stay text), or ids as they are."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, add_special_tokens=True)
        return [*map(operator.index, prompt)]

    def continued(self, prompt: Sequence[int], begin: str, thought: str) -> list[int]:
        """The ids of a prompt and of an answer's beginning, of its reasoning and of the answer proper."""
        tokens, marks = list(prompt), self._marks
        if marks is not None:
            inside = reasoning_parser(marks, self.tokenizer, prompt, self.end_tokens).inside
            if thought:
                opening = [] if inside else [*marks.opening, *self.tokenizer.encode("\n")]
                tokens += [*opening, *self.tokenizer.encode(thought)]
            if begin and (inside or thought):
                tokens += [*self.tokenizer.encode("\n"), *marks.closing, *self.tokenizer.encode("\n\n")]
        return tokens + self.tokenizer.encode(begin)

    def check(self, tokens: Sequence[int], limit: int) -> None:
        """Refuse a prompt that no answer can follow.

        Raises:
            ParameterError: it is empty or holds ids outside of the vocabulary.
            ContextLengthError: it does not fit.
        """
        vocabulary = self.bundle.shape.vocab_size
        if not tokens:
            raise ParameterError("the prompt is empty: give at least one token")
        if not all(0 <= token < vocabulary for token in tokens):
            raise ParameterError(f"the prompt holds ids outside of the vocabulary of {vocabulary}")
        if len(tokens) >= limit:
            raise ContextLengthError(len(tokens), limit)

    def lane(
        self, tokens: Sequence[int], params: SamplingParams, limit: int, began: float, guesses: DraftProposer | None
    ) -> TokenSequence:
        """The makings of one answer to a prompt that was checked; `limit` is the context's.

        Raises:
            ParameterError: the constraint cannot be used, or the parameters ask for what the model lacks.
        """
        marks = self._marks
        borders = reasoning_parser(marks, self.tokenizer, tokens, self.end_tokens)
        constraint = None
        if params.constraint is not None:
            opener = marks.opening if marks is not None and not borders.inside else ()
            constraint = self._constraints.start(params.constraint, borders, opener)
        make = functools.partial(self._making, tokens, limit, borders, constraint)
        return TokenSequence(tokens, params, make, AnswerStream(borders, params.stop), began, guesses, constraint)

    def _making(
        self,
        prompt: Sequence[int],
        limit: int,
        borders: ReasoningParser,
        constraint: ConstraintProcessor | None,
        params: SamplingParams,
        drawn: Sequence[int],
    ) -> SamplingState:
        ends, marks = self.end_tokens.union(params.stop_token_ids), self._marks
        made: list[LogitsProcessor] = []
        if constraint is not None:
            made.append(constraint)
            if marks is not None and marks.tags:
                made.append(TidyThinkEnd(borders))
        if params.max_newlines:
            made.append(NewlineLimit(self._newlines, params.max_newlines, ends))
        if params.single_think_end and marks is not None:
            made.append(SingleThinkEnd(borders))
        if params.reasoning_budget is not None and marks is not None:
            made.append(ThinkBudget(borders, marks.closing, params.reasoning_budget))
        breakers = self._breakers(params.dry_breakers) if params.dry_multiplier else frozenset[int]()
        sampler = Sampler(params, prompt, made, end_tokens=ends, dry_breakers=breakers, generated=drawn)
        return SamplingState(sampler, params.stop, ends, min(params.max_tokens, limit - len(prompt)))

    @functools.cached_property
    def _newlines(self) -> Newlines:
        return Newlines(self.tokenizer.texts_with("\n", range(self.bundle.shape.vocab_size)))

    @functools.cached_property
    def _constraints(self) -> Constraints:
        marks = self._marks
        never = marks.opening + marks.closing if marks is not None and not marks.tags else ()
        return Constraints(self.tokenizer.to_json(), self.bundle.shape.vocab_size, self.end_tokens, never)

    @functools.lru_cache(maxsize=8)  # noqa: B019 - as long-lived as the text side itself
    def _breakers(self, texts: tuple[str, ...]) -> frozenset[int]:
        ids = range(self.bundle.shape.vocab_size)
        found = ((text, self.tokenizer.texts_with(text[0], ids)) for text in texts)
        return frozenset(token for text, tokens in found for token, whole in tokens.items() if text in whole)


def _own_params(config: Mapping[str, Any], source: Path, bundle: Bundle) -> SamplingParams:
    """As transformers reads the file: without `do_sample` the most likely token is taken, whatever else it states.

    Only a file that states how to draw and leaves out `do_sample` is taken at its word.
    """
    given = {key: config[key] for key in _DRAWING_KEYS if config.get(key) is not None}
    if not config.get("do_sample", bool(given)):
        given = {"temperature": 0.0}
    given |= {name: config[key] for key, name in _OTHER_KEYS.items() if config.get(key) is not None}
    if bundle.guards is not None:
        given |= {"max_newlines": bundle.guards.max_newlines or 0, "single_think_end": bundle.guards.single_think_end}
    try:
        return SamplingParams(**given)
    except ParameterError as error:
        raise BundleError(f"{source}: {error}") from error


def _marks(bundle: Bundle, tokenizer: Tokenizer) -> ReasoningDelimiters | None:
    try:
        return ReasoningDelimiters(bundle.reasoning, tokenizer) if bundle.reasoning is not None else None
    except BundleError as error:
        raise BundleError(f"{bundle.path / MANIFEST}: {error}") from error


def _end_tokens(config: Mapping[str, Any], source: Path) -> list[int]:
    value = config.get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if not all(isinstance(token, int) and not isinstance(token, bool) for token in ids):
        raise BundleError(f"{source}: eos_token_id is {value!r}, not a token id")
    return ids
