"""The body of a request to an endpoint: a conversation and its parameters as OpenAI's chat completions take them.

Format: https://platform.openai.com/docs/api-reference/chat/create. Parameters that it lacks are sent twice: under our
name, which is vLLM's, and under llama.cpp's.
"""

from __future__ import annotations

import json
import urllib.parse
from collections.abc import Mapping, Sequence
from typing import Any

from llm_edge.runtime.errors import InputError, ParameterError
from llm_edge.runtime.sampling.constraint import Constraint
from llm_edge.runtime.sampling.params import PARAMETERS, SamplingParams
from llm_edge.runtime.text.prompts import Message


def body(model: str, messages: Sequence[Message], params: SamplingParams) -> dict[str, Any]:
    """The arguments of `chat.completions.create`, including `extra_body`.

    Raises:
        ParameterError: a parameter that endpoints do not support is set.
    """
    # Where a server has its own default for a standard parameter, the displayed value is sent all the same.
    values = {
        name: getattr(params, name)
        for name, spec in PARAMETERS.items()
        if getattr(params, name) != spec.default or (spec.api.openai and spec.api.generation_config and spec.between)
    }
    standard, extra = parameter_fields(values)
    return {
        "model": model,
        "messages": [{"role": str(each["role"]), "content": str(each["content"])} for each in messages],
        "stream_options": {"include_usage": True},
        **standard,
        "extra_body": extra,
    }


def parameter_fields(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The fields for some parameters of `SamplingParams`: OpenAI's, and those that only other servers know.

    Raises:
        ParameterError: one that endpoints do not support is among them.
    """
    standard: dict[str, Any] = {}
    extra: dict[str, Any] = {}
    for name, value in values.items():
        spec = PARAMETERS[name]
        if spec.kind == "constraint":
            standard["response_format"] = _response_format(value)
        elif spec.api.openai:
            standard[spec.api.openai] = _json(value)
        elif spec.api.llamacpp:
            extra |= {name: _json(value), spec.api.llamacpp: _json(value)}
        else:
            raise ParameterError(f"{name}: endpoints do not support this parameter: reset it to the model's default")
    if values.get("logprobs") is not None:
        standard["logprobs"] = True
    if values.get("mirostat_tau"):
        extra["mirostat"] = 2
    return standard, extra


def unsupported(url: str) -> frozenset[str]:
    """Names of the parameters that the endpoint at a base URL does not take, as far as that is known.

    OpenAI rejects requests with fields of other servers.
    """
    names = {name for name, spec in PARAMETERS.items() if not (spec.api.openai or spec.api.llamacpp)} - {"constraint"}
    if _is_openai(url):
        names |= {name for name, spec in PARAMETERS.items() if not spec.api.openai} - {"constraint"}
    return frozenset(names)


def _is_openai(url: str) -> bool:
    host = urllib.parse.urlsplit(url).hostname or ""
    return host == "openai.com" or host.endswith((".openai.com", ".openai.azure.com"))


def _json(value: Any) -> Any:
    """Lists for tuples, and an object for logit biases."""
    if isinstance(value, tuple):
        return {str(token): bias for token, bias in value} if isinstance(value[0], tuple) else list(value)
    return value


def _response_format(constraint: Constraint) -> Mapping[str, Any]:
    if constraint.kind == "json":
        return {"type": "json_object"}
    if constraint.kind == "json_schema":
        schema = {"name": "answer", "schema": json.loads(constraint.text)}
        return {"type": "json_schema", "json_schema": schema}
    raise ParameterError(f"constraint: endpoints support JSON and JSON schemas, not {constraint.kind!r}: reset it")


def add_prefix(body: dict[str, Any], prefix: str, url: str, owner: str) -> None:
    """Add the start of the answer as the last message, which most servers continue.

    Args:
        body: modified in place.
        prefix: the answer so far.
        url: base URL of the endpoint; it and `owner` identify servers that need other fields.
        owner: `owned_by` of the model.

    Raises:
        InputError: this endpoint is known to start another answer instead.
    """
    host = urllib.parse.urlsplit(url).hostname or ""
    if _is_openai(url) or owner == "system":
        raise InputError(f"{host} does not continue answers: ask it to continue in a new message")
    last: dict[str, Any] = {"role": "assistant", "content": prefix}
    if host.endswith((".mistral.ai", ".deepseek.com")):
        last["prefix"] = True
    if owner == "vllm":
        body["extra_body"] |= {"add_generation_prompt": False, "continue_final_message": True}
    body["messages"] = [*body["messages"], last]
