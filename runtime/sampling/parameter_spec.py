"""`ParameterSpec`: everything there is to know about a sampling parameter, and the check of a value against it."""

from __future__ import annotations

import dataclasses
import reprlib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

from llm_edge.runtime.errors import ParameterError
from llm_edge.runtime.sampling.constraint import Constraint

Group = Literal["sampling", "penalties", "dry", "limits", "tokens", "reasoning", "output"]
Kind = Literal["float", "int", "bool", "strings", "token_ids", "logit_bias", "constraint", "text"]

_KINDS: Mapping[str, Kind] = {
    "float": "float",
    "int": "int",
    "bool": "bool",
    "tuple[str, ...]": "strings",
    "tuple[int, ...]": "token_ids",
    "tuple[tuple[int, float], ...]": "logit_bias",
    "Constraint": "constraint",
}


@dataclass(frozen=True, slots=True)
class Slider:
    """How a numeric parameter is edited with keys or the mouse; typed values may exceed the slider, within its range.

    Attributes:
        low, high: ends of the slider.
        step: change per key press.
        start: value that the first step up from "off" gives, for parameters that may be None.
    """

    low: float
    high: float
    step: float
    start: int = 0


@dataclass(frozen=True, slots=True)
class Api:
    """What other interfaces call a parameter; None where they lack it.

    Attributes:
        openai: OpenAI's chat completions.
        llamacpp: llama-server.
        generation_config: transformers' generation_config.json.
    """

    openai: str | None = None
    llamacpp: str | None = None
    generation_config: str | None = None


@dataclass(frozen=True, slots=True)
class ParameterSpec:
    """One sampling parameter.

    Attributes:
        name: field of `SamplingParams`, and with dashes the command-line option.
        kind: what values look like; `text` is for front ends only.
        optional: None is allowed and means off.
        default: value of `SamplingParams()`.
        between: inclusive range of a number.
        title: label in user interfaces.
        help: one sentence for user interfaces and `--help`.
        detail: what `help` leaves out: exact definition, source, interactions.
        group: heading under which it is listed; presets decide the groups `sampling` and `dry`.
        order: position in user interfaces; ties keep the order of `SamplingParams`.
        slider: for numbers that are edited with keys.
        api: its names elsewhere.
    """

    name: str
    kind: Kind
    optional: bool
    default: Any
    title: str
    help: str
    group: Group
    detail: str = ""
    between: tuple[float, float] | None = None
    slider: Slider | None = None
    order: int = 100
    api: Api = Api()

    @property
    def option(self) -> str:
        """The command-line option, such as `--top-p`."""
        return f"--{self.name.replace('_', '-')}"

    def checked(self, value: Any) -> Any:
        """The value in its canonical type: floats for numbers, tuples for lists.

        Raises:
            ParameterError: the value is of another kind or out of range.
        """
        if value is None and self.optional:
            return None
        return _CHECKS[self.kind](self, value)

    def _number(self, value: Any) -> float | int:
        assert self.between is not None
        (low, high), whole = self.between, self.kind == "int"
        fits = is_integer(value) or (isinstance(value, float) and not whole)
        if not fits or not low <= value <= high:  # NaN compares false; an int beyond any float compares too
            raise refused(self.name, value, f"{'an integer' if whole else 'a number'} from {low} to {high}")
        return int(value) if whole else float(value)

    def _bool(self, value: Any) -> bool:
        if not isinstance(value, bool):
            raise refused(self.name, value, "true or false")
        return value

    def _constraint(self, value: Any) -> Constraint:
        if not isinstance(value, Constraint):
            raise refused(self.name, value, "a Constraint")
        return value

    def _strings(self, value: Any) -> tuple[str, ...]:
        values = (value,) if isinstance(value, str) else value
        return self._items(values, "strings, none of them empty", lambda item: isinstance(item, str) and item != "")

    def _token_ids(self, value: Any) -> tuple[int, ...]:
        return self._items(value, "integers of 0 or more", _is_token)

    def _items(self, value: Any, wanted: str, allowed: Callable[[object], bool]) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple) or not all(map(allowed, value)):
            raise refused(self.name, value, f"a list of {wanted}")
        return tuple(value)

    def _logit_bias(self, value: Any) -> tuple[tuple[int, float], ...]:
        """Pairs sorted by token id; of pairs with the same id the last counts."""
        wanted = "a mapping of token ids of 0 or more to numbers from -100.0 to 100.0"
        pairs = value.items() if isinstance(value, Mapping) else value
        biases: dict[int, float] = {}
        if not isinstance(pairs, Iterable) or isinstance(pairs, str | bytes):
            raise refused(self.name, value, wanted)
        for pair in pairs:
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise refused(self.name, value, wanted)
            token, bias = pair
            if isinstance(token, str) and token.isascii() and token.isdigit() and len(token) < 20:
                token = int(token)  # JSON has no other keys
            if not _is_token(token) or not (is_integer(bias) or isinstance(bias, float)) or not -100 <= bias <= 100:
                raise refused(self.name, pair, wanted)
            biases[token] = float(bias)
        return tuple(sorted(biases.items()))


_CHECKS: Mapping[Kind, Callable[[ParameterSpec, Any], Any]] = {
    "float": ParameterSpec._number,
    "int": ParameterSpec._number,
    "bool": ParameterSpec._bool,
    "strings": ParameterSpec._strings,
    "token_ids": ParameterSpec._token_ids,
    "logit_bias": ParameterSpec._logit_bias,
    "constraint": ParameterSpec._constraint,
}


def parameter(default: Any, title: str, help: str, **details: Any) -> Any:  # noqa: A002 (what command lines call it)
    """A dataclass field that declares a sampling parameter; `details` are further fields of `ParameterSpec`."""
    return dataclasses.field(default=default, metadata={"title": title, "help": help, **details})


def specs_of(params: type) -> dict[str, ParameterSpec]:
    """The parameters that a dataclass of `parameter` fields declares, by name, in the order of its fields."""
    specs = {}
    for field in dataclasses.fields(params):
        kind = str(field.type).removesuffix(" | None")
        optional = kind != field.type
        specs[field.name] = ParameterSpec(field.name, _KINDS[kind], optional, field.default, **field.metadata)
    return specs


def refused(name: str, value: object, wanted: str) -> ParameterError:
    """The error for a value that a parameter cannot have."""
    return ParameterError(f"{name}: {reprlib.repr(value)} is not allowed, give {wanted}")


def is_integer(value: object) -> TypeGuard[int]:
    """Whether this is an int and not a bool."""
    return isinstance(value, int) and not isinstance(value, bool)


def _is_token(value: object) -> TypeGuard[int]:
    return is_integer(value) and value >= 0
