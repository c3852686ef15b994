"""Operations on the schemas that llguidance is given, which consist of few keywords.

Such a schema is a boolean, a reference to `$defs`, an `anyOf`, an `allOf`, an `enum`, or one type with its keywords.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from itertools import combinations
from typing import Any

from llm_edge.runtime.sampling.json_schema.document import Place, Schema, not_enforced

TYPES = ("null", "boolean", "number", "string", "array", "object")
MAX_VALUES = 2_000
MAX_STEPS = 10_000
Lookup = Callable[[str], Schema | None]  # the definition with a name; None while it is not known


def key_of(value: object) -> str:
    """A key that is equal for equal JSON values."""
    return json.dumps(value, sort_keys=True)


def any_of(options: Iterable[Schema]) -> Schema:
    """The union of schemas."""
    return _combined("anyOf", options, decisive=True)


def all_of(parts: Iterable[Schema]) -> Schema:
    """The intersection of schemas."""
    return _combined("allOf", parts, decisive=False)


def _combined(keyword: str, schemas: Iterable[Schema], *, decisive: bool) -> Schema:
    """Combine schemas under a keyword, each once; `decisive` alone decides the result."""
    kept: dict[str, Schema] = {}
    for schema in schemas:
        if schema is decisive:
            return decisive
        nested = schema.get(keyword, [schema]) if isinstance(schema, dict) else []
        kept.update((key_of(each), each) for each in nested)
    found = list(kept.values())
    return found[0] if len(found) == 1 else {keyword: found} if found else not decisive


def type_of(value: object) -> str:
    """The JSON type of a value; whole numbers are `integer`."""
    if isinstance(value, bool) or value is None:
        return "null" if value is None else "boolean"
    if isinstance(value, int | float):
        return "integer" if value == int(value) else "number"
    return "string" if isinstance(value, str) else "array" if isinstance(value, list) else "object"


def has_type(value: object, kind: str) -> bool:
    """Whether a value is of a type."""
    own = type_of(value)
    return own == kind or (own == "integer" and kind == "number")


def narrower(one: str, other: str) -> str | None:
    """The type of values that have both types."""
    return one if one == other else "integer" if {one, other} == {"integer", "number"} else None


def common_types(these: Iterable[str], those: Iterable[str]) -> tuple[str, ...]:
    """The types of values that have one of these and one of those types, in the order of these."""
    those = tuple(those)
    found = (narrower(one, other) for one in these for other in those)
    kept = dict.fromkeys(each for each in found if each)
    return tuple(each for each in kept if not (each == "integer" and "number" in kept))


def values_of(schema: Schema, lookup: Lookup, depth: int = 8) -> list[Any] | None:
    """All values that conform to a schema, or None if they are not a short list."""
    if schema is False:
        return []
    if isinstance(schema, dict) and depth:
        if "enum" in schema:
            return list(schema["enum"])
        if "$ref" in schema:
            target = lookup(schema["$ref"])
            return None if target is None else values_of(target, lookup, depth - 1)
        if "anyOf" in schema:
            lists = [values_of(each, lookup, depth - 1) for each in schema["anyOf"]]
            if any(each is None for each in lists):
                return None
            return list({key_of(value): value for each in lists for value in each or ()}.values())
        if "allOf" in schema:
            kinds = [each["type"] for each in schema["allOf"] if isinstance(each, dict) and set(each) == {"type"}]
            rest = [each for each in schema["allOf"] if not (isinstance(each, dict) and set(each) == {"type"})]
            found = values_of(rest[0], lookup, depth - 1) if len(rest) == 1 else None
            return found and [value for value in found if all(has_type(value, kind) for kind in kinds)]
        if schema.get("type") in ("null", "boolean"):
            return [None] if schema["type"] == "null" else [False, True]
    return None


def disjoint(one: Schema, other: Schema, lookup: Lookup) -> bool:
    """Whether no value conforms to both schemas, as far as this can be proven."""
    return _Disjoint(lookup).check(one, other)


class _Disjoint:
    def __init__(self, lookup: Lookup) -> None:
        self._lookup = lookup
        self._steps = 0

    def check(self, one: Schema, other: Schema, depth: int = 16) -> bool:
        self._steps += 1
        if one is False or other is False:
            return True
        if one is True or other is True or depth == 0 or self._steps > MAX_STEPS:
            return False
        for a, b in ((one, other), (other, one)):
            if "$ref" in a:
                target = self._lookup(a["$ref"])
                return target is not None and self.check(target, b, depth - 1)
        for a, b in ((one, other), (other, one)):
            if "anyOf" in a:
                return all(self.check(each, b, depth - 1) for each in a["anyOf"])
        for a, b in ((one, other), (other, one)):
            if "allOf" in a:
                return any(self.check(each, b, depth - 1) for each in a["allOf"])
        for a, b in ((one, other), (other, one)):
            if "enum" in a:
                return all(self._excludes(b, value, depth) for value in a["enum"])
        if narrower(one["type"], other["type"]) is None:
            return True
        return self._same_type(one, other, depth)

    def _same_type(self, one: dict[str, Any], other: dict[str, Any], depth: int) -> bool:
        ranges = (("minimum", "maximum"), ("minLength", "maxLength"), ("minItems", "maxItems"))
        for low, high in ranges:
            for a, b in ((one, other), (other, one)):
                if low in a and high in b and a[low] > b[high]:
                    return True
        if one["type"] == "array":
            sure = max(one.get("minItems", 0), other.get("minItems", 0))
            most = max(len(one.get("prefixItems", ())), len(other.get("prefixItems", ()))) + 1
            return any(self.check(_item(one, at), _item(other, at), depth - 1) for at in range(min(sure, most)))
        if one["type"] == "object":
            required = dict.fromkeys((*one.get("required", ()), *other.get("required", ())))
            return any(self.check(property_of(one, key), property_of(other, key), depth - 1) for key in required)
        return False

    def _excludes(self, schema: dict[str, Any], value: Any, depth: int) -> bool:
        """Whether a value does not conform, for a schema of one type or an enumeration."""
        if "enum" in schema:
            return key_of(value) not in map(key_of, schema["enum"])
        if not has_type(value, schema["type"]):
            return True
        if isinstance(value, dict):
            if any(key not in value for key in schema.get("required", ())):
                return True
            return any(self.check(property_of(schema, key), {"enum": [each]}, depth - 1) for key, each in value.items())
        if isinstance(value, list):
            if not schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value)):
                return True
            pairs = enumerate(value)
            return any(self.check(_item(schema, at), {"enum": [each]}, depth - 1) for at, each in pairs)
        if isinstance(value, str):
            return not schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))
        return value is not None and not schema.get("minimum", value) <= value <= schema.get("maximum", value)


def _item(schema: dict[str, Any], at: int) -> Schema:
    prefix = schema.get("prefixItems", ())
    found: Schema = prefix[at] if at < len(prefix) else schema.get("items", True)
    return found


def property_of(schema: dict[str, Any], key: str) -> Schema:
    """What the value of a key must conform to in an object, or a schema that allows more."""
    if key in schema.get("properties", {}):
        found: Schema = schema["properties"][key]
        return found
    return True if "patternProperties" in schema else schema.get("additionalProperties", True)


def one_of(options: list[Schema], lookup: Lookup) -> Schema | None:
    """The union of schemas of which a value may conform to one only; None if they may overlap.

    Objects that differ in a property which is not required are told apart by requiring it.
    """
    options = [option for option in options if option is not False]
    if _pairwise(options, lookup):
        return any_of(options)
    objects = [_object(option, lookup) for option in options]
    shared = [each["properties"] for each in objects if each is not None and "properties" in each]
    if len(shared) < len(options):
        return None
    for key in shared[0]:
        if all(key in each for each in shared) and _pairwise([each[key] for each in shared], lookup):
            return any_of(all_of([option, {"type": "object", "required": [key]}]) for option in options)
    return None


def _pairwise(options: list[Schema], lookup: Lookup) -> bool:
    values = [values_of(option, lookup) for option in options]
    if all(each is not None for each in values):
        keys = [key_of(value) for each in values for value in each or ()]
        return len(set(keys)) == len(keys)
    return len(options) <= 200 and all(disjoint(one, other, lookup) for one, other in combinations(options, 2))


def _object(schema: Schema | None, lookup: Lookup) -> dict[str, Any] | None:
    """The object that a schema stands for, if it is a single one."""
    for _ in range(8):
        if not isinstance(schema, dict) or "$ref" not in schema:
            break
        schema = lookup(schema["$ref"])
    return schema if isinstance(schema, dict) and schema.get("type") == "object" else None


def joined(parts: list[Schema], place: Place) -> Schema:
    """The intersection of what the keywords of one schema allow."""
    enums = [part for part in parts if isinstance(part, dict) and "enum" in part]
    plain = [part for part in parts[1:] if part is not True]
    if len(enums) == 1 and plain == enums and isinstance(parts[0], dict):
        options = parts[0].get("anyOf", [parts[0]])
        if all(set(option) == {"type"} for option in options):  # the values have been chosen by their type
            return enums[0]
    found = all_of(parts)
    steps = 1.0
    if isinstance(found, dict) and "allOf" in found:
        for step in _steps(found):
            steps *= max(step, 1.0)
        if steps > 2**31:
            raise not_enforced(place, "multipleOf", "several that apply to one number are too large")
    return found


def _steps(schema: Schema) -> Iterable[float]:
    """All `multipleOf` in a schema, as whole numbers of their last decimal."""
    if isinstance(schema, dict):
        if "multipleOf" in schema:
            digits = str(schema["multipleOf"]).partition(".")[2]
            yield float(schema["multipleOf"]) * 10 ** len(digits)
        for each in (*schema.get("allOf", ()), *schema.get("anyOf", ())):
            yield from _steps(each)
