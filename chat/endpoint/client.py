"""Who answers elsewhere: an endpoint that speaks OpenAI's chat completions. Knows no widgets and no settings file.

What comes over the network is not trusted: it is bounded in bytes, events and waiting, and errors become one line
that never holds the key. The `openai` client is imported where it is first needed, on a thread: it takes over a second.
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
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.runtime.text.prompts import Message

if TYPE_CHECKING:
    from llm_edge.chat.endpoint.http import OnSocket, Wire
    from llm_edge.chat.endpoint.reply import EndpointReply

MOST_MODELS = 2_000
_MOST_KEPT = 20
_MOST_TEXTS = 200_000  # of different tokens that are remembered for the token view
_LONGEST_CONTEXT = 1 << 24
_CONTEXT_KEYS = ("context_length", "max_model_len", "context_window", "max_context_length")
_DEFAULTS = SamplingParams(max_tokens=2048)


@dataclass(frozen=True, slots=True)
class Endpoint:
    """How to reach a model elsewhere; this is what is kept of it, and holds no key.

    Attributes:
        url: base of the API, as `https://api.example.com/v1`; see `base_url`.
        model: by the name it has there.
        key: where the key is, see `endpoint_key`: a variable of the environment, or the keyring; "" = none.
    """

    url: str
    model: str
    key: str = ""

    @property
    def host(self) -> str:
        """The machine, and the port where one is named."""
        return urllib.parse.urlsplit(self.url).netloc

    def stored(self) -> dict[str, str]:
        """As settings keep it."""
        return {"url": self.url, "model": self.model, "key": self.key}

    @classmethod
    def from_stored(cls, value: Mapping[str, Any]) -> Endpoint:
        """Out of settings, which a person may have edited.

        Raises:
            InputError: it says no URL or no model that can be used.
        """
        model, key = value.get("model"), value.get("key", "")
        if not isinstance(model, str) or not model.strip() or not isinstance(key, str):
            raise InputError("an endpoint of the settings names no model: remove it there, or enter it anew")
        return cls(base_url(str(value.get("url", ""))), model.strip(), key)


def _objects(value: Any) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not all(isinstance(each, dict) for each in value):
        raise ValueError("a list of objects was expected")
    return list(value)


ENDPOINTS: Final = Section[list[dict[str, Any]]]("endpoints", list, _objects, list)


def endpoints(settings: Settings) -> list[Endpoint]:
    """Those that were used, the latest first; what cannot be used among them is left out."""
    found = []
    for stored in settings.get(ENDPOINTS):
        with contextlib.suppress(InputError):
            found.append(Endpoint.from_stored(stored))
    return found


def named_endpoint(url: str, model: str, key: str | None) -> Endpoint:
    """The endpoint that a command line names.

    Args:
        url: base of the API, as `base_url` takes it.
        model: the model's name.
        key: where the API key is; None = where it was when this URL was last used, else there is none.

    Raises:
        InputError: the URL cannot be used.
    """
    url = base_url(url)
    if key is None:
        with contextlib.suppress(InputError):  # no settings without platformdirs
            key = next((each.key for each in endpoints(Settings()) if each.url == url), "")
    return Endpoint(url, model.strip(), key or "")


def used(settings: Settings, endpoint: Endpoint) -> None:
    """An endpoint was used: it is the latest now. No key is kept.

    Raises:
        MachineError: that cannot be kept.
    """
    own = endpoint.stored()
    same = {"url": own["url"], "model": own["model"]}
    settings.change(
        ENDPOINTS,
        lambda before: [own, *(each for each in before if {k: each.get(k) for k in same} != same)][:_MOST_KEPT],
    )


def base_url(text: str) -> str:
    """What was typed as the base of an API: a scheme in front, no end that belongs to a call, `/v1` where no path is.

    Raises:
        InputError: it is none, or holds a password.
    """
    text = text.strip()
    if not text:
        raise InputError("the base URL is missing: give one, as http://127.0.0.1:8000/v1")
    if re.match(r"[A-Za-z][\w+.-]*:(?!//)(?!\d)", text) or any(map(str.isspace, text)):  # "mailto:", not "localhost:80"
        raise InputError("the base URL has to begin with http:// or https://, and has no spaces")
    if "://" not in text:
        text = f"{'http' if _is_local(_host(f'//{text}')) else 'https'}://{text}"
    text = text.rstrip("/")
    for end in ("/chat/completions", "/completions", "/models"):
        text = text.removesuffix(end)
    try:
        parts = urllib.parse.urlsplit(text)
        port = parts.port
    except ValueError as error:
        raise InputError(f"the base URL cannot be read ({error}): give one as http://127.0.0.1:8000/v1") from None
    if "@" in parts.netloc:
        raise InputError("the base URL holds a user or password: leave it out, and name where the key is")
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0 or not text.isprintable():
        raise InputError("the base URL has to begin with http:// or https:// and name a host")
    if parts.query or parts.fragment:
        raise InputError("the base URL ends in a query (?…) or a fragment (#…): leave that out")
    return text if parts.path.strip("/") else f"{parts.scheme}://{parts.netloc}/v1"


def warning(url: str, *, with_key: bool) -> str:
    """What is to be said before a key goes to this URL; empty where nothing is."""
    if with_key and urllib.parse.urlsplit(url).scheme == "http" and not _is_local(_host(url)):
        return f"{_host(url)} is reached by plain http: others on the way can read the key and all that is said"
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
    """Names of the models that an endpoint offers, sorted; empty where it offers no list.

    Args:
        url: the base.
        key: where the key is.
        patience: seconds to wait.

    Raises:
        InputError, MachineError: it cannot be reached, or refuses the key.
    """
    wire = _wire(url, key, patience)
    try:
        return sorted({each["id"] for each in wire.models(MOST_MODELS)})
    finally:
        wire.close()


class EndpointResponder:
    """A model of an endpoint; see `Responder`. Its replies cannot be adjusted once they come.

    Args:
        endpoint: which.
        patience: seconds that may pass between two signs of life.

    Raises:
        InputError: the endpoint cannot be reached, refuses the key, or lists models but not this one.
    """

    adjusts = False
    continues_thoughts = False

    def __init__(self, endpoint: Endpoint, *, patience: float = 120.0) -> None:
        self.endpoint = endpoint
        self.name = endpoint.model
        self.detail = endpoint.host
        self.context_length: int | None = None
        self.default_params = _DEFAULTS
        self._density = 0.0  # tokens a character, once a prompt was too long
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
            InputError: there is something to be continued, and the endpoint is known not to do that, or the
                parameters ask for what no endpoint does.
            ContextLengthError: by what an earlier refusal said, the conversation is too long.
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
        """The chunks of an answer; learns from a refusal how long a conversation may be."""
        try:
            yield from self._wire.stream(body, on_socket)
        except ContextLengthError as error:
            self.context_length = error.limit
            self._density = max(error.prompt_tokens / max(characters, 1), self._density)
            remedy = "ask again (Ctrl-R), and the oldest turns are left out"
            raise InputError(f"{str(error).removesuffix(': shorten the prompt')}: {remedy}") from None

    def count(self, messages: Sequence[Message]) -> None:  # noqa: ARG002 (nobody here knows its tokens)
        """See `Responder`."""
        return

    def token_text(self, token: int) -> str:
        """See `Responder`; ids are ours, for endpoints name tokens by their texts."""
        return self._texts[token] if 0 <= token < len(self._texts) else f"<{token}>"

    def close(self) -> None:
        """See `Responder`."""
        self._wire.close()

    def _id(self, text: str) -> int | None:
        """A number for a token's text; None once there are too many."""
        found = self._ids.get(text)
        if found is None and len(self._texts) < _MOST_TEXTS:
            found = self._ids[text] = len(self._texts)
            self._texts.append(text)
        return found

    def _look_up(self) -> str:
        """Find the model in the endpoint's list, and read there what it tells; returns who it says it belongs to."""
        listed = self._wire.models(MOST_MODELS)
        own = next((each for each in listed if each["id"] == self.name), None)
        if own is None:
            if listed and len(listed) < MOST_MODELS:
                names = ", ".join(sorted(each["id"] for each in listed)[:5])
                raise InputError(f"{self.endpoint.host} has no model {self.name!r}; it lists {names}"[:300])
            return ""
        meta = own.get("meta")
        places = [own.get(key) for key in _CONTEXT_KEYS]
        places += [meta.get("n_ctx"), meta.get("n_ctx_train")] if isinstance(meta, dict) else []
        self.context_length = next(
            (each for each in places if type(each) is int and 0 < each <= _LONGEST_CONTEXT), None
        )
        return str(own.get("owned_by", ""))


def _wire(url: str, key: str, patience: float) -> Wire:
    from llm_edge.chat.endpoint.http import Wire

    return Wire(url, endpoint_key.read(key, url), patience)


def environment_keys() -> list[str]:
    """Names of variables in the environment that look as if they held a key; never what they hold."""
    return sorted(name for name, value in os.environ.items() if name.endswith("_API_KEY") and value.strip())
