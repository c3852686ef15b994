"""What a generation returns: chunks of text, the whole result, the finish reason and timings."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from llm_edge.runtime.errors import ParameterError

if TYPE_CHECKING:  # numpy, which code that only handles results does not need
    from llm_edge.runtime.sampling.logprobs import TokenLogprob


class FinishReason(StrEnum):
    """Why a generation ended.

    STOP: the model ended its answer, or a stop string or stop token occurred.
    LENGTH: `max_tokens` or the context was exhausted.
    CANCELLED: the caller cancelled it, or started another generation on the same `Model`.
    """

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Timings:
    """Token counts and durations of a generation.

    Attributes:
        prompt_tokens: number of tokens in the prompt.
        completion_tokens: number of tokens generated, including an end token.
        time_to_first_token: seconds from the call to the first token.
        prefill_seconds: duration of the prompt's steps.
        decode_seconds: seconds from the first token to the last.
        reasoning_tokens: how many of `completion_tokens` are reasoning, including its delimiters.
        cached_tokens: how many of `prompt_tokens` were in the cache already.
        draft_tokens: number of draft tokens that were verified.
        accepted_tokens: how many of `draft_tokens` were accepted.
    """

    prompt_tokens: int
    completion_tokens: int
    time_to_first_token: float
    prefill_seconds: float
    decode_seconds: float
    reasoning_tokens: int = 0
    cached_tokens: int = 0
    draft_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens computed per second; 0 if all were cached."""
        computed = self.prompt_tokens - self.cached_tokens
        return computed / self.prefill_seconds if self.prefill_seconds > 0 else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens after the first one per second; 0 for fewer than two tokens."""
        return (self.completion_tokens - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class GenerationChunk:
    """One step of a generation: a token and the text that became readable with it.

    Attributes:
        text: may be empty, for example within a multi-byte character or a possible stop string.
        token: the token drawn; None in a final chunk without a token, and in the first of two chunks for a token that
            has both reasoning and answer text.
        finish_reason: set only in the last chunk.
        timings: of the whole generation; set only in the last chunk.
        reasoning: `text` belongs to the reasoning and not to the answer; `AnswerStream` defines the boundary.
        logprob: log-probabilities of the token and its alternatives, if `SamplingParams.logprobs` requests them.
        stop_string: the stop string that ended the generation; only in the last chunk.
    """

    text: str
    token: int | None
    finish_reason: FinishReason | None = None
    timings: Timings | None = None
    reasoning: bool = False
    logprob: TokenLogprob | None = None
    stop_string: str | None = None


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A whole generation.

    Attributes:
        text: the answer without its reasoning.
        tokens: all tokens drawn, including reasoning and an end token.
        finish_reason: why it ended.
        timings: how long it took.
        reasoning: text of the reasoning; empty for models without reasoning.
        logprobs: of each token, if `SamplingParams.logprobs` requests them.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    timings: Timings
    reasoning: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()


def collect(chunks: Iterable[GenerationChunk]) -> GenerationResult:
    """Combine the remaining chunks of a generation; raises ParameterError if there are none."""
    answer: list[str] = []
    reasoning: list[str] = []
    tokens: list[int] = []
    logprobs: list[TokenLogprob] = []
    for chunk in chunks:
        (reasoning if chunk.reasoning else answer).append(chunk.text)
        if chunk.token is not None:
            tokens.append(chunk.token)
        if chunk.logprob is not None:
            logprobs.append(chunk.logprob)
        if chunk.finish_reason is not None and chunk.timings is not None:
            return GenerationResult(
                "".join(answer),
                tuple(tokens),
                chunk.finish_reason,
                chunk.timings,
                "".join(reasoning),
                tuple(logprobs),
            )
    raise ParameterError("this generation has already been read to its end")
