"""`ConfigReader`: type-checked access to the keys of a Hugging Face `config.json`."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NoReturn

from llm_edge.runtime.errors import CheckpointError, UnsupportedSettingError
from llm_edge.runtime.safe_io import short_repr

_MAX_LAYERS = 1_024


class ConfigReader:
    """Type-checked access to the keys of a config. Null counts as missing.

    All methods raise `CheckpointError` naming file and key if a value is missing or invalid.

    Args:
        raw: the parsed JSON object.
        where: path of the file, for error messages.

    Attributes:
        used: the keys read so far that are present, with their values.
    """

    def __init__(self, raw: Mapping[str, Any], where: str = "config.json") -> None:
        self._raw = raw
        self.where = where
        self.used: dict[str, Any] = {}

    def __contains__(self, key: str) -> bool:
        """Whether the key is present and not null."""
        return self._raw.get(key) is not None

    def value(self, key: str) -> Any:
        """Return the value unchecked, or None if it is missing."""
        found = self._raw.get(key)
        if found is not None:
            self.used[key] = found
        return found

    def _value_or(self, key: str, default: Any) -> Any:
        value = self.value(key)
        if value is None and default is None:
            self.fail(f"{key} is missing")
        return default if value is None else value

    def integer(self, key: str, default: int | None = None) -> int:
        """Return an integer; without a default the key is required."""
        value = self._value_or(key, default)
        if isinstance(value, bool) or not isinstance(value, int):
            self.fail(f"{key} is {short_repr(value)}, not an integer")
        if value.bit_length() > 63:
            self.fail(f"{key} is {short_repr(value)}, which is too large")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """Return an integer or float as a float; without a default the key is required."""
        value = self._value_or(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float):
            self.fail(f"{key} is {short_repr(value)}, not a number")
        try:
            return float(value)
        except OverflowError:  # an integer of hundreds of digits
            return math.inf

    def flag(self, key: str, default: bool = False) -> bool:
        """Return a boolean."""
        value = self._value_or(key, default)
        if not isinstance(value, bool):
            self.fail(f"{key} is {short_repr(value)}, not true or false")
        return value

    def text(self, key: str, default: str | None = None) -> str:
        """Return a string; without a default the key is required."""
        value = self._value_or(key, default)
        if not isinstance(value, str):
            self.fail(f"{key} is {short_repr(value)}, not a string")
        return value

    def positive(self, key: str, default: float | None = None) -> float:
        """Return a positive finite number; without a default the key is required."""
        value = self.number(key, default)
        if not 0 < value < math.inf:
            self.fail(f"{key} is {value}, not a positive number")
        return value

    def nullable_positive(self, key: str, default: float) -> float | None:
        """Return a positive finite number, None if the value is null, or the default if the key is missing."""
        return None if self._is_null(key) else self.positive(key, default)

    def nullable_integer(self, key: str, default: int | None) -> int | None:
        """Return an integer, None if the value is null, or the default if the key is missing."""
        if self._is_null(key) or (default is None and key not in self):
            return None
        return self.integer(key, default)

    def _is_null(self, key: str) -> bool:
        """Return whether a value is null, which counts as read: transformers may replace a missing key by a number."""
        null = key in self._raw and key not in self
        if null:
            self.used[key] = None
        return null

    def layer_count(self, key: str, default: int | None = None) -> int:
        """Return a number of layers, limited because lists of this length are allocated."""
        value = self.integer(key, default)
        if not 1 <= value <= _MAX_LAYERS:
            self.fail(f"{key} is {short_repr(value)}; it must be 1 to {_MAX_LAYERS}")
        return value

    def per_layer(self, key: str, layers: int) -> list[Any] | None:
        """Return the first `layers` entries of a list that must have at least as many, or None if it is missing."""
        value = self.value(key)
        if value is None:
            return None
        if not isinstance(value, list) or not layers <= len(value) <= 4_096:
            self.fail(f"{key} is not a list with an entry for each of {layers} layers")
        return value[:layers]

    def choice(self, key: str, choices: Mapping[str, Any], default: str) -> Any:
        """Return the entry of `choices` that the value names."""
        name = self.text(key, default)
        if name not in choices:
            self.refuse(f"{key} {short_repr(name)} is not supported; supported: {', '.join(map(repr, choices))}")
        return choices[name]

    def resolve_alias(self, name: str, alias: str) -> str:
        """Return which of two names of a key the config uses. Both with different values are an error."""
        if name in self and alias in self and self.value(name) != self.value(alias):
            self.fail(
                f"{name} is {short_repr(self.value(name))} but its alias {alias} is {short_repr(self.value(alias))}"
            )
        return alias if alias in self and name not in self else name

    def section(self, key: str) -> ConfigReader | None:
        """Return a reader of a nested object, or None if it is missing."""
        value = self.value(key)
        if value is None:
            return None
        if not isinstance(value, Mapping):
            self.fail(f"{key} is not an object")
        return ConfigReader(value, f"{self.where}: {key}")

    @property
    def has_sections(self) -> bool:
        """Whether any value is an object."""
        return any(isinstance(value, Mapping) for value in self._raw.values())

    def head_dim(self, hidden: int, heads: int) -> int:
        """Return `head_dim`, by default hidden size / heads."""
        if "head_dim" not in self and heads > 0 and hidden % heads:
            self.fail(
                f"hidden_size ({hidden}) is not a multiple of num_attention_heads ({heads}) "
                "and head_dim is not set: correct the config"
            )
        return self.integer("head_dim", hidden // max(heads, 1))

    def reject(self, *keys: str) -> None:
        """Fail if any of these unsupported keys is set (not null, false, 0 or empty)."""
        for key in keys:
            if self._raw.get(key):
                self.refuse(f"{key} is set, which is not supported")

    def require(self, key: str, value: Any) -> None:
        """Fail if the key is present with a different value."""
        found = self.value(key)
        if found is not None and found != value:
            self.refuse(f"{key} is {short_repr(found)}; only {value!r} is supported")

    def fail(self, reason: str) -> NoReturn:
        """Raise a `CheckpointError` about a value that is missing or invalid."""
        raise CheckpointError(f"{self.where}: {reason}")

    def refuse(self, reason: str) -> NoReturn:
        """Raise an `UnsupportedSettingError` about a valid setting that our decoder does not support."""
        raise UnsupportedSettingError(f"{self.where}: {reason}")
