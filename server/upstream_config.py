"""`UpstreamConfig`: an OpenAI-compatible server whose models are offered besides ours, and its file format.

The file is YAML:

    upstreams:
      - name: work                        # its models are called work/MODEL
        url: https://api.example.com/v1
        key_env: WORK_API_KEY             # or key_file: PATH
        models: [large, small]
        allow_private: false              # true: the host may have a private or loopback address
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from llm_edge.runtime.errors import InputError

_NAME = re.compile(r"[a-z0-9][a-z0-9._-]{0,39}")
_FIELDS = ("name", "url", "models", "key_env", "key_file", "allow_private")
_MAX_KEY = 8192  # characters


@dataclass(frozen=True, slots=True)
class UpstreamConfig:
    """An upstream.

    Attributes:
        name: the part before the slash in the names of its models.
        url: base URL of its API, such as `https://api.example.com/v1`.
        models: names of its models that are offered.
        key: sent to it, and shown nowhere.
        key_env: environment variable that the key came from; "" = none.
        allow_private: its host may have addresses that are not public.
    """

    name: str
    url: str
    models: tuple[str, ...]
    key: str = field(default="", repr=False)
    key_env: str = ""
    allow_private: bool = False


def read_upstreams(path: Path) -> tuple[UpstreamConfig, ...]:
    """Read a file of upstreams.

    Raises:
        InputError: it cannot be read, or an entry is invalid.
    """
    from llm_edge.runtime.safe_yaml import read_yaml

    content = read_yaml(path, error=InputError)
    unknown = [key for key in content if key != "upstreams"]
    if unknown:
        raise InputError(f"{path}: unknown key {unknown[0][:40]!r}: write a list below upstreams:")
    return parse_upstreams(content.get("upstreams"), str(path))


def parse_upstreams(value: Any, where: str) -> tuple[UpstreamConfig, ...]:
    """The upstreams that a list describes; see the module.

    Raises:
        InputError: an entry is invalid, or its key cannot be read; the message does not contain the key.
    """
    if not isinstance(value, list) or not all(isinstance(entry, Mapping) for entry in value):
        raise InputError(f"{where}: give a list of upstreams, each with name, url and models")
    found = tuple(_parse(entry, f"{where}: upstream {number}") for number, entry in enumerate(value, start=1))
    names = [upstream.name for upstream in found]
    if len(set(names)) < len(names):
        raise InputError(f"{where}: two upstreams have the same name: choose another one")
    return found


def _parse(entry: Mapping[Any, Any], where: str) -> UpstreamConfig:
    from llm_edge.chat.endpoint.client import base_url  # loads what --help must not

    unknown = [str(name) for name in entry if name not in _FIELDS]
    if unknown:
        raise InputError(f"{where}: unknown field {unknown[0][:40]!r}: use {', '.join(_FIELDS)}")
    name, models, private = entry.get("name"), entry.get("models"), entry.get("allow_private", False)
    if not isinstance(name, str) or _NAME.fullmatch(name) is None:
        raise InputError(f"{where}: name: use up to 40 lower-case letters, digits, dots, dashes and underscores")
    if not isinstance(models, list) or not models or not all(isinstance(each, str) and each for each in models):
        raise InputError(f"{where}: models: give a list of the names of its models")
    if not isinstance(private, bool):
        raise InputError(f"{where}: allow_private: use true or false")
    url = entry.get("url")
    if not isinstance(url, str) or not url.startswith(("http://", "https://")):
        raise InputError(f"{where}: url: give one that starts with https:// or http://")
    try:
        url = base_url(url)
    except InputError as error:
        raise InputError(f"{where}: url: {error}") from None
    variable = entry.get("key_env", "")
    if not isinstance(variable, str):
        raise InputError(f"{where}: key_env: give the name of an environment variable")
    return UpstreamConfig(name, url, tuple(models), _key(entry, variable, where), variable, private)


def _key(entry: Mapping[Any, Any], variable: str, where: str) -> str:
    file = entry.get("key_file")
    if variable:
        key, place = os.environ.get(variable, ""), f"key_env: the environment variable {variable[:40]}"
    elif isinstance(file, str):
        place = f"key_file: {file}"
        try:
            key = Path(file).expanduser().read_text("utf-8")[:_MAX_KEY]
        except (OSError, ValueError):
            raise InputError(f"{where}: {place} cannot be read") from None
    elif file is None:
        return ""
    else:
        raise InputError(f"{where}: key_file: give a path")
    key = key.strip()
    if not key or not key.isascii() or not key.isprintable() or " " in key:
        raise InputError(f"{where}: {place} holds no key: expected one line of ASCII without spaces")
    return key
