"""`UpstreamRequest`: the streamed answer of an upstream as events. Nothing that it sends is trusted."""

from __future__ import annotations

import json
import time
from collections.abc import AsyncIterator, Callable, Mapping
from typing import Any

import httpx2

from llm_edge.runtime.results import Timings
from llm_edge.server.errors import ApiError
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
from llm_edge.server.running import RunningRequest
from llm_edge.server.tools import new_call_id

_MAX_BYTES = 64 << 20  # of an answer
_MAX_LINE = 4 << 20  # bytes
_MAX_CALLS = 128
_MAX_TOKENS = 1 << 31
_FINISH = {"stop": Finish.STOP, "tool_calls": Finish.TOOL_CALLS, "function_call": Finish.TOOL_CALLS}


class UpstreamRequest(RunningRequest):
    """An answer of an upstream.

    Args:
        model: our name of the model.
        count: number of answers.
        response: has begun; `close` closes it.
        failed: the error for an exception of the client.
        clean: makes a text of the upstream fit to be shown.
    """

    def __init__(
        self,
        model: str,
        count: int,
        response: httpx2.Response,
        failed: Callable[[Exception], ApiError],
        clean: Callable[[str], str],
    ) -> None:
        super().__init__(model, count)
        self._response = response
        self._failed = failed
        self._clean = clean
        self._finish: dict[int, Finish] = {}
        self._calls: dict[tuple[int, int], int] = {}  # (choice, the upstream's index) -> our number
        self._began = time.perf_counter()
        self._first: float | None = None

    async def events(self) -> AsyncIterator[Event]:
        try:
            async for value in self._values():
                for event in self._events(value):
                    if self._first is None:
                        self._first = time.perf_counter()
                    yield event
            if not self._finish:
                raise ApiError(502, "the upstream's answer ended early", "upstream_failed")
            for choice in range(self.count):
                self.timings = self._timings()
                yield Completed(choice, self._finish.get(choice, Finish.LENGTH), self.timings)
        except httpx2.HTTPError as error:
            raise self._failed(error) from None
        finally:
            await self.close()

    async def close(self) -> None:
        await self._response.aclose()

    async def _values(self) -> AsyncIterator[Mapping[str, Any]]:
        """The JSON objects of the stream."""
        total, pending = 0, b""
        async for data in self._response.aiter_raw():
            total += len(data)
            *lines, pending = (pending + data).split(b"\n")
            if total > _MAX_BYTES or len(pending) > _MAX_LINE:
                raise ApiError(502, "the upstream sent too much data", "upstream_failed")
            for line in lines:
                if not line.startswith(b"data:"):
                    continue
                text = line[5:].strip()
                if text == b"[DONE]":
                    return
                try:
                    value = json.loads(text)
                except (ValueError, RecursionError):
                    raise ApiError(502, "the upstream sent an invalid response", "upstream_failed") from None
                if isinstance(value, Mapping):
                    yield value

    def _events(self, value: Mapping[str, Any]) -> list[Event]:
        if value.get("error"):
            error = value["error"]
            message = error.get("message") if isinstance(error, Mapping) else error
            words = self._clean(message) if isinstance(message, str) else "no reason given"
            raise ApiError(502, f"the upstream aborted the answer: {words}", "upstream_failed")
        if isinstance(value.get("usage"), Mapping):
            self.usage = _usage(value["usage"])
            self.prompt_tokens = self.usage.prompt_tokens
        events: list[Event] = []
        choices = value.get("choices")
        for entry in choices if isinstance(choices, list) else ():
            number = entry.get("index", 0) if isinstance(entry, Mapping) else None
            if type(number) is not int or not 0 <= number < self.count:
                continue
            if isinstance(entry.get("delta"), Mapping):
                events += self._delta(number, entry["delta"])
            finish = entry.get("finish_reason")
            if isinstance(finish, str):
                self._finish[number] = _FINISH.get(finish, Finish.LENGTH)
        return events

    def _delta(self, choice: int, delta: Mapping[str, Any]) -> list[Event]:
        events: list[Event] = []
        reasoning = delta.get("reasoning_content") or delta.get("reasoning")
        if isinstance(reasoning, str):
            events.append(ReasoningDelta(choice, reasoning))
        if isinstance(delta.get("content"), str) and delta["content"]:
            events.append(TextDelta(choice, delta["content"]))
        calls = delta.get("tool_calls")
        for call in calls if isinstance(calls, list) else ():
            if isinstance(call, Mapping):
                events += self._call(choice, call)
        return events

    def _call(self, choice: int, call: Mapping[str, Any]) -> list[Event]:
        index, function = call.get("index", 0), call.get("function")
        if type(index) is not int or not isinstance(function, Mapping):
            return []
        events: list[Event] = []
        number = self._calls.get((choice, index))
        if number is None:
            name, identifier = function.get("name"), call.get("id")
            if not isinstance(name, str) or len(self._calls) >= _MAX_CALLS:
                return []
            number = self._calls[choice, index] = sum(key[0] == choice for key in self._calls)
            given = isinstance(identifier, str) and identifier
            events.append(ToolCallStarted(choice, number, str(identifier) if given else new_call_id(), name))
        if isinstance(function.get("arguments"), str) and function["arguments"]:
            events.append(ToolCallDelta(choice, number, function["arguments"]))
        return events

    def _timings(self) -> Timings:
        now = time.perf_counter()
        first = self._first if self._first is not None else now
        waited = first - self._began
        used = self.usage
        return Timings(
            used.prompt_tokens,
            used.completion_tokens,
            waited,
            waited,
            now - first,
            used.reasoning_tokens,
            used.cached_tokens,
        )


def _usage(value: Mapping[str, Any]) -> Usage:
    def number(fields: Any, name: str) -> int:
        found = fields.get(name) if isinstance(fields, Mapping) else None
        return found if type(found) is int and 0 <= found < _MAX_TOKENS else 0

    return Usage(
        number(value, "prompt_tokens"),
        number(value, "completion_tokens"),
        number(value.get("completion_tokens_details"), "reasoning_tokens"),
        number(value.get("prompt_tokens_details"), "cached_tokens"),
    )
