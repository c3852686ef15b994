"""OpenAI's `POST /v1/chat/completions`.

https://platform.openai.com/docs/api-reference/chat. Further fields: see `sampling_overrides`, and
`chat_template_kwargs`. Reasoning is returned as `reasoning_content`, as by DeepSeek, vLLM and llama-server.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping
from dataclasses import replace
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field

from llm_edge.server.errors import error_route, invalid
from llm_edge.server.events import Completed, Event, ReasoningDelta, TextDelta, ToolCallDelta, ToolCallStarted
from llm_edge.server.generation import start_chat
from llm_edge.server.messages import chat_messages, tool_use
from llm_edge.server.protocols.openai_common import (
    error_body,
    finish_reason,
    head,
    logprobs_content,
    stream_error,
    usage,
)
from llm_edge.server.request import ChatRequest, choices, reasoning_overrides, sampling_overrides
from llm_edge.server.running import RunningRequest
from llm_edge.server.state import server_state
from llm_edge.server.streaming import DONE, event_stream, sse, unless_disconnected

router = APIRouter(route_class=error_route(error_body), tags=["OpenAI"])


class ChatCompletion(BaseModel):
    """The body of a request; sampling parameters are further fields."""

    model_config = ConfigDict(extra="allow")

    messages: list[dict[str, Any]] = Field(min_length=1)
    model: str = ""
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    n: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    response_format: dict[str, Any] | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    reasoning_effort: str | None = None
    reasoning_budget: int | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    add_generation_prompt: bool | None = None

    def to_request(self) -> ChatRequest:
        """The request that a model answers.

        Raises:
            ApiError: a field is out of range or malformed.
        """
        fields = self.model_dump()
        reasoning, variables = reasoning_overrides(self.reasoning_effort, self.reasoning_budget)
        if self.add_generation_prompt is not None:
            variables["add_generation_prompt"] = self.add_generation_prompt
        overrides = {**sampling_overrides(fields), **reasoning}
        if self.top_logprobs is not None and not self.logprobs:
            raise invalid("top_logprobs needs logprobs: true", "top_logprobs")
        if self.logprobs:
            overrides["logprobs"] = self.top_logprobs or 0
        return ChatRequest(
            self.model,
            chat_messages(self.messages),
            overrides,
            tool_use(self.tools, self.tool_choice, self.parallel_tool_calls),
            choices(self.n),
            {**variables, **(self.chat_template_kwargs or {})},
        )


@router.post("/v1/chat/completions")
@router.post("/chat/completions", include_in_schema=False)
async def chat_completions(body: ChatCompletion, request: Request) -> Response:
    """Answer a conversation."""
    state = server_state(request)
    running = await unless_disconnected(request, start_chat(state.pool, body.to_request()))
    if body.stream:
        options = body.stream_options or {}
        return event_stream(_stream(running, options), state.config.keepalive, stream_error, running.close)
    return JSONResponse(await unless_disconnected(request, _whole(running)))


async def _stream(running: RunningRequest, options: Mapping[str, Any]) -> AsyncIterator[bytes]:
    with_usage = bool(options.get("include_usage"))
    continuous = bool(options.get("continuous_usage_stats"))
    shared = {**head(running, "chatcmpl", "chat.completion.chunk"), **({"usage": None} if with_usage else {})}
    begun: set[int] = set()
    async for event in running.events():
        delta = _delta(running, event)
        if event.choice not in begun:
            begun.add(event.choice)
            first = {"role": "assistant", "content": ""}
            yield sse({**shared, "choices": [_choice(event.choice, first)]})
        chunk: dict[str, Any] = {**shared, "choices": [delta]}
        if with_usage and continuous:
            so_far = replace(running.usage, completion_tokens=running.generated_tokens)
            chunk["usage"] = usage(so_far)
        yield sse(chunk)
    if with_usage:
        yield sse({**shared, "choices": [], "usage": usage(running.usage)})
    yield DONE


def _delta(running: RunningRequest, event: Event) -> dict[str, Any]:
    match event:
        case TextDelta(choice, text, logprobs):
            found = _choice(choice, {"content": text})
            if logprobs:
                found["logprobs"] = {"content": logprobs_content(running.tokenizer, logprobs), "refusal": None}
            return found
        case ReasoningDelta(choice, text):
            return _choice(choice, {"reasoning_content": text})
        case ToolCallStarted(choice, number, identifier, name):
            function = {"name": name, "arguments": ""}
            call = {"index": number, "id": identifier, "type": "function", "function": function}
            return _choice(choice, {"tool_calls": [call]})
        case ToolCallDelta(choice, number, arguments):
            call = {"index": number, "function": {"arguments": arguments}}
            return _choice(choice, {"tool_calls": [call]})
        case Completed(choice, finish, _):
            return _choice(choice, {}, finish_reason(finish))


def _choice(index: int, delta: dict[str, Any], finish: str | None = None) -> dict[str, Any]:
    return {"index": index, "delta": delta, "logprobs": None, "finish_reason": finish}


async def _whole(running: RunningRequest) -> dict[str, Any]:
    collected = await running.collect()
    found = []
    for number, answer in enumerate(collected):
        message: dict[str, Any] = {"role": "assistant", "content": answer.text, "refusal": None}
        if answer.reasoning:
            message["reasoning_content"] = answer.reasoning
        if answer.calls:
            message["content"] = answer.text or None
            message["tool_calls"] = [
                {"id": call.id, "type": "function", "function": {"name": call.name, "arguments": call.arguments}}
                for call in answer.calls
            ]
        logprobs = None
        if answer.logprobs:
            logprobs = {"content": logprobs_content(running.tokenizer, answer.logprobs), "refusal": None}
        found.append(
            {"index": number, "message": message, "logprobs": logprobs, "finish_reason": finish_reason(answer.finish)}
        )
    return {**head(running, "chatcmpl", "chat.completion"), "choices": found, "usage": usage(running.usage)}
