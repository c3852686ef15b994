"""OpenAI's `POST /v1/responses`, stateless: nothing is stored, and the whole conversation comes with each request.

https://platform.openai.com/docs/api-reference/responses
"""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict

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
from llm_edge.server.generation import start_chat
from llm_edge.server.messages import chat_messages, tool_use
from llm_edge.server.protocols.openai_common import error_body
from llm_edge.server.request import ChatRequest, reasoning_overrides, sampling_overrides
from llm_edge.server.running import RunningRequest
from llm_edge.server.state import server_state
from llm_edge.server.streaming import event_stream, sse, unless_disconnected

router = APIRouter(route_class=error_route(error_body), tags=["OpenAI"])


class CreateResponse(BaseModel):
    """The body of a request; sampling parameters are further fields."""

    model_config = ConfigDict(extra="allow")

    input: str | list[dict[str, Any]]
    model: str = ""
    instructions: str | None = None
    stream: bool | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: dict[str, Any] | None = None
    reasoning: dict[str, Any] | None = None
    max_output_tokens: int | None = None
    previous_response_id: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    def to_request(self) -> ChatRequest:
        """The request that a model answers.

        Raises:
            ApiError: a field is out of range or malformed.
        """
        if self.previous_response_id is not None:
            raise invalid(
                "previous_response_id: responses are not stored; send the whole input", "previous_response_id"
            )
        fields = {**self.model_dump(), "response_format": (self.text or {}).get("format")}
        if self.max_output_tokens is not None:
            fields["max_tokens"] = self.max_output_tokens
        reasoning, variables = reasoning_overrides((self.reasoning or {}).get("effort"))
        choice = self.tool_choice
        if isinstance(choice, Mapping) and choice.get("type") not in ("function", None):
            choice = None  # of a tool that does not exist here
        return ChatRequest(
            self.model,
            self._messages(),
            {**sampling_overrides(fields), **reasoning},
            tool_use(self.tools, choice, self.parallel_tool_calls),
            1,
            {**variables, **(self.chat_template_kwargs or {})},
        )

    def _messages(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = []
        if self.instructions:
            found.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            found.append({"role": "user", "content": self.input})
        else:
            _add_items(found, self.input)
        return chat_messages(found)


def _add_items(found: list[dict[str, Any]], items: Sequence[Mapping[str, Any]]) -> None:
    """Append input items as messages; calls and reasoning join the assistant's message that they belong to."""

    def assistant() -> dict[str, Any]:
        if not found or found[-1]["role"] != "assistant":
            found.append({"role": "assistant", "content": ""})
        return found[-1]

    for number, item in enumerate(items):
        where = f"input.{number}"
        match item.get("type", "message"):
            case "message":
                message = {"role": item.get("role"), "content": item.get("content")}
                if message["role"] == "assistant" and found and found[-1] == {**found[-1], "content": ""}:
                    last = assistant()
                    last["content"] = message["content"]
                else:
                    found.append(message)
            case "function_call":
                call = {"name": item.get("name"), "arguments": item.get("arguments")}
                calls = assistant().setdefault("tool_calls", [])
                calls.append({"id": item.get("call_id"), "type": "function", "function": call})
            case "function_call_output":
                output = item.get("output")
                found.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": output})
            case "reasoning":
                parts = [*(item.get("content") or ()), *(item.get("summary") or ())]
                texts = [part.get("text") for part in parts if isinstance(part, Mapping)]
                found.append({"role": "assistant", "content": ""})
                found[-1]["reasoning_content"] = "\n".join(text for text in texts if isinstance(text, str))
            case "item_reference":
                raise invalid(f"{where}: items are not stored; send the item itself", where)
            case other:
                raise invalid(f"{where}.type is {str(other)[:40]!r}, which is not supported", f"{where}.type")


@router.post("/v1/responses")
@router.post("/responses", include_in_schema=False)
async def responses(body: CreateResponse, request: Request) -> Response:
    """Answer a conversation."""
    state = server_state(request)
    running = await unless_disconnected(request, start_chat(state.pool, body.to_request()))
    output = _Output(body, running)
    if body.stream:
        return event_stream(_stream(running, output), state.config.keepalive, output.failed, running.close)

    async def whole() -> dict[str, Any]:
        async for event in running.events():
            output.add(event)
        return output.response(running.usage)

    return JSONResponse(await unless_disconnected(request, whole()))


class _Output:
    """The response object and the events that build it up."""

    def __init__(self, body: CreateResponse, running: RunningRequest) -> None:
        self._body = body
        self._id = f"resp_{secrets.token_hex(16)}"
        self._created = int(time.time())
        self._running = running
        self._items: list[dict[str, Any]] = []
        self._open = ""  # what the latest item is
        self._finish: Finish | None = None
        self._sequence = 0

    def response(self, used: Usage | None = None, error: dict[str, Any] | None = None) -> dict[str, Any]:
        """The response as it is now."""
        status, details = "in_progress", None
        if error is not None:
            status = "failed"
        elif self._finish is Finish.LENGTH:
            status, details = "incomplete", {"reason": "max_output_tokens"}
        elif self._finish is not None:
            status = "cancelled" if self._finish is Finish.CANCELLED else "completed"
        body = self._body
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "error": error,
            "incomplete_details": details,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "model": self._running.model,
            "output": self._items,
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": (body.reasoning or {}).get("effort"), "summary": None},
            "store": False,
            "text": body.text or {"format": {"type": "text"}},
            "tool_choice": body.tool_choice or "auto",
            "tools": body.tools or [],
            "truncation": "disabled",
            "metadata": {},
            "usage": _usage(used) if used is not None else None,
        }

    def event(self, kind: str, **fields: Any) -> bytes:
        """A numbered event of the stream."""
        number = self._sequence
        self._sequence += 1
        return sse({"type": kind, "sequence_number": number, **fields}, kind)

    def failed(self, error: ApiError) -> bytes:
        """The last event of a stream that failed."""
        reason = {"code": error.code or "server_error", "message": error.message}
        return self.event("response.failed", response=self.response(self._running.usage, reason))

    def add(self, event: Event) -> list[bytes]:
        """Add an event to the response; returns the events of the stream."""
        match event:
            case TextDelta(_, text, _) if text:
                started = self._switch("message")
                self._items[-1]["content"][0]["text"] += text
                place = {**self._place(), "content_index": 0, "logprobs": []}
                return [*started, self.event("response.output_text.delta", **place, delta=text)]
            case ReasoningDelta(_, text):
                started = self._switch("reasoning")
                self._items[-1]["content"][0]["text"] += text
                place = {**self._place(), "content_index": 0}
                return [*started, self.event("response.reasoning_text.delta", **place, delta=text)]
            case ToolCallStarted(_, number, identifier, name):
                return self._switch(f"call{number}", {"call_id": identifier, "name": name})
            case ToolCallDelta(_, _, arguments):
                self._items[-1]["arguments"] += arguments
                return [self.event("response.function_call_arguments.delta", **self._place(), delta=arguments)]
            case Completed(_, finish, _):
                self._finish = finish
                return self._close()
        return []

    def _place(self) -> dict[str, Any]:
        return {"item_id": self._items[-1]["id"], "output_index": len(self._items) - 1}

    def _switch(self, kind: str, call: Mapping[str, str] | None = None) -> list[bytes]:
        """End the open item and begin another, unless it is of this kind already."""
        if kind == self._open:
            return []
        events = self._close()
        self._open = kind
        item: dict[str, Any]
        content: list[dict[str, Any]]
        if call is not None:
            item = {"id": f"fc_{secrets.token_hex(12)}", "type": "function_call", **call, "arguments": ""}
        elif kind == "reasoning":
            content = [{"type": "reasoning_text", "text": ""}]
            item = {"id": f"rs_{secrets.token_hex(12)}", "type": "reasoning", "summary": [], "content": content}
        else:
            content = [{"type": "output_text", "text": "", "annotations": [], "logprobs": []}]
            item = {"id": f"msg_{secrets.token_hex(12)}", "type": "message", "role": "assistant", "content": content}
        item["status"] = "in_progress"
        self._items.append(item)
        index = len(self._items) - 1
        shown = {**item, "content": []} if "content" in item else item
        events.append(self.event("response.output_item.added", output_index=index, item=shown))
        if "content" in item:
            part = item["content"][0]
            events.append(self.event("response.content_part.added", **self._place(), content_index=0, part=part))
        return events

    def _close(self) -> list[bytes]:
        """End the open item."""
        if not self._open:
            return []
        item, place, events = self._items[-1], self._place(), []
        item["status"] = "incomplete" if self._finish is Finish.LENGTH else "completed"
        if item["type"] == "function_call":
            done = {"name": item["name"], "arguments": item["arguments"]}
            events.append(self.event("response.function_call_arguments.done", **place, **done))
        else:
            part = item["content"][0]
            kind = "output_text" if item["type"] == "message" else "reasoning_text"
            extra: dict[str, Any] = {"logprobs": []} if kind == "output_text" else {}
            events.append(self.event(f"response.{kind}.done", **place, content_index=0, text=part["text"], **extra))
            events.append(self.event("response.content_part.done", **place, content_index=0, part=part))
        events.append(self.event("response.output_item.done", output_index=place["output_index"], item=item))
        self._open = ""
        return events


def _usage(used: Usage) -> dict[str, Any]:
    return {
        "input_tokens": used.prompt_tokens,
        "input_tokens_details": {"cached_tokens": used.cached_tokens},
        "output_tokens": used.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": used.reasoning_tokens},
        "total_tokens": used.total_tokens,
    }


async def _stream(running: RunningRequest, output: _Output) -> AsyncIterator[bytes]:
    yield output.event("response.created", response=output.response())
    yield output.event("response.in_progress", response=output.response())
    async for event in running.events():
        for written in output.add(event):
            yield written
    response = output.response(running.usage)
    yield output.event(f"response.{response['status']}", response=response)
