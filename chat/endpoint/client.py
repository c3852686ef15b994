"""`EndpointResponder`: a model behind an endpoint for OpenAI's chat completions.

Responses are not trusted: their size and the time between chunks are limited, and errors are one line that never
contains the key. The `openai` client is imported on first use, on a thread, because that takes over a second.
"""

from __future__ import annotations

import contextlib
import ipaddress
import math
import os
import re
import urllib.parse
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Final

from llm_edge.chat.endpoint import key as endpoint_key
from llm_edge.chat.endpoint import request as endpoint_body
from llm_edge.chat.settings import Section, Settings
from llm_edge.runtime.errors import ContextLengthError, InputError
from llm_edge.runtime.installation import install_hint
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.runtime.text.prompts import Message

if TYPE_CHECKING:
    from llm_edge.chat.endpoint.http import OnSocket, Wire
    from llm_edge.chat.endpoint.reply import EndpointReply

MAX_MODELS = 2_000
_MAX_RECENT = 20
_MAX_TEXTS = 200_000  # different tokens that are stored for the token view
_MAX_CONTEXT = 1 << 24
_CONTEXT_KEYS = ("context_length", "max_model_len", "context_window", "max_context_length")
_DEFAULTS = SamplingParams(max_tokens=2048)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """A model behind an endpoint, as the settings store it, without its key.

    Attributes:
        url: base URL of the API, such as `https://api.example.com/v1`; see `base_url`.
        model: the model's name at the endpoint.
        key: the place of the API key, see `endpoint.key`: `env:NAME` or `keyring`; "" = no key.
    """

    url: str
    model: str
    key: str = ""

    @property
    def host(self) -> str:
        """The host name, with the port if the URL has one."""
        return urllib.parse.urlsplit(self.url).netloc

    def stored(self) -> dict[str, str]:
        """The JSON value that the settings store."""
        return {"url": self.url, "model": self.model, "key": self.key}

    @classmethod
    def from_stored(cls, value: Mapping[str, Any]) -> Endpoint:
        """The endpoint that a JSON value of the settings describes.

        Raises:
            InputError: the URL or the model is missing or invalid.
        """
        model, key = value.get("model"), value.get("key", "")
        if not isinstance(model, str) or not model.strip() or not isinstance(key, str):
            raise InputError("an endpoint in the settings has no model: remove it there, or enter it again")
        return cls(base_url(str(value.get("url", ""))), model.strip(), key)


def _objects(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise ValueError("expected a list of objects")
    return list(value)


ENDPOINTS: Final = Section[list[dict[str, Any]]]("endpoints", list, _objects)


def endpoints(settings: Settings) -> list[Endpoint]:
    """Recently used endpoints, the latest first; invalid ones are left out."""
    found = []
    for stored in settings.get(ENDPOINTS):
        with contextlib.suppress(InputError):
            found.append(Endpoint.from_stored(stored))
    return found


def named_endpoint(url: str, model: str, key: str | None) -> Endpoint:
    """The endpoint that a command line names. Without a key, it is the one that was used last with this URL, if any.

    Raises:
        InputError: the URL cannot be used.
    """
    url = base_url(url)
    if key is None:
        with contextlib.suppress(InputError):  # no settings without platformdirs
            key = next((each.key for each in endpoints(Settings()) if each.url == url), "")
    return Endpoint(url, model.strip(), key or "")


def used(settings: Settings, endpoint: Endpoint) -> None:
    """Make an endpoint the first of the recently used ones.

    Raises:
        MachineError: the settings cannot be written.
    """
    own = endpoint.stored()
    same = {"url": own["url"], "model": own["model"]}
    settings.change(
        ENDPOINTS,
        lambda before: [own, *(each for each in before if {k: each.get(k) for k in same} != same)][:_MAX_RECENT],
    )


def base_url(text: str) -> str:
    """Complete a typed base URL: add a missing scheme and `/v1`, and remove the path of a call.

    Raises:
        InputError: it is not an HTTP URL, or contains a password.
    """
    text = text.strip()
    if not text:
        raise InputError("the base URL is missing: enter one, such as http://127.0.0.1:8000/v1")
    if re.match(r"[A-Za-z][\w+.-]*:(?!//)(?!\d)", text) or any(map(str.isspace, text)):  # "mailto:", not "localhost:80"
        raise InputError("the base URL must start with http:// or https:// and contain no spaces")
    if "://" not in text:
        text = f"{'http' if _is_local(_host(f'//{text}')) else 'https'}://{text}"
    text = text.rstrip("/")
    for end in ("/chat/completions", "/completions", "/models"):
        text = text.removesuffix(end)
    try:
        parts = urllib.parse.urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise InputError(f"the base URL is invalid ({error}): enter one such as http://127.0.0.1:8000/v1") from None
    if "@" in parts.netloc:
        raise InputError("the base URL contains a user or password: remove it, and choose where the key is")
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or not text.isprintable():
        raise InputError("the base URL must start with http:// or https:// and name a host")
    if parts.query or parts.fragment:
        raise InputError("the base URL contains a query (?…) or a fragment (#…): remove it")
    return text if parts.path.strip("/") else f"{parts.scheme}://{parts.netloc}/v1"


def warning(url: str, *, with_key: bool) -> str:
    """A warning to show before a key is sent to this URL; empty if there is none."""
    if with_key and urllib.parse.urlsplit(url).scheme == "http" and not _is_local(_host(url)):
        return f"{_host(url)} uses unencrypted http: others on the network can read the key and the conversation"
    return ""


def _host(url: str) -> str:
    try:
        return urllib.parse.urlsplit(url).hostname or ""
    except ValueError:
        return ""


def _is_local(host: str) -> bool:
    if host == "localhost" or host.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def list_models(url: str, key: str, *, patience: float = 10.0) -> list[str]:
    """The sorted names of an endpoint's models; empty if it does not list them.

    Raises:
        InputError, MachineError: the endpoint cannot be reached, or rejects the key.
    """
    wire = _wire(url, key, patience)
    try:
        return sorted({each["id"] for each in wire.models(MAX_MODELS)})
    finally:
        wire.close()


class EndpointResponder:
    """A `Responder` for a model behind an endpoint; its replies cannot be adjusted.

    `patience` is the timeout in seconds between two chunks.

    Raises:
        InputError: the endpoint cannot be reached, rejects the key, or lists models without this one.
    """

    adjusts = False
    continues_thoughts = False

    def __init__(self, endpoint: Endpoint, *, patience: float = 120.0) -> None:
        self.endpoint = endpoint
        self.name = endpoint.model
        self.detail = endpoint.host
        self.settings_key = f"{endpoint.model} at {endpoint.host}"
        self.unsupported = endpoint_body.unsupported(endpoint.url)
        self.context_length: int | None = None
        self.default_params = _DEFAULTS
        self._density = 0.0  # tokens per character, known once a prompt was too long
        self._patience = patience
        self._ids: dict[str, int] = {}
        self._texts: list[str] = []
        self._wire = _wire(endpoint.url, endpoint.key, patience)
        try:
            self._owner = self._look_up()
        except BaseException:
            self._wire.close()
            raise
        if self.context_length is not None:
            longest = max(min(_DEFAULTS.max_tokens, self.context_length // 2), 1)
            self.default_params = replace(_DEFAULTS, max_tokens=longest)

    def answer(
        self,
        messages: Sequence[Message],
        params: SamplingParams,
        *,
        assistant_prefix: str = "",
        reasoning_prefix: str = "",  # noqa: ARG002 (endpoints do not accept it)
        template_variables: Mapping[str, Any] | None = None,
    ) -> EndpointReply:
        """Prepare a request, which is sent when the reply is iterated.

        Raises:
            InputError: the endpoint is known not to continue answers, or does not support a parameter that is set.
            ContextLengthError: the conversation is too long, by the limit that an earlier error reported.
        """
        from llm_edge.chat.endpoint.reply import EndpointReply

        body = endpoint_body.body(self.name, messages, params)
        if template_variables:  # as vLLM and llama.cpp call it
            body["extra_body"]["chat_template_kwargs"] = dict(template_variables)
        characters = sum(len(each["content"]) for each in body["messages"])
        tokens = math.ceil(characters * self._density)
        if self.context_length is not None and tokens > self.context_length:
            raise ContextLengthError(tokens, self.context_length)
        if assistant_prefix:
            endpoint_body.add_prefix(body, assistant_prefix, self.endpoint.url, self._owner)
        stream = partial(self._stream, body, characters)
        return EndpointReply(stream, params, assistant_prefix, self._id, self._patience)

    def _stream(self, body: Mapping[str, Any], characters: int, on_socket: OnSocket) -> Generator[Any]:
        """Yield the chunks of an answer; stores the context's length if an error reports it."""
        try:
            yield from self._wire.stream(body, on_socket)
        except ContextLengthError as error:
            self.context_length = error.limit
            self._density = max(error.prompt_tokens / max(characters, 1), self._density)
            remedy = "ask again, and the oldest turns are left out"
            raise InputError(f"{str(error).removesuffix(': shorten the prompt')}: {remedy}") from None

    def count(self, messages: Sequence[Message]) -> None:
        """The tokenizer is unknown."""

    def token_text(self, token: int) -> str:
        """The text of a token id; ids are assigned here, because endpoints report tokens as text."""
        return self._texts[token] if 0 <= token < len(self._texts) else f"<{token}>"

    def close(self) -> None:
        """Close the HTTP client."""
        self._wire.close()

    def _id(self, text: str) -> int | None:
        """The id of a token's text; None if there are too many."""
        found = self._ids.get(text)
        if found is None and len(self._texts) < _MAX_TEXTS:
            found = self._ids[text] = len(self._texts)
            self._texts.append(text)
        return found

    def _look_up(self) -> str:
        """Find the model in the endpoint's list, and read its context length; returns its owner."""
        listed = self._wire.models(MAX_MODELS)
        own = next((each for each in listed if each["id"] == self.name), None)
        if own is None:
            if listed and len(listed) < MAX_MODELS:
                names = ", ".join(sorted(each["id"] for each in listed)[:5])
                raise InputError(f"{self.endpoint.host} has no model {self.name!r}; it lists {names}"[:300])
            return ""
        meta = own.get("meta")
        lengths = [own.get(key) for key in _CONTEXT_KEYS]
        lengths += [meta.get("n_ctx"), meta.get("n_ctx_train")] if isinstance(meta, dict) else []
        self.context_length = next((each for each in lengths if type(each) is int and 0 < each <= _MAX_CONTEXT), None)
        return str(own.get("owned_by", ""))


def _wire(url: str, key: str, patience: float) -> Wire:
    try:
        from llm_edge.chat.endpoint.http import Wire
    except ImportError as error:
        raise InputError(f"endpoints need {error.name}: {install_hint('tui')}") from error
    return Wire(url, endpoint_key.read(key, url), patience)


def environment_keys() -> list[str]:
    """The names of environment variables that seem to contain an API key."""
    return sorted(name for name, value in os.environ.items() if name.endswith("_API_KEY") and value.strip())
