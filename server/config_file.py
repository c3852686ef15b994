"""Reads the configuration file of `llm-serve`.

    server:                 # the options of the command line, with underscores: `ServeOptions`
      host: 127.0.0.1
      port: 8000
    generation:             # sampling parameters where a request gives none
      temperature: 0.7
      max_tokens: 500

Other sections belong to other programs, such as the `model:` and `tokenizer:` of a checkpoint's config.yaml, and are
ignored; of `api:` and `serving:` only the host and port count, where `server:` has none.
"""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from types import NoneType
from typing import Any, get_args, get_origin, get_type_hints

from llm_edge.runtime.errors import InputError, ParameterError
from llm_edge.runtime.safe_io import short_repr
from llm_edge.runtime.safe_yaml import read_yaml
from llm_edge.runtime.sampling.params import PARAMETERS, SamplingParams
from llm_edge.server.options import ServeOptions

_SECTIONS = ("server", "generation")
_FOREIGN_SERVERS = ("api", "serving")
_IGNORED = frozenset({"workers", "reload", "debug"})  # keys of `server:` that this server has no use for
_TOP_LEVEL = frozenset({"name", "version", "description", "seed", "device", "dtype"})
_SAMPLING_KEYS = {  # further names of sampling parameters
    "temp": "temperature",
    "max_length": "max_tokens",
    "max_gen_len": "max_tokens",
    "max_len": "max_tokens",
    "rep_penalty": "repetition_penalty",
    "penalty_window": "repetition_window",
    "repetition_penalty_window": "repetition_window",
    "rep_window": "repetition_window",
    "max_consecutive_newlines": "max_newlines",
}


@dataclass(frozen=True, slots=True)
class ConfigFile:
    """The content of a configuration file.

    Attributes:
        options: values of the fields of `ServeOptions` that the file sets.
        generation: sampling parameters that the file sets.
        notes: what was ignored, one line each.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    generation: Mapping[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


def read_config(path: Path) -> ConfigFile:
    """Read a configuration file.

    Raises:
        InputError: the file is not YAML; a key is unknown, or its value has the wrong type or is out of range.
    """
    content = read_yaml(path, error=InputError)
    foreign = [key for key in content if key not in _SECTIONS]
    for key in foreign:
        _check_foreign(path, key, content[key])
    options, used = _section(path, content, "server"), set()
    for name in _FOREIGN_SERVERS:
        section = content.get(name)
        if isinstance(section, Mapping):
            found = {key: section[key] for key in ("host", "port") if section.get(key) is not None}
            options = {**found, **options}
            used |= {name} if found else set()
    ignored = [*(key for key in foreign if key not in used), *(f"server.{key}" for key in options if key in _IGNORED)]
    checked = {key: _option(path, key, value) for key, value in options.items() if key not in _IGNORED}
    notes = [f"{path}: ignored: {', '.join(ignored)}"] if ignored else []
    return ConfigFile(checked, _generation(path, _section(path, content, "generation")), tuple(notes))


def dump_config(options: ServeOptions, generation: Mapping[str, Any]) -> str:
    """The text of a configuration file with these settings, without keys."""
    import yaml

    sections = {"server": options.shown(), "generation": dict(generation)}
    return yaml.safe_dump({name: section for name, section in sections.items() if section}, sort_keys=False)


def _section(path: Path, content: Mapping[str, Any], name: str) -> dict[str, Any]:
    section = content.get(name)
    if section is None:
        return {}
    if not isinstance(section, dict):
        raise InputError(f"{path}: {name} is {short_repr(section)}: give a section of settings")
    return {key: value for key, value in section.items() if value is not None}


def _check_foreign(path: Path, key: str, value: Any) -> None:
    """Raise for a top-level key that is probably one of ours, misspelt or misplaced."""
    if isinstance(value, Mapping):
        near = difflib.get_close_matches(key, _SECTIONS, n=1, cutoff=0.8)
        if near:
            raise InputError(f"{path}: unknown section {short_repr(key)}: did you mean {near[0]}?")
    elif key in _option_hints():
        raise InputError(f"{path}: {key} is outside of its section: write it below server:")
    elif key in PARAMETERS and key not in _TOP_LEVEL:
        raise InputError(f"{path}: {key} is outside of its section: write it below generation:")
    elif key not in _TOP_LEVEL and (near := difflib.get_close_matches(key, _option_hints(), n=1, cutoff=0.8)):
        raise InputError(f"{path}: unknown key {short_repr(key)}: did you mean {near[0]}, below server:?")


def _option_hints() -> dict[str, Any]:
    return get_type_hints(ServeOptions, include_extras=True)


def _unknown(path: Path, section: str, key: str, known: Iterable[str]) -> InputError:
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    remedy = f"did you mean {near[0]}?" if near else "docs/serving.md lists the keys"
    return InputError(f"{path}: {section}: unknown key {short_repr(key)}: {remedy}")


def _option(path: Path, key: str, value: Any) -> Any:
    """The value of a field of `ServeOptions`."""
    hints = _option_hints()
    if key not in hints:
        raise _unknown(path, "server", key, hints)
    hint, option = get_args(hints[key])
    kinds = [kind for kind in get_args(hint) if kind is not NoneType] if get_origin(hint) is not list else [hint]
    found, wanted = _converted(value, kinds[0] if kinds else hint, option.min, option.max)
    if wanted is not None:
        raise InputError(f"{path}: server.{key} is {short_repr(value)}: give {wanted}")
    return found


def _converted(value: Any, kind: Any, low: float | None, high: float | None) -> tuple[Any, str | None]:
    """A value of a type, and what is needed instead if it is none."""
    if kind in (int, float):
        wanted = "a whole number" if kind is int else "a number"
        bounds = f"{wanted} from {low:g} to {high:g}" if low is not None and high is not None else wanted
        if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
            return None, bounds
        fits = (low is None or value >= low) and (high is None or value <= high)  # NaN does not
        return kind(value) if fits else value, None if fits else bounds
    if kind is bool:
        return value, None if isinstance(value, bool) else "true or false"
    if get_origin(kind) is list:
        values = [value] if isinstance(value, str) else value
        fits = isinstance(values, list) and all(isinstance(each, str) for each in values)
        return values, None if fits else "a list of texts"
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return (kind(value), None) if value in list(kind) else (value, "one of " + ", ".join(kind))
    fits = isinstance(value, str) and value != "" and "\0" not in value
    return (kind(value) if fits else value), None if fits else "a text"


def _generation(path: Path, section: Mapping[str, Any]) -> dict[str, Any]:
    """Sampling parameters by our name, from our names and those of OpenAI, llama-server and transformers."""
    names = dict(_SAMPLING_KEYS)
    for name, spec in PARAMETERS.items():
        api = spec.api
        names |= {key: name for key in (api.llamacpp, api.openai, api.generation_config) if key is not None}
    names |= {name: name for name in PARAMETERS if name not in ("constraint", "logprobs")}
    found: dict[str, Any] = {}
    for key, value in section.items():
        if key == "do_sample":
            if not isinstance(value, bool):
                raise InputError(f"{path}: generation.do_sample is {short_repr(value)}: give true or false")
            continue
        if key not in names or names[key] not in PARAMETERS:
            raise _unknown(path, "generation", key, names)
        found[names[key]] = value
        try:
            SamplingParams(**{names[key]: value})
        except ParameterError as error:
            reason = str(error).removeprefix(f"{names[key]}: ")
            raise InputError(f"{path}: generation.{key}: {reason}") from error
    if section.get("do_sample") is False:
        found["temperature"] = 0.0
    return found


def merged(file: ConfigFile, given: Mapping[str, Any]) -> ServeOptions:
    """The effective options: the defaults, then the file, then those given on the command line."""
    return dataclasses.replace(ServeOptions(), **{**file.options, **given})
