"""Presets: named combinations of sampling parameters that suit any model."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from llm_edge.runtime.errors import ParameterError
from llm_edge.runtime.sampling.params import PARAMETERS, SamplingParams

PRESETS: Mapping[str, Mapping[str, Any]] = MappingProxyType(
    {
        "greedy": MappingProxyType({"temperature": 0.0}),
        "precise": MappingProxyType({"temperature": 0.3, "top_p": 0.9}),
        "balanced": MappingProxyType({"temperature": 0.7, "top_k": 40, "top_p": 0.95, "min_p": 0.05}),
        "creative": MappingProxyType({"temperature": 1.0, "min_p": 0.05, "dry_multiplier": 0.8}),
        "wild": MappingProxyType({"temperature": 1.3, "min_p": 0.1, "dry_multiplier": 0.8, "xtc_probability": 0.5}),
        "steady": MappingProxyType({"temperature": 1.0, "mirostat_tau": 5.0}),
    }
)

DESCRIPTIONS: Mapping[str, str] = MappingProxyType(
    {
        "greedy": "always the most likely token: for facts, code and tests",
        "precise": "little randomness: for summaries, extraction and translation",
        "balanced": "for conversation",
        "creative": "for stories, without repetition",
        "wild": "for ideas: often skips the most obvious word",
        "steady": "for long texts: Mirostat keeps the surprise of each token at 5 bits on average",
    }
)

# A preset sets these, to its own values or the defaults; the seed, limits, stops, bans and penalties are kept.
PRESET_PARAMETERS = frozenset(name for name, spec in PARAMETERS.items() if spec.group in ("sampling", "dry"))


def apply_preset(name: str, base: SamplingParams) -> SamplingParams:
    """`base` with the sampling parameters of a preset, which replaces any earlier preset.

    Raises:
        ParameterError: there is no such preset.
    """
    if name not in PRESETS:
        raise ParameterError(f"unknown preset {name!r}; available: {', '.join(PRESETS)}")
    defaults = {parameter: PARAMETERS[parameter].default for parameter in PRESET_PARAMETERS}
    return dataclasses.replace(base, **{**defaults, **PRESETS[name]})
