"""`start_chat` and `start_text`: requests to models, as streams of events.

They raise whatever is wrong with a request before the first event, so that a protocol can
answer with an error status instead of a broken stream.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack
from dataclasses import dataclass, replace
from typing import Any

from starlette.concurrency import run_in_threadpool

from llm_edge.runtime.errors import TemplateError
from llm_edge.runtime.generation import AsyncGeneration
from llm_edge.runtime.results import FinishReason, GenerationChunk
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.runtime.text.tokenizer import Tokenizer
from llm_edge.server.events import (
    Completed,
    Event,
    Finish,
    ReasoningDelta,
    TextDelta,
)
from llm_edge.server.models import LoadedModel, ModelPool
from llm_edge.server.request import ChatRequest, TextRequest
from llm_edge.server.running import RunningRequest
from llm_edge.server.tools import CallEvents, constraint_for, with_instructions


class EngineRequest(RunningRequest):
    """A request that a model of ours is answering."""

    def __init__(
        self,
        loaded: LoadedModel,
        prompt_tokens: int,
        generations: Sequence[AsyncGeneration],
        stack: AsyncExitStack,
        calls: Sequence[CallEvents] = (),
    ) -> None:
        super().__init__(loaded.name, len(generations), fingerprint=loaded.fingerprint, prompt_tokens=prompt_tokens)
        self._tokenizer = loaded.engine.tokenizer
        self._generations = generations
        self._stack = stack
        self._calls = calls

    @property
    def tokenizer(self) -> Tokenizer:
        return self._tokenizer

    async def events(self) -> AsyncIterator[Event]:
        try:
            async for choice, chunk in _merged(self._generations):
                self.generated_tokens += chunk.token is not None
                for event in self._events(choice, chunk):
                    if isinstance(event, Completed):
                        self.usage = self.usage.plus(event.timings)
                        self.timings, self.stop_string = event.timings, chunk.stop_string
                    yield event
        finally:
            await self.close()

    def _events(self, choice: int, chunk: GenerationChunk) -> list[Event]:
        """The events of a chunk."""
        events: list[Event] = []
        calls = self._calls[choice] if self._calls else None
        if chunk.reasoning:
            if chunk.text:
                events.append(ReasoningDelta(choice, chunk.text))
        elif calls is not None:
            events += calls.feed(chunk)
        elif chunk.text or chunk.logprob is not None:
            logprobs = (chunk.logprob,) if chunk.logprob is not None else ()
            events.append(TextDelta(choice, chunk.text, logprobs))
        if chunk.finish_reason is not None and chunk.timings is not None:
            finish = _FINISH[chunk.finish_reason]
            if finish is Finish.STOP and calls is not None and calls.called:
                finish = Finish.TOOL_CALLS
            events.append(Completed(choice, finish, chunk.timings))
        return events

    async def close(self) -> None:
        for generation in self._generations:
            generation.cancel()
        await self._stack.aclose()


async def start_chat(pool: ModelPool, request: ChatRequest) -> RunningRequest:
    """Start answering a conversation.

    Raises:
        ApiError: there is no such model, it cannot be loaded, or its upstream refuses the request.
        LlmEdgeError: whatever `Engine.chat` raises.
    """
    if (upstream := pool.upstreams.find(request.model)) is not None:
        return await upstream.start(request)

    def start(loaded: LoadedModel) -> _Started:
        engine, use = loaded.engine, request.tool_use
        tokens = chat_tokens(loaded, request)
        loaded.prefixes.record(request, tokens)
        constraint = constraint_for(loaded.tool_format, use, engine.tokenizer, request.overrides.get("constraint"))
        params = with_overrides(loaded, {**request.overrides, "constraint": constraint})
        generations = engine.generate_many(tokens, params, request.count)
        calls = []
        if use.callable:
            calls = [CallEvents(n, loaded.tool_format, use, engine.tokenizer) for n in range(request.count)]
        return _Started(len(tokens), generations, calls)

    return await _start(pool, request.model, start)


async def start_text(pool: ModelPool, request: TextRequest) -> RunningRequest:
    """Start continuing a text; raises what `start_chat` does."""

    def start(loaded: LoadedModel) -> _Started:
        engine = loaded.engine
        params = with_overrides(loaded, request.overrides)
        tokens = engine.encode_prompt(request.prompt)
        return _Started(len(tokens), engine.generate_many(tokens, params, request.count))

    running = await _start(pool, request.model, start)
    given = request.prompt
    running.prompt_text = given if isinstance(given, str) else running.tokenizer.decode(given, skip_special=False)
    return running


@dataclass(frozen=True, slots=True)
class _Started:
    prompt_tokens: int
    generations: Sequence[AsyncGeneration]
    calls: Sequence[CallEvents] = ()


async def _start(pool: ModelPool, name: str, start: Callable[[LoadedModel], _Started]) -> EngineRequest:
    async with AsyncExitStack() as stack:
        loaded = await stack.enter_async_context(pool.use(name))
        # On a thread: rendering, tokenizing and compiling a constraint may take long.
        started = await run_in_threadpool(start, loaded)
        return EngineRequest(loaded, started.prompt_tokens, started.generations, stack.pop_all(), started.calls)
    raise AssertionError("unreachable")


def with_overrides(loaded: LoadedModel, overrides: Mapping[str, Any]) -> SamplingParams:
    """The sampling parameters of a request; without a limit, an answer may fill the context."""
    engine = loaded.engine
    return replace(engine.default_params, **{"max_tokens": engine.context_length, **loaded.generation, **overrides})


def chat_tokens(loaded: LoadedModel, request: ChatRequest) -> list[int]:
    """The prompt of a conversation.

    A template that accepts a system message only at the beginning gets all of them there, as one message.
    """
    engine, tools = loaded.engine, request.tool_use.tools if request.tool_use.callable else ()
    messages, prefix, reasoning_prefix = list(request.messages), "", ""
    variables: dict[str, Any] = dict(request.template_variables)
    answering = variables.get("add_generation_prompt", True)
    if answering and messages and messages[-1]["role"] == "assistant" and not messages[-1].get("tool_calls"):
        last = messages.pop()
        prefix, reasoning_prefix = last.get("content") or "", last.get("reasoning_content") or ""
    if not loaded.tool_format.native:
        messages = with_instructions(messages, tools)
    elif tools:
        variables["tools"] = [tool.to_json() for tool in tools]
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


_FINISH = {
    FinishReason.STOP: Finish.STOP,
    FinishReason.LENGTH: Finish.LENGTH,
    FinishReason.CANCELLED: Finish.CANCELLED,
}
