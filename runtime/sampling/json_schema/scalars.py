"""The keywords of numbers and strings, in the form in which they are enforced exactly."""

from __future__ import annotations

import math
from decimal import Decimal
from fractions import Fraction
from typing import Any

from llm_edge.runtime.sampling.json_schema.document import Place, Schema, not_enforced, refuse
from llm_edge.runtime.sampling.json_schema.patterns import PatternError, translate

MAX_LENGTH = 1_000_000  # larger limits on the length of strings and arrays are lowered to these
MAX_ITEMS = 50_000
MAX_STEPS = 99_999  # of multipleOf; the lexer has as many states
_EXACT = 2**53  # llguidance computes with doubles
_LARGEST_INT = 2**63 - 1024  # the largest double within 64 bits

_YEAR = "(?:000[1-9]|00[1-9][0-9]|0[1-9][0-9]{2}|[1-9][0-9]{3})"
_LEAP = "(?:[0-9]{2}(?:0[48]|[2468][048]|[13579][26])|(?:0[48]|[2468][048]|[13579][26])00)"
_DATE = (
    rf"(?:{_YEAR}-(?:(?:0[13578]|1[02])-(?:0[1-9]|[12][0-9]|3[01])|(?:0[469]|11)-(?:0[1-9]|[12][0-9]|30)"
    rf"|02-(?:0[1-9]|1[0-9]|2[0-8]))|{_LEAP}-02-29)"
)
_TIME = r"(?:[01][0-9]|2[0-3]):[0-5][0-9]:[0-5][0-9](?:\.[0-9]{1,6})?(?:Z|[+-](?:[01][0-9]|2[0-3]):[0-5][0-9])"
# Dates that exist and seconds that Python's datetime reads; llguidance's own allow 29 February in every year.
_OWN_FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}",
}
_FORMATS = ("duration", "email", "hostname", "ipv4", "ipv6", "uri")


def number(kind: str, node: dict[str, Any], place: Place) -> Schema:
    """`number` or `integer` with inclusive bounds.

    Exclusive bounds of numbers become the next shorter decimal inward: a parser would round 1.99999999999999999 to 2.
    """
    low, high = _bounds(node, place)
    step = _step(node, place)
    if kind == "integer":
        if low:
            low = Fraction(math.floor(low[0]) + 1 if low[1] else math.ceil(low[0])), False
        if high:
            high = Fraction(math.ceil(high[0]) - 1 if high[1] else math.floor(high[0])), False
        step = None if step is None else Fraction(step.numerator)
    if low and high and (low[0] > high[0] or (low[0] == high[0] and (low[1] or high[1]))):
        return False
    if step and low and high and math.ceil(low[0] / step) * step > high[0]:
        return False
    out: dict[str, Any] = {"type": kind}
    if low:
        out["minimum"] = -_inward(kind, -low[0], low[1], place / "minimum")
    if high:
        out["maximum"] = _inward(kind, high[0], high[1], place / "maximum")
    if "minimum" in out and "maximum" in out and out["minimum"] > out["maximum"]:
        raise refuse(place, "the bounds leave no number that can be enforced: widen them")
    if step:
        out["multipleOf"] = _checked_step(step, place / "multipleOf")
    return out


def _bounds(node: dict[str, Any], place: Place) -> tuple[tuple[Fraction, bool] | None, tuple[Fraction, bool] | None]:
    """The tightest lower and upper bound, each with whether it is exclusive (booleans are those of draft 4)."""
    found: list[tuple[Fraction, bool] | None] = []
    for plain, exclusive, sign in (("minimum", "exclusiveMinimum", 1), ("maximum", "exclusiveMaximum", -1)):
        given = []
        strict = node.get(exclusive)
        if plain in node:
            given.append((sign * _fraction(node[plain], place / plain), strict is True))
        if exclusive in node and not isinstance(strict, bool):
            given.append((sign * _fraction(strict, place / exclusive), True))
        tightest = max(given, default=None)
        found.append(tightest and (sign * tightest[0], tightest[1]))
    return found[0], found[1]


def _fraction(value: object, place: Place) -> Fraction:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise refuse(place, "not a number")
    return Fraction(str(value)) if isinstance(value, float) else Fraction(value)


def _inward(kind: str, bound: Fraction, exclusive: bool, place: Place) -> int | float:
    """The largest upper bound that llguidance computes with exactly."""
    if kind == "integer":
        if bound < -_LARGEST_INT:
            raise refuse(place, "beyond 64 bits")
        value = min(int(bound), _LARGEST_INT)
        if abs(value) > _EXACT and int(float(value)) > value:
            return int(math.nextafter(float(value), -math.inf))
        return int(float(value))
    if abs(bound) > _EXACT:
        if bound < 0:
            raise refuse(place, "beyond 2^53: use smaller numbers, or strings")
        return _EXACT
    # At most 15 digits, which every parser of numbers reads exactly.
    unit = Fraction(1, 10 ** max(15 - (len(str(int(abs(bound)))) if abs(bound) >= 1 else 0), 0))
    inner = bound // unit * unit
    if exclusive and inner == bound:
        inner -= unit
    return int(inner) if inner.denominator == 1 else float(inner)


def _step(node: dict[str, Any], place: Place) -> Fraction | None:
    if "multipleOf" not in node:
        return None
    step = _fraction(node["multipleOf"], place / "multipleOf")
    if step <= 0:
        raise refuse(place / "multipleOf", "not above 0")
    return step


def _checked_step(step: Fraction, place: Place) -> int | float:
    """`multipleOf`, if llguidance's conversion to a decimal is exact."""
    value = float(step)
    converted, digits = value, 0
    while converted != int(converted) and digits < 30:  # as llguidance does
        converted, digits = converted * 10, digits + 1
    if converted > MAX_STEPS or Fraction(int(converted), 10**digits) != step:
        raise not_enforced(place._replace(pointer=place.pointer.rpartition("/")[0]), "multipleOf",
                           f"it has more than {MAX_STEPS:,} units of its last decimal")  # fmt: skip
    return int(value) if value.is_integer() else value


def count(node: dict[str, Any], keyword: str, place: Place) -> int | None:
    """A limit on a length; None if it is not given."""
    if keyword not in node:
        return None
    value = node[keyword]
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value < 0:
        raise refuse(place / keyword, "not a whole number of at least 0")
    return value


def limits(node: dict[str, Any], low: str, high: str, most: int, place: Place) -> dict[str, int] | None:
    """A lower and an upper limit on a length, as far as they are given; None if nothing has such a length."""
    least, largest = count(node, low, place) or 0, count(node, high, place)
    if least > most:
        raise refuse(place / low, f"above {most:,}")
    if largest is not None and least > largest:
        return None
    out = {low: least} if least else {}
    return out if largest is None else {**out, high: min(largest, most)}


def string(node: dict[str, Any], place: Place) -> Schema:
    """A string; formats that are not enforced are annotations, as JSON Schema has them by default."""
    length = limits(node, "minLength", "maxLength", MAX_LENGTH, place)
    if length is None:
        return False
    out: dict[str, Any] = {"type": "string", **length}
    patterns: list[str] = []
    form = node.get("format")
    if isinstance(form, str) and form in _OWN_FORMATS:
        patterns.append(f"^(?:{_OWN_FORMATS[form]})$")
    elif isinstance(form, str) and form in _FORMATS:
        out["format"] = form
        if form == "hostname":
            out["maxLength"] = min(out.get("maxLength", 253), 253)
    if "pattern" in node:
        patterns += pattern(node["pattern"], place, "pattern")
    if not patterns:
        return out
    out["pattern"] = patterns[0]
    return {"allOf": [out, *({"type": "string", "pattern": each} for each in patterns[1:])]} if patterns[1:] else out


def pattern(value: object, place: Place, keyword: str) -> list[str]:
    """The expressions that enforce a pattern."""
    if not isinstance(value, str):
        raise refuse(place / keyword, "not a string")
    try:
        return translate(value)
    except PatternError as e:
        raise not_enforced(place, keyword, str(e)) from e


def literal(value: object, place: Place) -> object:
    """A value of `enum` or `const`, if an answer can be held to exactly it.

    Raises:
        ParameterError: it is a number that a double does not hold, or contains control characters.
    """
    if isinstance(value, list):
        return [literal(each, place) for each in value]
    if isinstance(value, dict):
        return {str(literal(key, place)): literal(each, place) for key, each in value.items()}
    if isinstance(value, str):
        if any(char < " " and char not in "\b\f\n\r\t" for char in value):
            raise refuse(place, "a value contains control characters: write it without them")
    elif isinstance(value, int | float) and not isinstance(value, bool):
        _, digits, exponent = Decimal(str(value)).as_tuple()
        if not abs(value) <= _EXACT or int(exponent) < -22 or (value != int(value) and len(digits) > 15):
            raise refuse(place, "a number has too many digits to be enforced: write it as a string")
        return int(value) if value == int(value) else value
    return value
