"""`SequenceFactory`: builds the decoding state of a generation from a prompt and sampling parameters."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from llm_edge.runtime.sampling.grammar import ConstraintCompiler, ConstraintProcessor
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.runtime.sampling.processors import (
    NewlineCounter,
    NewlineLimit,
    ReasoningBudget,
    SingleThinkEnd,
    SplitThinkEnd,
)
from llm_edge.runtime.sampling.sampler import LogitsProcessor, Sampler
from llm_edge.runtime.scheduling.sequence import SamplingState, TokenSequence
from llm_edge.runtime.speculative.prompt_lookup import DraftProposer
from llm_edge.runtime.text.answer_stream import AnswerStream
from llm_edge.runtime.text.prompts import PromptProcessor
from llm_edge.runtime.text.reasoning_parser import ReasoningParser, reasoning_parser


class SequenceFactory:
    """Creates sequences for one bundle, whose context holds `limit` tokens. Thread-safe."""

    def __init__(
        self, prompts: PromptProcessor, limit: int, *, has_states: bool = False, has_windows: bool = False
    ) -> None:
        self._tokenizer = prompts.tokenizer
        self._vocab_size = prompts.format.vocab_size
        self._end_tokens = prompts.end_tokens
        self._delimiters = prompts.delimiters
        self._limit = limit
        self._kinds = {"has_states": has_states, "has_windows": has_windows}

    def create(
        self, prompt: Sequence[int], params: SamplingParams, began: float, proposer: DraftProposer | None
    ) -> TokenSequence:
        """The decoding state of a generation for a valid prompt.

        Raises:
            ParameterError: the constraint cannot be used.
        """
        delimiters = self._delimiters
        parser = reasoning_parser(delimiters, self._tokenizer, prompt, self._end_tokens)
        constraint = None
        if params.constraint is not None:
            opener = delimiters.opening if delimiters is not None and not parser.inside else ()
            constraint = self._constraints.start(params.constraint, parser, opener)
        state = functools.partial(self._sampling_state, prompt, parser, constraint)
        stream = AnswerStream(parser, params.stop)
        return TokenSequence(prompt, params, state, stream, began, proposer, constraint, **self._kinds)

    def _sampling_state(
        self,
        prompt: Sequence[int],
        parser: ReasoningParser,
        constraint: ConstraintProcessor | None,
        params: SamplingParams,
        generated: Sequence[int],
    ) -> SamplingState:
        end_tokens, delimiters = self._end_tokens.union(params.stop_token_ids), self._delimiters
        processors: list[LogitsProcessor] = []
        if constraint is not None:
            processors.append(constraint)
            if delimiters is not None and delimiters.tags:
                processors.append(SplitThinkEnd(parser))
        if params.max_newlines:
            processors.append(NewlineLimit(self._newlines, params.max_newlines, end_tokens))
        if params.single_think_end and delimiters is not None:
            processors.append(SingleThinkEnd(parser))
        if params.reasoning_budget is not None and delimiters is not None:
            processors.append(ReasoningBudget(parser, delimiters.closing, params.reasoning_budget))
        breakers = self._breakers(params.dry_breakers) if params.dry_multiplier else frozenset[int]()
        sampler = Sampler(params, prompt, processors, end_tokens=end_tokens, dry_breakers=breakers, generated=generated)
        return SamplingState(sampler, params.stop, end_tokens, min(params.max_tokens, self._limit - len(prompt)))

    @functools.cached_property
    def _newlines(self) -> NewlineCounter:
        return NewlineCounter(self._tokenizer.texts_with("\n", range(self._vocab_size)))

    @functools.cached_property
    def _constraints(self) -> ConstraintCompiler:
        delimiters = self._delimiters
        never = delimiters.opening + delimiters.closing if delimiters is not None and not delimiters.tags else ()
        return ConstraintCompiler(self._tokenizer.to_json(), self._vocab_size, self._end_tokens, never)

    @functools.lru_cache(maxsize=8)  # noqa: B019 - lives as long as the factory
    def _breakers(self, texts: tuple[str, ...]) -> frozenset[int]:
        """Ids of the tokens that contain one of these texts."""
        ids = range(self._vocab_size)
        found = ((text, self._tokenizer.texts_with(text[0], ids)) for text in texts)
        return frozenset(token for text, tokens in found for token, whole in tokens.items() if text in whole)
