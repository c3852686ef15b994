"""`RunningRequest`: a request that is being answered, by a model of ours or an upstream, as a stream of events."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

from llm_edge.runtime.results import Timings
from llm_edge.runtime.sampling.logprobs import TokenLogprob
from llm_edge.runtime.text.tokenizer import Tokenizer
from llm_edge.server.errors import invalid
from llm_edge.server.events import (
    Completed,
    Event,
    Finish,
    ReasoningDelta,
    TextDelta,
    ToolCallDelta,
    ToolCallStarted,
    Usage,
)


@dataclass
class CollectedCall:
    """A whole call of a function; `arguments` is the text of a JSON object."""

    id: str
    name: str
    arguments: str = ""


@dataclass
class CollectedAnswer:
    """A whole answer."""

    text: str = ""
    reasoning: str = ""
    calls: list[CollectedCall] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish: Finish = Finish.CANCELLED

    def add(self, event: Event) -> None:
        """Append what an event brings."""
        match event:
            case TextDelta(_, text, logprobs):
                self.text += text
                self.logprobs += logprobs
            case ReasoningDelta(_, text):
                self.reasoning += text
            case ToolCallStarted(_, _, identifier, name):
                self.calls.append(CollectedCall(identifier, name))
            case ToolCallDelta(_, number, arguments):
                self.calls[number].arguments += arguments
            case Completed(_, finish, _):
                self.finish = finish


class RunningRequest(ABC):
    """A request that is being answered.

    Attributes:
        model: name of the model.
        count: number of answers.
        fingerprint: identifies the weights; "" = unknown.
        prompt_tokens: length of the prompt; 0 = not known before the end.
        prompt_text: of a `TextRequest`.
        usage: complete once the events have ended.
        generated_tokens: number of tokens so far, in all answers.
        timings: of the latest answer that ended.
        stop_string: the stop string that ended the latest answer, if one did.
    """

    def __init__(self, model: str, count: int, *, fingerprint: str = "", prompt_tokens: int = 0) -> None:
        self.model = model
        self.count = count
        self.fingerprint = fingerprint
        self.prompt_tokens = prompt_tokens
        self.prompt_text = ""
        self.usage = Usage(prompt_tokens)
        self.generated_tokens = 0
        self.timings: Timings | None = None
        self.stop_string: str | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """The model's tokenizer.

        Raises:
            ApiError: it is not known, because the model is behind an upstream.
        """
        raise invalid(f"the tokens of {self.model} are not known: leave out logprobs", "logprobs")

    @abstractmethod
    def events(self) -> AsyncIterator[Event]:
        """The events of all choices as they come; leaving the iteration early cancels the request."""

    @abstractmethod
    async def close(self) -> None:
        """Cancel what is still running, and release what it holds."""

    async def collect(self) -> list[CollectedAnswer]:
        """Wait for the end and return all answers."""
        answers = [CollectedAnswer() for _ in range(self.count)]
        async for event in self.events():
            answers[event.choice].add(event)
        return answers
