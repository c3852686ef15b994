"""Anthropic's `POST /v1/messages` and `/v1/messages/count_tokens`.

https://docs.anthropic.com/en/api/messages
"""

from __future__ import annotations

import secrets
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict, Field
from starlette.concurrency import run_in_threadpool

from llm_edge.server.errors import ApiError, error_route, invalid
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
from llm_edge.server.generation import chat_tokens, start_chat
from llm_edge.server.messages import arguments_of, chat_messages, tool_use
from llm_edge.server.request import ChatRequest, ToolUse, reasoning_overrides, sampling_overrides
from llm_edge.server.running import CollectedAnswer, RunningRequest
from llm_edge.server.state import server_state
from llm_edge.server.streaming import event_stream, sse, unless_disconnected

_KINDS = {
    400: "invalid_request_error", 401: "authentication_error", 403: "permission_error", 404: "not_found_error",
    413: "request_too_large", 429: "rate_limit_error", 503: "overloaded_error",
}  # fmt: skip
_STOP = {Finish.STOP: "end_turn", Finish.LENGTH: "max_tokens", Finish.TOOL_CALLS: "tool_use"}
_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


def error_body(error: ApiError) -> dict[str, Any]:
    """An error as Anthropic writes it."""
    kind = _KINDS.get(error.status, "invalid_request_error" if error.status < 500 else "api_error")
    return {"type": "error", "error": {"type": kind, "message": error.message, **error.details}}


router = APIRouter(route_class=error_route(error_body), tags=["Anthropic"])


class CountTokens(BaseModel):
    """The body of a request, as far as it decides on the prompt."""

    model_config = ConfigDict(extra="allow")

    messages: list[dict[str, Any]] = Field(min_length=1)
    model: str = ""
    system: str | list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: dict[str, Any] | None = None
    stop_sequences: list[str] | None = None

    def to_request(self) -> ChatRequest:
        """The request that a model answers.

        Raises:
            ApiError: a field is out of range or malformed.
        """
        thinking = self.thinking or {}
        reasoning: dict[str, Any] = {}
        variables: dict[str, Any] = {}
        if thinking.get("type") in ("enabled", "adaptive"):
            reasoning, variables = reasoning_overrides(None, thinking.get("budget_tokens", 1 << 20))
        elif thinking.get("type") == "disabled":
            reasoning, variables = reasoning_overrides("none")
        overrides = {**sampling_overrides(self.model_dump()), **reasoning}
        if self.stop_sequences:
            overrides["stop"] = self.stop_sequences
        return ChatRequest(self.model, self._messages(), overrides, self._tools(), 1, variables)

    def _messages(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        if self.system:
            found.append({"role": "system", "content": _text_parts(self.system)})
        for number, message in enumerate(self.messages):
            found += _converted(message, f"messages.{number}")
        return chat_messages(found)

    def _tools(self) -> ToolUse:
        choice = self.tool_choice or {}
        kind = choice.get("type", "auto")
        if kind == "tool":
            picked: Any = {"name": choice.get("name")}
        elif kind in _CHOICES:
            picked = _CHOICES[kind]
        else:
            raise invalid(f"tool_choice.type is {kind!r}: use auto, any, tool or none", "tool_choice.type")
        own = [tool for tool in self.tools or () if tool.get("type", "custom") == "custom"]  # not built-in ones
        functions = [{"type": "function", "function": {**tool}} for tool in own]
        return tool_use(functions, picked, not choice.get("disable_parallel_tool_use"))


class CreateMessage(CountTokens):
    """The body of a request; sampling parameters are further fields."""

    max_tokens: int = Field(ge=1)
    stream: bool | None = None


def _text_parts(content: str | Sequence[Mapping[str, Any]]) -> Any:
    """System text; blocks other than text are refused by `chat_messages`."""
    if isinstance(content, str):
        return content
    texts = [block.get("text") for block in content if block.get("type") == "text"]
    return "\n\n".join(text for text in texts if isinstance(text, str))


def _converted(message: Mapping[str, Any], where: str) -> list[dict[str, Any]]:
    """A message as OpenAI writes it; results of tools become messages of their own."""
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise invalid(f"{where}.role is {role!r}: use user or assistant", f"{where}.role")
    if not isinstance(content, list):
        return [{"role": role, "content": content}]
    found: list[dict[str, Any]] = []
    texts: list[Any] = []
    calls: list[dict[str, Any]] = []
    thoughts: list[str] = []
    for number, block in enumerate(content):
        place = f"{where}.content.{number}"
        if not isinstance(block, Mapping):
            raise invalid(f"{place}: give an object with a type", place)
        match block.get("type"):
            case "thinking":
                thoughts.append(str(block.get("thinking", "")))
            case "redacted_thinking":
                pass
            case "tool_use":
                function = {"name": block.get("name"), "arguments": arguments_of(block.get("input"))}
                calls.append({"id": block.get("id"), "type": "function", "function": function})
            case "tool_result":
                found.append(_result(block, place))
            case _:
                texts.append(block)
    if texts or calls or thoughts or not found:
        own: dict[str, Any] = {"role": role, "content": texts}
        if thoughts:
            own["reasoning_content"] = "\n".join(thoughts)
        if calls:
            own["tool_calls"] = calls
        found.append(own)
    return found


def _result(block: Mapping[str, Any], where: str) -> dict[str, Any]:
    content = block.get("content")
    if isinstance(content, list):
        content = [part if isinstance(part, Mapping) else {"type": "invalid"} for part in content]
    elif content is not None and not isinstance(content, str):
        raise invalid(f"{where}.content: give a string or a list of blocks", where)
    result: dict[str, Any] = {"role": "tool", "tool_call_id": block.get("tool_use_id"), "content": content or ""}
    if block.get("is_error") and isinstance(result["content"], str):
        result["content"] = f"Error: {result['content']}"
    return result


@router.post("/v1/messages")
async def create_message(body: CreateMessage, request: Request) -> Response:
    """Answer a conversation."""
    state = server_state(request)
    asked = body.to_request()
    running = await unless_disconnected(request, start_chat(state.pool, asked))
    if body.stream:
        return event_stream(_stream(running), state.config.keepalive, _stream_error, running.close)
    (answer,) = await unless_disconnected(request, running.collect())
    stop, sequence = _ending(answer.finish, running)
    message = _message(running, _blocks(answer), stop, sequence)
    return JSONResponse({**message, "usage": _usage(running.usage)})


@router.post("/v1/messages/count_tokens")
async def count_tokens(body: CountTokens, request: Request) -> dict[str, int]:
    """The number of tokens of a prompt; nothing is generated."""
    asked = body.to_request()

    async def count() -> dict[str, int]:
        async with server_state(request).pool.use(asked.model) as loaded:
            return {"input_tokens": len(await run_in_threadpool(chat_tokens, loaded, asked))}

    return await unless_disconnected(request, count())


def _message(
    running: RunningRequest, content: list[dict[str, Any]], stop: str | None, sequence: str | None
) -> dict[str, Any]:
    return {
        "id": f"msg_{secrets.token_hex(12)}",
        "type": "message",
        "role": "assistant",
        "model": running.model,
        "content": content,
        "stop_reason": stop,
        "stop_sequence": sequence,
    }


def _ending(finish: Finish, running: RunningRequest) -> tuple[str, str | None]:
    """The stop reason, and the stop string that ended the answer."""
    if finish is Finish.STOP and running.stop_string is not None:
        return "stop_sequence", running.stop_string
    return _STOP.get(finish, "max_tokens"), None


def _usage(used: Usage) -> dict[str, int]:
    return {
        "input_tokens": used.prompt_tokens - used.cached_tokens,
        "cache_creation_input_tokens": 0,
        "cache_read_input_tokens": used.cached_tokens,
        "output_tokens": used.completion_tokens,
    }


def _blocks(answer: CollectedAnswer) -> list[dict[str, Any]]:
    blocks: list[dict[str, Any]] = []
    if answer.reasoning:
        blocks.append({"type": "thinking", "thinking": answer.reasoning, "signature": ""})
    if answer.text:
        blocks.append({"type": "text", "text": answer.text})
    for call in answer.calls:
        given = arguments_of(call.arguments)
        blocks.append({"type": "tool_use", "id": call.id, "name": call.name, "input": given})
    return blocks


class _Blocks:
    """Writes events as content blocks, numbered and each started and stopped once."""

    def __init__(self) -> None:
        self._number = -1
        self._kind = ""

    def events(self, event: Event) -> list[bytes]:
        match event:
            case ReasoningDelta(_, text):
                start = self._switch("thinking", {"type": "thinking", "thinking": "", "signature": ""})
                return [*start, self._delta({"type": "thinking_delta", "thinking": text})]
            case TextDelta(_, text, _) if text:
                start = self._switch("text", {"type": "text", "text": ""})
                return [*start, self._delta({"type": "text_delta", "text": text})]
            case ToolCallStarted(_, number, identifier, name):
                block = {"type": "tool_use", "id": identifier, "name": name, "input": {}}
                return self._switch(f"tool{number}", block)
            case ToolCallDelta(_, _, arguments):
                return [self._delta({"type": "input_json_delta", "partial_json": arguments})]
            case Completed():
                return self._stop()
        return []

    def _switch(self, kind: str, block: dict[str, Any]) -> list[bytes]:
        if kind == self._kind:
            return []
        stopped = self._stop()
        self._kind = kind
        self._number += 1
        event = {"type": "content_block_start", "index": self._number, "content_block": block}
        return [*stopped, sse(event, "content_block_start")]

    def _delta(self, delta: dict[str, Any]) -> bytes:
        return sse({"type": "content_block_delta", "index": self._number, "delta": delta}, "content_block_delta")

    def _stop(self) -> list[bytes]:
        if not self._kind:
            return []
        signed = [self._delta({"type": "signature_delta", "signature": ""})] if self._kind == "thinking" else []
        self._kind = ""
        return [*signed, sse({"type": "content_block_stop", "index": self._number}, "content_block_stop")]


def _stream_error(error: ApiError) -> bytes:
    return sse(error_body(error), "error")


async def _stream(running: RunningRequest) -> AsyncIterator[bytes]:
    begun = {**_message(running, [], None, None), "usage": {**_usage(Usage(running.prompt_tokens)), "output_tokens": 1}}
    yield sse({"type": "message_start", "message": begun}, "message_start")
    blocks, finish = _Blocks(), Finish.STOP
    async for event in running.events():
        for written in blocks.events(event):
            yield written
        if isinstance(event, Completed):
            finish = event.finish
    stop, sequence = _ending(finish, running)
    delta = {"stop_reason": stop, "stop_sequence": sequence}
    yield sse({"type": "message_delta", "delta": delta, "usage": _usage(running.usage)}, "message_delta")
    yield sse({"type": "message_stop"}, "message_stop")
