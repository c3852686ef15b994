"""What OpenAI's endpoints share: errors, ids, usage, finish reasons and log-probabilities."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable
from typing import Any

from llm_edge.runtime.sampling.logprobs import TokenLogprob
from llm_edge.runtime.text.token_text import token_bytes, token_text
from llm_edge.runtime.text.tokenizer import Tokenizer
from llm_edge.server.errors import ApiError
from llm_edge.server.events import Finish, Usage
from llm_edge.server.running import RunningRequest
from llm_edge.server.streaming import DONE, sse

_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
_LOWEST = -9999.0  # OpenAI's value for impossible tokens; JSON has no infinity


def error_body(error: ApiError) -> dict[str, Any]:
    """An error as OpenAI writes it."""
    kind = _TYPES.get(error.status, "invalid_request_error" if error.status < 500 else "server_error")
    fields = {"message": error.message, "type": kind, "param": error.param, "code": error.code}
    return {"error": {**fields, **error.details}}


def stream_error(error: ApiError) -> bytes:
    """An error in place of the rest of a stream."""
    return sse(error_body(error)) + DONE


def head(running: RunningRequest, prefix: str, kind: str) -> dict[str, Any]:
    """The fields that all chunks of an answer share.

    Args:
        running: the request.
        prefix: of the id.
        kind: the `object`.
    """
    return {
        "id": f"{prefix}-{secrets.token_hex(12)}",
        "object": kind,
        "created": int(time.time()),
        "model": running.model,
        "system_fingerprint": running.fingerprint,
    }


def finish_reason(finish: Finish) -> str:
    """OpenAI knows no cancelled answers: a cancelled one was cut off."""
    return "length" if finish is Finish.CANCELLED else finish.value


def usage(used: Usage) -> dict[str, Any]:
    """The `usage` object."""
    return {
        "prompt_tokens": used.prompt_tokens,
        "completion_tokens": used.completion_tokens,
        "total_tokens": used.total_tokens,
        "prompt_tokens_details": {"cached_tokens": used.cached_tokens},
        "completion_tokens_details": {"reasoning_tokens": used.reasoning_tokens},
    }


def logprobs_content(tokenizer: Tokenizer, logprobs: Iterable[TokenLogprob]) -> list[dict[str, Any]]:
    """The `content` of a choice's `logprobs`; special tokens, which are not part of the text, are left out."""

    def entry(token: int, logprob: float) -> dict[str, Any]:
        text, content = token_text(tokenizer, token), list(token_bytes(tokenizer, token))
        return {"token": text, "logprob": max(logprob, _LOWEST), "bytes": content}

    return [
        {**entry(each.token, each.logprob), "top_logprobs": [entry(token, value) for token, value in each.top]}
        for each in logprobs
        if each.token not in tokenizer.special_ids
    ]
