"""`Upstreams`: models behind OpenAI-compatible servers, whose answers become our events.

The URL comes from the configuration alone. Redirects are not followed, no proxy is used, the host's address is checked
and fixed for each connection, and errors are one line that never contains the key.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import httpx2

from llm_edge.chat.endpoint.request import parameter_fields
from llm_edge.chat.text import one_line, printable
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.server.errors import ApiError, invalid
from llm_edge.server.request import ChatRequest
from llm_edge.server.running import RunningRequest
from llm_edge.server.upstream_address import pin
from llm_edge.server.upstream_config import UpstreamConfig
from llm_edge.server.upstream_stream import UpstreamRequest

_PATIENCE = 300.0  # seconds between two chunks
_CONNECT = 10.0  # seconds
_MAX_ERROR = 64 << 10  # bytes of an error's body
_MAX_MESSAGE = 300  # characters of it that are shown


class Upstreams:
    """The configured upstreams."""

    def __init__(self, configs: Sequence[UpstreamConfig] = ()) -> None:
        self._models = {
            f"{config.name}/{model}": UpstreamModel(self, config, model)
            for config in configs
            for model in config.models
        }
        self._client: httpx2.AsyncClient | None = None

    def names(self) -> list[str]:
        """The names of all models, as `upstream/model`."""
        return list(self._models)

    def find(self, name: str) -> UpstreamModel | None:
        """The model of this name, if it is behind an upstream."""
        return self._models.get(name)

    @property
    def client(self) -> httpx2.AsyncClient:
        """The HTTP client; it keeps no connections, since different hosts may share an address."""
        if self._client is None:
            self._client = httpx2.AsyncClient(
                timeout=httpx2.Timeout(_PATIENCE, connect=_CONNECT),
                limits=httpx2.Limits(max_keepalive_connections=0),
                follow_redirects=False,
                trust_env=False,
            )
        return self._client

    async def close(self) -> None:
        """Close the client."""
        if self._client is not None:
            await self._client.aclose()


class UpstreamModel:
    """One model of an upstream."""

    def __init__(self, upstreams: Upstreams, config: UpstreamConfig, model: str) -> None:
        self._upstreams = upstreams
        self._config = config
        self._model = model
        self.name = f"{config.name}/{model}"

    async def start(self, request: ChatRequest) -> RunningRequest:
        """Send a conversation.

        Raises:
            ApiError: the request cannot be expressed there, or the upstream cannot be reached or refuses it.
            ParameterError: a parameter is out of range, or unknown to such servers.
        """
        body = json.dumps(request_body(self._model, request), ensure_ascii=False).encode("utf-8", "replace")
        url = f"{self._config.url}/chat/completions"
        pinned = await pin(url, allow_private=self._config.allow_private)
        headers = {"host": pinned.host, "content-type": "application/json", "accept-encoding": "identity"}
        headers["user-agent"] = "llm-edge"
        if self._config.key:
            headers["authorization"] = f"Bearer {self._config.key}"
        client = self._upstreams.client
        sent = client.build_request(
            "POST", pinned.url, content=body, headers=headers, extensions={"sni_hostname": pinned.server_name}
        )
        try:
            response = await client.send(sent, stream=True)
        except httpx2.HTTPError as error:
            raise self._unreachable(error) from None
        if response.status_code != 200 or response.headers.get("content-encoding", "identity") != "identity":
            try:
                raise await self._refusal(response)
            finally:
                await response.aclose()
        return UpstreamRequest(self.name, request.count, response, self._unreachable, self._clean)

    def _unreachable(self, error: Exception) -> ApiError:
        reason = "did not answer in time" if isinstance(error, httpx2.TimeoutException) else "cannot be reached"
        return ApiError(502, f"the upstream {self._config.name} {reason}", "upstream_unreachable")

    async def _refusal(self, response: httpx2.Response) -> ApiError:
        status, name = response.status_code, self._config.name
        if status == 200:
            return ApiError(502, f"the upstream {name} compresses its answers without being asked", "upstream_failed")
        if 300 <= status < 400:
            return ApiError(502, f"the upstream {name} redirects, which is not followed", "upstream_redirects")
        words, code = await self._words(response)
        if status in (401, 403):
            return ApiError(502, f"the upstream {name} rejects the key ({status})", "upstream_unauthorized")
        if status == 429:
            return ApiError(429, f"the upstream {name} is at its limit: {words}", "upstream_busy", retry_after=10)
        if status in (400, 413, 422):
            return invalid(f"the upstream {name} rejects the request: {words}", code=code)
        return ApiError(502, f"the upstream {name} failed ({status}): {words}", "upstream_failed")

    async def _words(self, response: httpx2.Response) -> tuple[str, str | None]:
        """The message and the code of an error."""
        data = b""
        try:
            async for chunk in response.aiter_raw():
                data += chunk
                if len(data) > _MAX_ERROR:
                    break
            value = json.loads(data[:_MAX_ERROR])
        except (httpx2.HTTPError, ValueError, RecursionError):
            return "no reason given", None
        inner = value.get("error", value) if isinstance(value, Mapping) else None
        message = inner.get("message", inner.get("detail")) if isinstance(inner, Mapping) else inner
        code = inner.get("code") if isinstance(inner, Mapping) else None
        words = self._clean(message) if isinstance(message, str) and message.strip() else "no reason given"
        return words, self._clean(code) if isinstance(code, str) else None

    def _clean(self, text: str) -> str:
        """A text of the upstream as one line without the key."""
        if self._config.key:
            text = text[: 100 * _MAX_MESSAGE].replace(self._config.key, "[the key]")
        return one_line(printable(text), _MAX_MESSAGE)


def request_body(model: str, request: ChatRequest) -> dict[str, Any]:
    """The body of an OpenAI chat completion for a request of ours.

    Raises:
        ApiError, ParameterError: it cannot be expressed.
    """
    overrides = request.overrides
    if overrides.get("logprobs") is not None:
        raise invalid(f"{model}: log-probabilities are not available from an upstream: leave out logprobs", "logprobs")
    params = SamplingParams(**overrides)
    # Servers know an effort, if anything, but no budget of reasoning.
    values = {name: getattr(params, name) for name in overrides if name not in ("logprobs", "reasoning_budget")}
    standard, extra = parameter_fields(values)
    body: dict[str, Any] = {
        "model": model,
        "messages": [_message(message) for message in request.messages],
        "stream": True,
        "stream_options": {"include_usage": True},
        **standard,
        **extra,
    }
    if request.count > 1:
        body["n"] = request.count
    use = request.tool_use
    if use.tools:
        body["tools"] = [tool.to_json() for tool in use.tools]
        body["tool_choice"] = {"type": "function", "function": {"name": use.only}} if use.only else use.choice
        if not use.parallel:
            body["parallel_tool_calls"] = False
    variables = dict(request.template_variables)
    effort = variables.pop("reasoning_effort", None)
    if effort is not None:
        body["reasoning_effort"] = effort
        variables.pop("enable_thinking", None)
    if variables:
        body["chat_template_kwargs"] = variables
    return body


def _message(message: Mapping[str, Any]) -> dict[str, Any]:
    """A message with the arguments of calls as text, and without reasoning, which few servers accept."""
    found = {name: value for name, value in message.items() if name not in ("reasoning_content", "name")}
    if message.get("tool_calls"):
        found["tool_calls"] = [
            {
                "id": call.get("id", f"call_{number}"),
                "type": "function",
                "function": {
                    "name": call["function"]["name"],
                    "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False),
                },
            }
            for number, call in enumerate(message["tool_calls"])
        ]
    return found
