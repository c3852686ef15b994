"""`Event`: what a running request produces, independent of any protocol."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from llm_edge.runtime.results import Timings
from llm_edge.runtime.sampling.logprobs import TokenLogprob


class Finish(StrEnum):
    """Why an answer ended.

    STOP: the model ended it, or a stop string or stop token occurred.
    LENGTH: `max_tokens` or the context was exhausted.
    TOOL_CALLS: it called tools.
    CANCELLED: the server is shutting down, or the client asked for it.
    """

    STOP = "stop"
    LENGTH = "length"
    TOOL_CALLS = "tool_calls"
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class TextDelta:
    """More text of an answer, with the log-probabilities of its tokens if they were requested."""

    choice: int
    text: str
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True, slots=True)
class ReasoningDelta:
    """More text of the reasoning before an answer."""

    choice: int
    text: str


@dataclass(frozen=True, slots=True)
class ToolCallStarted:
    """The answer calls a function; `ToolCallDelta`s with its arguments follow.

    Attributes:
        choice: the answer.
        number: of the call within the answer, from 0.
        id: of the call, unique.
        name: of the function.
    """

    choice: int
    number: int
    id: str
    name: str


@dataclass(frozen=True, slots=True)
class ToolCallDelta:
    """More of the JSON text of a call's arguments."""

    choice: int
    number: int
    arguments: str


@dataclass(frozen=True, slots=True)
class Completed:
    """An answer has ended; the last event of its choice."""

    choice: int
    finish: Finish
    timings: Timings


Event = TextDelta | ReasoningDelta | ToolCallStarted | ToolCallDelta | Completed


@dataclass(frozen=True, slots=True)
class Usage:
    """Numbers of tokens of a whole request.

    Attributes:
        prompt_tokens: in the prompt, counted once.
        completion_tokens: generated, in all answers.
        reasoning_tokens: how many of these are reasoning.
        cached_tokens: how many of the prompt's tokens were in the cache.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    reasoning_tokens: int = 0
    cached_tokens: int = 0

    @property
    def total_tokens(self) -> int:
        """Prompt and answers together."""
        return self.prompt_tokens + self.completion_tokens

    def and_of(self, other: Usage) -> Usage:
        """This usage and that of a request with another prompt."""
        return Usage(
            self.prompt_tokens + other.prompt_tokens,
            self.completion_tokens + other.completion_tokens,
            self.reasoning_tokens + other.reasoning_tokens,
            self.cached_tokens + other.cached_tokens,
        )

    def plus(self, timings: Timings) -> Usage:
        """This usage and one more answer to the same prompt."""
        return Usage(
            timings.prompt_tokens,
            self.completion_tokens + timings.completion_tokens,
            self.reasoning_tokens + timings.reasoning_tokens,
            max(self.cached_tokens, timings.cached_tokens),
        )
