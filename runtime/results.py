"""What a generation returns: chunks of text as they come, the whole result, why it ended and how long it took."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from llm_edge.runtime.errors import ParameterError
from llm_edge.runtime.sampling.logprobs import TokenLogprob


class FinishReason(StrEnum):
    """Why a generation ended.

    STOP: the model ended its answer, or a stop string or stop token came.
    LENGTH: `max_tokens` or the context was used up.
    CANCELLED: the caller asked for it, or began another generation on the same model.
    """

    STOP = "stop"
    LENGTH = "length"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Timings:
    """How long a generation took, in seconds and tokens.

    Attributes:
        prompt_tokens: tokens of the prompt.
        completion_tokens: tokens drawn, an end token included.
        time_to_first_token: from the call to the first token.
        prefill_seconds: time of the prompt's steps.
        decode_seconds: time from the first token to the last.
        reasoning_tokens: tokens drawn for the reasoning, those that start and end it included; the rest of
            `completion_tokens` is the answer.
        cached_tokens: tokens of the prompt that an earlier answer had computed.
        guessed_tokens: tokens computed on the guess that they come next.
        accepted_tokens: those of them that came.
    """

    prompt_tokens: int
    completion_tokens: int
    time_to_first_token: float
    prefill_seconds: float
    decode_seconds: float
    reasoning_tokens: int = 0
    cached_tokens: int = 0
    guessed_tokens: int = 0
    accepted_tokens: int = 0

    @property
    def prefill_tokens_per_second(self) -> float:
        """Prompt tokens computed per second; 0 where nothing was computed."""
        computed = self.prompt_tokens - self.cached_tokens
        return computed / self.prefill_seconds if self.prefill_seconds > 0 else 0.0

    @property
    def decode_tokens_per_second(self) -> float:
        """Tokens behind the first one per second; 0 for fewer than two tokens."""
        return (self.completion_tokens - 1) / self.decode_seconds if self.decode_seconds > 0 else 0.0


@dataclass(frozen=True, slots=True)
class GenerationChunk:
    """A token of a generation.

    Attributes:
        text: what became readable, maybe nothing (half a character, the possible start of a stop string).
        token: the token drawn; None in a last piece that only ends the generation, and in one before a token that
            has text of the reasoning and of the answer.
        finish_reason: set in the last piece alone, and so are
        timings: the figures of the whole generation.
        reasoning: the text belongs to the reasoning and not to the answer; see `AnswerStream` for the border.
        logprob: of the token and the most probable ones, where `SamplingParams.logprobs` asks for it.
    """

    text: str
    token: int | None
    finish_reason: FinishReason | None = None
    timings: Timings | None = None
    reasoning: bool = False
    logprob: TokenLogprob | None = None


@dataclass(frozen=True, slots=True)
class GenerationResult:
    """A whole generation.

    Attributes:
        text: the answer alone.
        tokens: all that were drawn, those of the reasoning and an end token included.
        finish_reason: why it ended.
        timings: how long it took.
        reasoning: text of the reasoning; empty for models that do not reason, and where `Bundle.reasoning` is None.
        logprobs: of each token, where `SamplingParams.logprobs` asks for them.
    """

    text: str
    tokens: tuple[int, ...]
    finish_reason: FinishReason
    timings: Timings
    reasoning: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()


def collect(pieces: Iterable[GenerationChunk]) -> GenerationResult:
    """The result that the remaining pieces make.

    Raises:
        ParameterError: there are none.
    """
    answer: list[str] = []
    reasoning: list[str] = []
    tokens: list[int] = []
    logprobs: list[TokenLogprob] = []
    for piece in pieces:
        (reasoning if piece.reasoning else answer).append(piece.text)
        if piece.token is not None:
            tokens.append(piece.token)
        if piece.logprob is not None:
            logprobs.append(piece.logprob)
        if piece.finish_reason is not None and piece.timings is not None:
            reason, timings = piece.finish_reason, piece.timings
            return GenerationResult(
                "".join(answer), tuple(tokens), reason, timings, "".join(reasoning), tuple(logprobs)
            )
    raise ParameterError("this answer has already been read to its end")
