"""What goes to an endpoint: our messages and parameters in the words of OpenAI's chat completions. Sends nothing.

Format: https://platform.openai.com/docs/api-reference/chat/create; `top_k`, `min_p` and `repetition_penalty`, which it
lacks, are named as vLLM names them, which most local servers understand.
"""

from __future__ import annotations

import dataclasses
import json
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from llm_edge.runtime.errors import InputError, ParameterError
from llm_edge.runtime.sampling.constraint import Constraint
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.runtime.text.prompts import Message

_ALWAYS = ("temperature", "top_p", "max_tokens")  # a server's own defaults are not those that the screen shows
_WHERE_SET = ("presence_penalty", "frequency_penalty", "seed")
_EXTRA = ("top_k", "min_p", "repetition_penalty")
_OURS_ALONE = ("repetition_window", "logprobs", "stop", "constraint")  # told in another way, or about `_EXTRA`
_OFF = SamplingParams()


def body(model: str, messages: Sequence[Message], params: SamplingParams) -> dict[str, Any]:
    """Arguments of `chat.completions.create`, `extra_body` among them.

    Raises:
        ParameterError: the parameters ask for what endpoints do not do.
    """
    known = (*_ALWAYS, *_WHERE_SET, *_EXTRA, *_OURS_ALONE)
    for field in dataclasses.fields(params):
        if field.name not in known and getattr(params, field.name) != getattr(_OFF, field.name):
            raise ParameterError(f"{field.name}: endpoints do not take this: set it back to the model's own value")
    made: dict[str, Any] = {
        "model": model,
        "messages": [{"role": str(each["role"]), "content": str(each["content"])} for each in messages],
        "stream_options": {"include_usage": True},
        **{name: getattr(params, name) for name in _ALWAYS},
        **_set(params, _WHERE_SET),
        "extra_body": _set(params, _EXTRA),
    }
    if params.stop:
        made["stop"] = list(params.stop)
    if params.logprobs is not None:
        made |= {"logprobs": True, "top_logprobs": params.logprobs}
    if params.constraint is not None:
        made["response_format"] = _response_format(params.constraint)
    return made


def _set(params: SamplingParams, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(params, name) for name in names if getattr(params, name) != getattr(_OFF, name)}


def _response_format(constraint: Constraint) -> Mapping[str, Any]:
    if constraint.kind == "json":
        return {"type": "json_object"}
    if constraint.kind == "json_schema":
        schema = {"name": "answer", "schema": json.loads(constraint.text)}
        return {"type": "json_schema", "json_schema": schema}
    raise ParameterError(f"constraint: endpoints take JSON and JSON schemas, not {constraint.kind!r}")


def let_continue(body: dict[str, Any], begin: str, url: str, owner: str) -> None:
    """Have an answer begun with `begin`: it becomes the last message, which most servers continue by themselves.

    Args:
        body: is changed.
        begin: the answer so far.
        url: of the endpoint, and
        owner: whom its model says it belongs to; by these the servers that differ are told apart.

    Raises:
        InputError: this endpoint is known to begin anew instead.
    """
    host = urllib.parse.urlsplit(url).hostname or ""
    if host == "openai.com" or host.endswith((".openai.com", ".openai.azure.com")) or owner == "system":
        raise InputError(f"{host} does not continue an answer that has ended: ask it to go on in a message of yours")
    last: dict[str, Any] = {"role": "assistant", "content": begin}
    if host.endswith((".mistral.ai", ".deepseek.com")):
        last["prefix"] = True
    if owner == "vllm":
        body["extra_body"] |= {"add_generation_prompt": False, "continue_final_message": True}
    body["messages"] = [*body["messages"], last]
