"""`RunningRequest`: a request that a model is answering, as a stream of events.

`start_chat` and `start_text` raise whatever is wrong with a request before the first event, so that a protocol can
answer with an error status instead of a broken stream.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, field
from typing import Any

from starlette.concurrency import run_in_threadpool

from llm_edge.runtime.engine import Engine
from llm_edge.runtime.errors import TemplateError
from llm_edge.runtime.generation import AsyncGeneration
from llm_edge.runtime.results import FinishReason, GenerationChunk
from llm_edge.runtime.sampling.logprobs import TokenLogprob
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
from llm_edge.server.models import LoadedModel, ModelPool
from llm_edge.server.request import ChatRequest, TextRequest, with_overrides

ChunkParser = Callable[[GenerationChunk], Sequence[Event]]
"""Turns the chunks of one choice into events."""


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


class RunningRequest:
    """A request that a model is answering.

    Attributes:
        model: name of the model.
        tokenizer: the model's.
        fingerprint: identifies the weights.
        prompt_tokens: length of the prompt.
        prompt_text: of a `TextRequest`.
        usage: complete once the events have ended.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        prompt_tokens: int,
        generations: Sequence[AsyncGeneration],
        stack: AsyncExitStack,
    ) -> None:
        self.model = loaded.name
        self.tokenizer = loaded.engine.tokenizer
        self.fingerprint = loaded.fingerprint
        self.prompt_tokens = prompt_tokens
        self.usage = Usage(prompt_tokens)
        self.prompt_text = ""
        self._generations = generations
        self._stack = stack

    async def events(self) -> AsyncIterator[Event]:
        """The events of all choices as they come; leaving the iteration early cancels the generations."""
        try:
            async for choice, chunk in _merged(self._generations):
                for event in _events(choice, chunk):
                    if isinstance(event, Completed):
                        self.usage = self.usage.plus(event.timings)
                    yield event
        finally:
            await self.close()

    async def collect(self) -> list[CollectedAnswer]:
        """Wait for the end and return all answers."""
        answers = [CollectedAnswer() for _ in self._generations]
        async for event in self.events():
            answers[event.choice].add(event)
        return answers

    async def close(self) -> None:
        """Cancel what is still running, and release the model."""
        for generation in self._generations:
            generation.cancel()
        await self._stack.aclose()


async def start_chat(pool: ModelPool, request: ChatRequest) -> RunningRequest:
    """Start answering a conversation.

    Raises:
        ApiError: there is no such model, or it cannot be loaded.
        LlmEdgeError: whatever `Engine.chat` raises.
    """
    return await _start(pool, request.model, lambda loaded: _chat(loaded, request))


async def start_text(pool: ModelPool, request: TextRequest) -> RunningRequest:
    """Start continuing a text; raises what `start_chat` does."""
    running = await _start(pool, request.model, lambda loaded: _text(loaded.engine, request))
    given = request.prompt
    running.prompt_text = given if isinstance(given, str) else running.tokenizer.decode(given, skip_special=False)
    return running


async def _start(
    pool: ModelPool, name: str, start: Callable[[LoadedModel], tuple[int, Sequence[AsyncGeneration]]]
) -> RunningRequest:
    async with AsyncExitStack() as stack:
        loaded = await stack.enter_async_context(pool.use(name))
        # On a thread: rendering, tokenizing and compiling a constraint may take long.
        prompt_tokens, generations = await run_in_threadpool(start, loaded)
        return RunningRequest(loaded, prompt_tokens, generations, stack.pop_all())
    raise AssertionError("unreachable")


def _chat(loaded: LoadedModel, request: ChatRequest) -> tuple[int, Sequence[AsyncGeneration]]:
    engine = loaded.engine
    tokens = chat_tokens(engine, request)
    params = with_overrides(engine.default_params, request.overrides, engine.context_length)
    return len(tokens), engine.generate_many(tokens, params, request.count)


def _text(engine: Engine, request: TextRequest) -> tuple[int, Sequence[AsyncGeneration]]:
    params = with_overrides(engine.default_params, request.overrides, engine.context_length)
    tokens = engine.encode_prompt(request.prompt)
    return len(tokens), engine.generate_many(tokens, params, request.count)


def chat_tokens(engine: Engine, request: ChatRequest) -> list[int]:
    """The prompt of a conversation.

    A template that accepts a system message only at the beginning gets all of them there, as one message.
    """
    messages, prefix, reasoning_prefix = list(request.messages), "", ""
    if messages and messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"):
        last = messages.pop()
        prefix, reasoning_prefix = last.get("content") or "", last.get("reasoning_content") or ""
    variables: dict[str, Any] = dict(request.template_variables)
    if request.tool_use.callable:
        variables["tools"] = [tool.to_json() for tool in request.tool_use.tools]
    prefixes = {"assistant_prefix": prefix, "reasoning_prefix": reasoning_prefix}
    try:
        return engine.encode_chat(messages, variables, **prefixes)
    except TemplateError:
        systems = [message["content"] for message in messages if message["role"] == "system"]
        if not systems or (len(systems) == 1 and messages[0]["role"] == "system"):
            raise
        rest = [message for message in messages if message["role"] != "system"]
        merged = [{"role": "system", "content": "\n\n".join(systems)}, *rest]
        return engine.encode_chat(merged, variables, **prefixes)


async def _merged(generations: Sequence[AsyncGeneration]) -> AsyncIterator[tuple[int, GenerationChunk]]:
    """The chunks of several generations as they come, with the number of the generation."""
    if len(generations) == 1:
        async for chunk in generations[0]:
            yield 0, chunk
        return
    queue: asyncio.Queue[tuple[int, GenerationChunk] | BaseException | None] = asyncio.Queue()

    async def read(number: int, generation: AsyncGeneration) -> None:
        try:
            async for chunk in generation:
                queue.put_nowait((number, chunk))
        except Exception as error:  # noqa: BLE001 (raised by the reader)
            queue.put_nowait(error)
        else:
            queue.put_nowait(None)

    tasks = [asyncio.create_task(read(number, generation)) for number, generation in enumerate(generations)]
    try:
        left = len(tasks)
        while left:
            item = await queue.get()
            if isinstance(item, BaseException):
                raise item
            if item is None:
                left -= 1
            else:
                yield item
    finally:
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)


def _events(choice: int, chunk: GenerationChunk) -> Sequence[Event]:
    logprobs = (chunk.logprob,) if chunk.logprob is not None else ()
    events: list[Event] = []
    if chunk.reasoning:
        if chunk.text:
            events.append(ReasoningDelta(choice, chunk.text))
    elif chunk.text or logprobs:
        events.append(TextDelta(choice, chunk.text, logprobs))
    if chunk.finish_reason is not None and chunk.timings is not None:
        events.append(Completed(choice, _FINISH[chunk.finish_reason], chunk.timings))
    return events


_FINISH = {
    FinishReason.STOP: Finish.STOP,
    FinishReason.LENGTH: Finish.LENGTH,
    FinishReason.CANCELLED: Finish.CANCELLED,
}
