"""Reads the sampling that a GGUF file recommends (`general.sampling.*`), with the meaning it has in llama.cpp."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from llm_edge.checkpoint.gguf.file import GGUFFile
from llm_edge.runtime.safe_io import short_repr
from llm_edge.runtime.sampling.generation_config import SUPPORTED, read_generation_config

_PREFIX = "general.sampling."
# Key after the prefix -> key in generation_config.json, and llama.cpp's default (`common/common.h`) for files that set
# another of these keys.
_KEYS: Mapping[str, tuple[str, float]] = {
    "temp": ("temperature", 0.8),
    "top_k": ("top_k", 40),
    "top_p": ("top_p", 0.95),
    "min_p": ("min_p", 0.05),
    "xtc_probability": ("xtc_probability", 0.0),
    "xtc_threshold": ("xtc_threshold", 0.1),
    "penalty_repeat": ("repetition_penalty", 1.0),
    "penalty_last_n": ("repetition_window", 64),
    "mirostat_tau": ("mirostat_tau", 5.0),
    "mirostat_eta": ("mirostat_eta", 0.1),
}
_MIROSTAT = "mirostat"  # 0 is off, 1 and 2 are the versions of the algorithm


def recommended_sampling(file: GGUFFile) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Return the entries of a `generation_config.json`, and a note on each key that is ignored."""
    given = {key.removeprefix(_PREFIX): value for key, value in file.metadata.items() if key.startswith(_PREFIX)}
    notes = []
    values: dict[str, Any] = {}
    for key, value in given.items():
        if key not in _KEYS and key != _MIROSTAT:
            notes.append(f"{_PREFIX}{key}: {_shown(value)} is not supported")
            continue
        number = _number(value)
        if number is None:
            notes.append(f"{_PREFIX}{key}: {_shown(value)} is not a number")
        else:
            values[key] = number
    if not values:
        return {}, tuple(notes)
    version = values.pop(_MIROSTAT, 0)
    if version not in (0, 2):
        notes.append(f"{_PREFIX}{_MIROSTAT}: version {version:g} is not supported")
    found = {name: values.get(key, default) for key, (name, default) in _KEYS.items()}
    if version != 2:
        del found["mirostat_tau"], found["mirostat_eta"]
    found["temperature"] = max(found["temperature"], 0.0)
    greedy = found["temperature"] == 0
    defaults = read_generation_config({"do_sample": not greedy, **found})
    for reason in defaults.invalid:
        name, _, why = reason.partition(": ")
        notes.append(f"{_PREFIX}{next(key for key, (each, _) in _KEYS.items() if each == name)}: {why}")
    needed = set(defaults.params)  # the rest is the default
    if not greedy:
        needed.add("top_k")  # without it 50 would apply
    if "repetition_penalty" in needed:
        needed.add("repetition_window")  # without it the penalty would cover the whole text
    entries = {
        key: value for key, value in defaults.entries.items() if key in SUPPORTED and SUPPORTED[key].name in needed
    }
    return ({"do_sample": not greedy, **entries} if entries.keys() - {"temperature"} else {}), tuple(notes)


def _number(value: Any) -> float | None:
    """A finite number, also one written as text; a float32 as its shortest decimal form."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    if not math.isfinite(number):
        return None
    with np.errstate(over="ignore"):
        single = np.float32(number)
    return float(str(single)) if isinstance(value, float) and float(single) == number else number


def _shown(value: Any) -> str:
    return "an array" if isinstance(value, list | np.ndarray) else short_repr(value)
