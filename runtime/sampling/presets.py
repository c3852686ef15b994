"""Ways to draw under a name, of values that are usual; it knows nothing of models and their own defaults."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from llm_edge.runtime.errors import ParameterError
from llm_edge.runtime.sampling.params import SamplingParams

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
        "greedy": "always the most probable token: for facts, code and tests",
        "precise": "little chance: for summaries, extraction and translation",
        "balanced": "for conversation",
        "creative": "for stories; does not repeat itself",
        "wild": "for ideas; the most obvious word is often left out",
        "steady": "for long texts; mirostat holds the surprise of each token at 5 bits on average",
    }
)

# What a preset decides, by its own value or by the default one; a seed, limits, stops, bans and penalties stay.
DECIDED = frozenset(
    {"temperature", "top_n_sigma", "top_k", "top_p", "min_p", "typical_p", "mirostat_tau", "mirostat_eta"}
    | {"xtc_probability", "xtc_threshold", "dry_multiplier", "dry_base", "dry_allowed_length", "dry_range"}
)


def apply_preset(name: str, base: SamplingParams) -> SamplingParams:
    """The parameters `base`, drawing as this preset says; what another preset decided is gone.

    Raises:
        ParameterError: there is no such preset.
    """
    if name not in PRESETS:
        raise ParameterError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    usual = {field.name: field.default for field in dataclasses.fields(SamplingParams) if field.name in DECIDED}
    return dataclasses.replace(base, **{**usual, **PRESETS[name]})
