"""`FakeResponder`: a responder with scripted answers, for tests, screenshots and `llm-chat --fake`."""

from __future__ import annotations

import itertools
import math
import re
import threading
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from llm_edge.runtime.errors import ContextLengthError, LlmEdgeError
from llm_edge.runtime.results import FinishReason, GenerationChunk, Timings
from llm_edge.runtime.sampling.logprobs import TokenLogprob
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.runtime.text.prompts import Message

_STEP = 0.02  # minimum seconds per token in the figures, so that they do not vary
_TOKEN = re.compile(r"\s*\S+|\s+")
ANSWER = """\
I am a script, not a model: whatever you ask, this is what I say.

1. Text comes **token by token**, as from a model.
2. Code is highlighted:

```python
def greet(name: str) -> str:
    return f"Hello, {name}!"
```

| what | where |
|---|---|
| a real model | `llm-export smollm2`, then `llm-chat` |
"""
REASONING = "Somebody asks me something.\nI have one answer only, so I shall give that one."


@dataclass(frozen=True, slots=True)
class Said:
    """One answer of the script; each word of its text is a token."""

    text: str = ANSWER
    reasoning: str = ""
    failure: LlmEdgeError | None = None  # raised at the end


class FakeReply:
    """The `Reply` of a `FakeResponder`; `params` are the current parameters."""

    def __init__(self, said: Said, params: SamplingParams, prompt: int, pause: float, ids: dict[str, int]) -> None:
        self.params = params
        self._said = said
        self._prompt = prompt
        self._pause = pause
        self._ids = ids
        self._cancelled = threading.Event()

    def cancel(self) -> None:
        self._cancelled.set()

    def adjust(self, params: SamplingParams) -> None:
        self.params = params

    def __iter__(self) -> Iterator[GenerationChunk]:
        count = thought = 0
        texts = [(text, True) for text in _TOKEN.findall(self._said.reasoning)]
        texts += [(text, False) for text in _TOKEN.findall(self._said.text)]
        reason = FinishReason.STOP
        for text, reasoning in texts:
            if self._cancelled.wait(self._pause):
                reason = FinishReason.CANCELLED
                break
            if count >= self.params.max_tokens:
                reason = FinishReason.LENGTH
                break
            count += 1
            thought += reasoning
            token = self._ids[text]
            yield GenerationChunk(text, token, reasoning=reasoning, logprob=self._logprob(token))
        if self._said.failure is not None:
            raise self._said.failure
        each = max(self._pause, _STEP)
        timings = Timings(self._prompt, count, each, each, max(count - 1, 0) * each, thought)
        yield GenerationChunk("", None, reason, timings)

    def _logprob(self, token: int) -> TokenLogprob | None:
        """A probability that depends only on the token, and alternatives."""
        if self.params.logprobs is None:
            return None
        own = 0.35 + 0.6 * (math.sin(token * 12.9898) + 1) / 2
        rest = [(1 - own) / 2**number for number in range(1, self.params.logprobs)]
        others = [(token + number, math.log(each)) for number, each in enumerate(rest, 1)]
        return TokenLogprob(token, math.log(own), ((token, math.log(own)), *others)[: self.params.logprobs])


class FakeResponder:
    """A `Responder` with scripted answers.

    Args:
        said: the script, which is repeated; a string is an answer without reasoning.
        pause: seconds per token.
        context_length: in words.
    """

    unsupported: frozenset[str] = frozenset()
    adjusts = True
    continues_thoughts = True

    def __init__(
        self,
        *said: Said | str,
        pause: float = 0.0,
        context_length: int = 4096,
        name: str = "script",
        detail: str = "fake",
    ) -> None:
        self.name = self.settings_key = name
        self.detail = detail
        self.context_length: int | None = context_length
        self.default_params = SamplingParams(temperature=0.7, top_p=0.95)
        self.pause = pause
        self.asked: list[tuple[list[dict[str, Any]], SamplingParams, str]] = []  # with the prefix of the answer
        self.replies: list[FakeReply] = []
        self.closed = False
        answers = [Said(each) if isinstance(each, str) else each for each in said]
        self._said: Iterator[Said] = itertools.cycle(answers or [Said(reasoning=REASONING)])
        self._next: deque[Said] = deque()
        self._ids: dict[str, int] = {}

    def enqueue(self, *said: Said | str) -> None:
        """Use these as the next answers."""
        self._next.extend(Said(each) if isinstance(each, str) else each for each in said)

    def answer(
        self,
        messages: Sequence[Message],
        params: SamplingParams,
        *,
        assistant_prefix: str = "",
        reasoning_prefix: str = "",
        template_variables: Mapping[str, Any] | None = None,  # noqa: ARG002
    ) -> FakeReply:
        prompt = self.count(messages)
        assert self.context_length is not None
        if prompt >= self.context_length:
            raise ContextLengthError(prompt, self.context_length)
        self.asked.append(([dict(message) for message in messages], params, assistant_prefix))
        said = self._next.popleft() if self._next else next(self._said)
        if assistant_prefix:  # what precedes is not repeated
            said = replace(said, reasoning="", text=said.text.removeprefix(assistant_prefix))
        said = replace(said, reasoning=said.reasoning.removeprefix(reasoning_prefix))
        for text in _TOKEN.findall(said.reasoning) + _TOKEN.findall(said.text):
            self._ids.setdefault(text, len(self._ids))
        limit = min(params.max_tokens, self.context_length - prompt)
        reply = FakeReply(said, replace(params, max_tokens=limit), prompt, self.pause, self._ids)
        self.replies.append(reply)
        return reply

    def count(self, messages: Sequence[Message]) -> int:
        return sum(len(_TOKEN.findall(str(message["content"]))) + 4 for message in messages)

    def token_text(self, token: int) -> str:
        return next((text for text, number in self._ids.items() if number == token), f"<{token}>")

    def close(self) -> None:
        self.closed = True
