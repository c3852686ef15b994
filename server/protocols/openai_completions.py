"""OpenAI's `POST /v1/completions`: continues a text without a chat template.

https://platform.openai.com/docs/api-reference/completions
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from contextlib import AsyncExitStack
from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel, ConfigDict

from llm_edge.runtime.sampling.logprobs import TokenLogprob
from llm_edge.runtime.text.token_text import token_text
from llm_edge.server.errors import error_route, invalid
from llm_edge.server.events import Completed, TextDelta, Usage
from llm_edge.server.generation import start_text
from llm_edge.server.models import ModelPool
from llm_edge.server.protocols.openai_common import error_body, finish_reason, head, stream_error, usage
from llm_edge.server.request import TextRequest, choices, sampling_overrides
from llm_edge.server.running import RunningRequest
from llm_edge.server.state import server_state
from llm_edge.server.streaming import DONE, event_stream, sse, unless_disconnected

router = APIRouter(route_class=error_route(error_body), tags=["OpenAI"])
_DEFAULT_TOKENS = 16  # OpenAI's default of this endpoint
_MAX_PROMPTS = 64


class Completion(BaseModel):
    """The body of a request; sampling parameters are further fields."""

    model_config = ConfigDict(extra="allow")

    prompt: str | list[str] | list[int] | list[list[int]]
    model: str = ""
    stream: bool | None = None
    stream_options: dict[str, Any] | None = None
    n: int | None = None
    echo: bool | None = None
    logprobs: int | None = None

    def to_requests(self) -> list[TextRequest]:
        """One request per prompt.

        Raises:
            ApiError: a field is out of range.
        """
        overrides = {"max_tokens": _DEFAULT_TOKENS, **sampling_overrides(self.model_dump())}
        if self.logprobs is not None:
            overrides["logprobs"] = self.logprobs
        prompts: list[str | list[int]]
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            prompts = [self.prompt]
        else:
            prompts = list(self.prompt)  # type: ignore[arg-type]
        if not 1 <= len(prompts) <= _MAX_PROMPTS:
            raise invalid(f"prompt: give 1 to {_MAX_PROMPTS} prompts", "prompt")
        count = choices(self.n)
        return [TextRequest(self.model, prompt, overrides, count) for prompt in prompts]


@router.post("/v1/completions")
@router.post("/completions", include_in_schema=False)
async def completions(body: Completion, request: Request) -> Response:
    """Continue one or several texts."""
    state = server_state(request)
    asked = body.to_requests()
    if body.stream and len(asked) > 1:
        raise invalid("stream: only one prompt can be streamed", "stream")
    running = await unless_disconnected(request, _start_all(state.pool, asked))
    if body.stream:
        with_usage = bool((body.stream_options or {}).get("include_usage"))
        events = _stream(running[0], with_usage, body.echo)
        return event_stream(events, state.config.keepalive, stream_error, running[0].close)
    return JSONResponse(await unless_disconnected(request, _whole(running, bool(body.echo))))


async def _start_all(pool: ModelPool, asked: list[TextRequest]) -> list[RunningRequest]:
    """Start all requests, or none of them."""
    async with AsyncExitStack() as stack:
        running = []
        for each in asked:
            started = await start_text(pool, each)
            stack.push_async_callback(started.close)
            running.append(started)
        stack.pop_all()
        return running
    raise AssertionError("unreachable")


async def _stream(running: RunningRequest, with_usage: bool, echo: bool | None) -> AsyncIterator[bytes]:
    shared, position = head(running, "cmpl", "text_completion"), 0
    if echo:
        yield sse({**shared, "choices": [_choice(0, running.prompt_text)]})
    async for event in running.events():
        match event:
            case TextDelta(choice, text, logprobs):
                found = _choice(choice, text)
                found["logprobs"] = _logprobs(running, logprobs, position)
                position += len(text)
                yield sse({**shared, "choices": [found]})
            case Completed(choice, finish, _):
                yield sse({**shared, "choices": [_choice(choice, "", finish_reason(finish))]})
    if with_usage:
        yield sse({**shared, "choices": [], "usage": usage(running.usage)})
    yield DONE


def _choice(index: int, text: str, finish: str | None = None) -> dict[str, Any]:
    return {"index": index, "text": text, "logprobs": None, "finish_reason": finish}


async def _whole(running: list[RunningRequest], echo: bool) -> dict[str, Any]:
    found: list[dict[str, Any]] = []
    total = Usage()
    for each in running:
        for answer in await each.collect():
            prompt = each.prompt_text if echo else ""
            choice = _choice(len(found), prompt + answer.text, finish_reason(answer.finish))
            choice["logprobs"] = _logprobs(each, answer.logprobs, len(prompt))
            found.append(choice)
        total = total.and_of(each.usage)
    return {**head(running[0], "cmpl", "text_completion"), "choices": found, "usage": usage(total)}


def _logprobs(running: RunningRequest, logprobs: Iterable[TokenLogprob], start: int) -> dict[str, Any] | None:
    """The older format of log-probabilities: parallel lists."""
    known = [each for each in logprobs if each.token not in running.tokenizer.special_ids]
    if not known:
        return None
    texts = [token_text(running.tokenizer, each.token) for each in known]
    offsets = [start + sum(map(len, texts[:number])) for number in range(len(texts))]
    return {
        "tokens": texts,
        "token_logprobs": [each.logprob for each in known],
        "top_logprobs": [{token_text(running.tokenizer, token): value for token, value in each.top} for each in known],
        "text_offset": offsets,
    }
