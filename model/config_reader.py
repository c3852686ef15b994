"""Reads a Hugging Face `config.json` key by key, with types checked. Knows no family and no model.

What a family asked for is kept: together with `model_type` it is what the bundle's own config.json says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from llm_edge.model.rope import (
    LinearScaling,
    Llama3Scaling,
    LongScaling,
    Rope,
    RopeScaling,
    YarnScaling,
    long_amplitude,
    yarn_amplitude,
)
from llm_edge.runtime.errors import CheckpointError
from llm_edge.runtime.show import show

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

    def first(self, name: str, alias: str) -> str:
        """Which of two names of a key the config uses; refused where it gives both, and different ones."""
        if name in self and alias in self and self.value(name) != self.value(alias):
            self.fail(f"{name} is {show(self.value(name))} and {alias} {show(self.value(alias))}: they are the same")
        return alias if alias in self and name not in self else name

    def either(self, name: str, alias: str, default: int) -> int:
        """A whole number that goes by two names."""
        return self.integer(self.first(name, alias), default)

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

    @property
    def nests(self) -> bool:
        """Whether some key holds an object."""
        return any(isinstance(value, Mapping) for value in self._raw.values())

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
    *,
    theta_key: str = "rope_theta",
    share_key: str | None = None,
    share: float = 1.0,
    layer_type: str | None = None,
    aliases: Mapping[str, str] | None = None,
    original: int | None = None,
) -> Rope:
    """Rotary positions as transformers 5 writes them (`rope_parameters`) or 4 did (`rope_theta`, `rope_scaling`).

    What transformers reads in one family and passes over in another is refused in the other: nobody meant it so.

    Args:
        config: the whole config.
        head_dim: D.
        theta: the family's default.
        theta_key: where the config itself may give it.
        share_key: where the config itself may give the share of a head that is rotated; None for a family whose heads
            are rotated whole.
        share: the family's default share.
        layer_type: which of the nested `rope_parameters` to take, in a family that nests them.
        aliases: further names of scalings, for example `su` for `longrope`.
        original: the family's default for `original_max_position_embeddings`, where it has one.
    """
    theta = config.number(theta_key, theta)
    share = config.number(share_key, share) if share_key is not None else share
    if "rope_parameters" in config and "rope_scaling" in config:
        config.fail("rope_parameters and rope_scaling are both given: keep one of them")
    field = "rope_parameters" if "rope_parameters" in config else "rope_scaling"
    section = config.section(field)
    if section is not None and field == "rope_parameters" and layer_type is not None:
        section = section.section(layer_type)
        if section is None:
            config.fail(f"rope_parameters has no {layer_type}: this family has one entry for each type of layer")
    elif section is not None and section.nests:
        section.fail("is nested by type of layer, which this family is not")
    if section is not None:
        theta = section.number("rope_theta", theta)
        share = section.number("partial_rotary_factor", share)
    if not 0 < share <= 1:  # NaN is not
        config.fail(f"partial_rotary_factor is {share}; above 0 and up to 1 is possible")
    if share_key is None and (share != 1 or config.number("partial_rotary_factor", 1.0) != 1):
        config.fail("partial_rotary_factor is set, which is not supported in this family")
    if not 1 <= theta <= 1e12:
        config.fail(f"{theta_key} is {theta}, outside of 1 to 1e12")
    dim = int(head_dim * share)
    if section is None:
        return Rope(theta, dim)
    kind = section.text("rope_type", section.text("type", "default"))
    kind = (aliases or {}).get(kind, kind)
    return Rope(theta, dim, _scaling(kind, config, section, dim, theta, field, original))


def _scaling(
    kind: str, config: ConfigReader, section: ConfigReader, dim: int, theta: float, field: str, default: int | None
) -> RopeScaling | None:
    if kind == "default":
        return None
    length = config.integer("max_position_embeddings", 2048)
    original = section.integer("original_max_position_embeddings", length)
    if "original_max_position_embeddings" in config or default is not None:
        outside = config.integer("original_max_position_embeddings", default)
        if original not in (outside, length):
            section.fail(f"original_max_position_embeddings is {original}, but {outside} in the config itself")
        original = outside
    if original < 2:
        section.fail(f"original_max_position_embeddings is {original}; at least 2 is needed")
    stretch = length / original

    def bounded(key: str, default: float) -> float:
        value = section.number(key, default)
        if not 1e-3 <= value <= 1e6:
            section.fail(f"{key} is {value}; 0.001 to 1000000 are possible")
        return value

    def divisors(key: str) -> tuple[float, ...]:
        value = section.value(key)
        right = isinstance(value, list) and len(value) == dim // 2 <= _MOST_FACTORS
        if not right or not all(
            isinstance(item, int | float) and not isinstance(item, bool) and 0 < item < 1e30 for item in value
        ):
            section.fail(f"{key} is not a list of {dim // 2} positive numbers")
        return tuple(map(float, value))

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
        amplitude = yarn_amplitude(factor)
        if section.number("mscale", 0) and section.number("mscale_all_dim", 0):
            scales = bounded("mscale", 1), bounded("mscale_all_dim", 1)
            amplitude = yarn_amplitude(factor, scales[0]) / yarn_amplitude(factor, scales[1])
        return YarnScaling(
            factor,
            original,
            bounded("beta_fast", 32),
            bounded("beta_slow", 1),
            section.factor("attention_factor", amplitude),
            section.flag("truncate", True),
        )
    if kind == "longrope":
        amplitude = section.factor("attention_factor", long_amplitude(section.factor("factor", stretch), original))
        return LongScaling(divisors("short_factor"), divisors("long_factor"), original, amplitude)
    kinds = "default, linear, llama3, yarn, longrope"
    return config.fail(f"{field} of type {show(kind)} is not supported; supported: {kinds}")
