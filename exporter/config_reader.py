"""Reads a Hugging Face `config.json` key by key, with types checked. Knows no family and no model.

What a family asked for is kept: together with `model_type` it is what the bundle's own config.json says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from llm_edge.exporter.rope import (
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    Rope,
    RopeScaling,
    YarnScaling,
    long_amplitude,
    yarn_amplitude,
)
from llm_edge.exporter.show import show
from llm_edge.runtime.errors import CheckpointError

_MOST_FACTORS = 2_048
_MOST_LAYERS = 1_024


class ConfigReader:
    """The keys of a config. Every method raises `CheckpointError` naming the key where a value is not what it must be.

    Args:
        raw: the parsed JSON object.
        where: its file, for messages.

    Attributes:
        used: the keys that were asked for and are there, with their values.
    """

    def __init__(self, raw: Mapping[str, Any], where: str = "config.json") -> None:
        self._raw = raw
        self.where = where
        self.used: dict[str, Any] = {}

    def __contains__(self, key: str) -> bool:
        """Whether the key is there with a value other than null."""
        return self._raw.get(key) is not None

    def value(self, key: str) -> Any:
        """Whatever the config says, None where it says nothing."""
        found = self._raw.get(key)
        if found is not None:
            self.used[key] = found
        return found

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number; without a default it must be there."""
        value = self.value(key)
        if value is None:
            if default is None:
                self.fail(f"{key} is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int):
            self.fail(f"{key} is {show(value)}, not an integer")
        if value.bit_length() > 63:
            self.fail(f"{key} is {show(value)}, too large to be one")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """A number; without a default it must be there."""
        value = self.value(key)
        if value is None:
            if default is None:
                self.fail(f"{key} is missing")
            return default
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(f"{key} is {show(value)}, not a number")
        try:
            return float(value)
        except OverflowError:  # an integer of hundreds of digits
            return math.inf

    def flag(self, key: str, default: bool = False) -> bool:
        """True or false."""
        value = self.value(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            self.fail(f"{key} is {show(value)}, not true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """A string; without a default it must be there."""
        value = self.value(key)
        if value is None:
            if default is None:
                self.fail(f"{key} is missing")
            return default
        if not isinstance(value, str):
            self.fail(f"{key} is {show(value)}, not a string")
        return value

    def count(self, key: str, default: int | None = None) -> int:
        """A number of layers, bounded: the config's own lists are made that long."""
        value = self.integer(key, default)
        if not 1 <= value <= _MOST_LAYERS:
            self.fail(f"{key} is {show(value)}; 1 to {_MOST_LAYERS} are possible")
        return value

    def factor(self, key: str, default: float | None = None) -> float:
        """A positive finite number."""
        value = self.number(key, default)
        if not 0 < value < math.inf:
            self.fail(f"{key} is {value}, not a positive number")
        return value

    def nullable(self, key: str, default: int | None) -> int | None:
        """A whole number or null, which is another thing than a missing key."""
        return self.integer(key) if key in self else None if key in self._raw else default

    def nested(self, *keys: str) -> bool:
        """Whether an object inside objects is there."""
        value: Any = self._raw
        for key in keys:
            value = value.get(key) if isinstance(value, Mapping) else None
        return isinstance(value, Mapping)

    def choice(self, key: str, choices: Mapping[str, Any], default: str) -> Any:
        """What a name stands for."""
        name = self.text(key, default)
        if name not in choices:
            self.fail(f"{key} {show(name)} is not supported; supported: {', '.join(map(repr, choices))}")
        return choices[name]

    def entries(self, key: str, length: int) -> list[Any] | None:
        """A list of at least `length` entries, cut to that, or None where there is none."""
        value = self.value(key)
        if value is None:
            return None
        if not isinstance(value, list) or not length <= len(value) <= 4_096:
            self.fail(f"{key} is not a list with an entry for each of {length} layers")
        return value[:length]

    def section(self, key: str) -> ConfigReader | None:
        """A nested object, or None where there is none."""
        value = self.value(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            self.fail(f"{key} is not an object")
        return ConfigReader(value, f"{self.where}: {key}")

    def refuse(self, *flags: str) -> None:
        """Refuse a config that sets one of these: what it asks for is not supported."""
        for key in flags:
            if self._raw.get(key):
                self.fail(f"{key} is set, which is not supported")

    def only(self, key: str, value: Any) -> None:
        """Refuse a config that gives the key any other value."""
        found = self.value(key)
        if found is not None and found != value:
            self.fail(f"{key} is {show(found)}; only {value!r} is supported")

    def head_dim(self, hidden: int, heads: int) -> int:
        """Width of a head: the key's, or the share of a head in the hidden size."""
        if "head_dim" not in self and heads > 0 and hidden % heads:
            self.fail(
                f"hidden_size ({hidden}) is not a multiple of num_attention_heads ({heads}) "
                "and there is no head_dim: correct the config"
            )
        return self.integer("head_dim", hidden // max(heads, 1))

    def fail(self, reason: str) -> NoReturn:
        """Refuse the config."""
        raise CheckpointError(f"{self.where}: {reason}")


def read_rope(
    config: ConfigReader,
    head_dim: int,
    theta: float = 10_000.0,
    share: float = 1.0,
    layer_type: str | None = None,
    aliases: Mapping[str, str] | None = None,
) -> Rope:
    """Rotary positions as transformers 5 writes them (`rope_parameters`) or 4 did (`rope_theta`, `rope_scaling`).

    Args:
        config: the whole config.
        head_dim: D.
        theta: the family's default.
        share: the family's default share of a head that is rotated.
        layer_type: which of the nested `rope_parameters` to take, in configs that nest them.
        aliases: further names of scalings, for example `su` for `longrope`.
    """
    theta = config.number("rope_theta", theta)
    share = config.number("partial_rotary_factor", share)
    field = "rope_parameters" if "rope_parameters" in config else "rope_scaling"
    section = config.section(field)
    if section is not None and layer_type is not None and layer_type in section:
        section = section.section(layer_type)
    if section is not None:
        theta = section.number("rope_theta", theta)
        share = section.number("partial_rotary_factor", share)
    if not 0 < share <= 1:  # NaN is not
        config.fail(f"partial_rotary_factor is {share}; above 0 and up to 1 is possible")
    if not 1 <= theta <= 1e12:
        config.fail(f"rope_theta is {theta}, outside of 1 to 1e12")
    dim = int(head_dim * share)
    if section is None:
        return Rope(theta, dim)
    kind = section.text("rope_type", section.text("type", "default"))
    kind = (aliases or {}).get(kind, kind)
    return Rope(theta, dim, _scaling(kind, config, section, dim, theta, field))


def _scaling(
    kind: str, config: ConfigReader, section: ConfigReader, dim: int, theta: float, field: str
) -> RopeScaling | None:
    length = config.integer("max_position_embeddings", 2048)
    original = config.integer(
        "original_max_position_embeddings", section.integer("original_max_position_embeddings", length)
    )
    if original < 2:
        section.fail(f"original_max_position_embeddings is {original}; at least 2 is needed")
    stretch = length / original

    def divisors(key: str) -> tuple[float, ...]:
        value = section.value(key)
        right = isinstance(value, list) and len(value) == dim // 2 <= _MOST_FACTORS
        if not right or not all(
            isinstance(item, int | float) and not isinstance(item, bool) and 0 < item < 1e30 for item in value
        ):
            section.fail(f"{key} is not a list of {dim // 2} positive numbers")
        return tuple(map(float, value))

    if kind == "default":
        return None
    if kind == "linear":
        return LinearScaling(section.factor("factor"))
    if kind == "llama3":
        low, high = section.factor("low_freq_factor"), section.factor("high_freq_factor")
        if low >= high:
            section.fail(f"low_freq_factor ({low}) is not below high_freq_factor ({high})")
        return Llama3Scaling(section.factor("factor"), low, high, original)
    if kind == "yarn":
        if theta <= 1:
            section.fail("rope_theta of 1 cannot be scaled by yarn")
        factor = section.factor("factor", stretch)
        scales = section.number("mscale", 0), section.number("mscale_all_dim", 0)
        amplitude = yarn_amplitude(factor)
        if all(scales):
            amplitude = yarn_amplitude(factor, scales[0]) / yarn_amplitude(factor, scales[1])
        return YarnScaling(
            factor,
            original,
            section.factor("beta_fast", 32),
            section.factor("beta_slow", 1),
            section.factor("attention_factor", amplitude),
            section.flag("truncate", True),
        )
    if kind == "longrope":
        amplitude = section.factor("attention_factor", long_amplitude(section.factor("factor", stretch), original))
        return LongScaling(divisors("short_factor"), divisors("long_factor"), original, amplitude)
    kinds = "default, linear, llama3, yarn, longrope"
    return config.fail(f"{field} of type {show(kind)} is not supported; supported: {kinds}")
