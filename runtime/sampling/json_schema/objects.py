"""Objects: how many properties they have, and what their names are."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from math import comb
from typing import Any

from llm_edge.runtime.sampling.json_schema.canonical import Lookup, values_of
from llm_edge.runtime.sampling.json_schema.document import Place, Schema, not_enforced, refuse
from llm_edge.runtime.sampling.json_schema.scalars import count

MAX_VARIANTS = 200


def with_counts(schema: dict[str, Any], node: dict[str, Any], place: Place) -> list[Schema]:
    """The alternatives of an object with `minProperties` and `maxProperties`.

    Nothing keeps a model from repeating a key that `properties` does not list, so at most one key that counts towards
    `minProperties` may be of that kind.
    """
    required, properties = schema.get("required", []), schema.get("properties", {})
    optional = [key for key, each in properties.items() if key not in required and each is not False]
    is_open = "patternProperties" in schema or schema.get("additionalProperties", True) is not False
    need = max((count(node, "minProperties", place) or 0) - len(required), 0)
    most = count(node, "maxProperties", place)
    room = None if most is None else most - len(required)
    if (room is not None and room < need) or (need > len(optional) and not is_open):
        return []
    if room is not None and not is_open and room >= len(optional):
        room = None
    if need == 0 and room is None:
        return [schema]
    if need > len(optional) + 1:
        reason = "a key that `properties` does not list may be generated twice"
        raise not_enforced(place, "minProperties", reason)
    keyword = "minProperties" if room is None else "maxProperties"
    if room is None:
        sizes = [need] if need <= len(optional) else []
        total = comb(len(optional), need) + (comb(len(optional), need - 1) if is_open else 0)
    else:
        sizes = list(range(max(need - is_open, 0), min(room, len(optional)) + 1))
        total = sum(comb(len(optional), size) for size in sizes)
    if total > MAX_VARIANTS:
        raise not_enforced(place, keyword, f"it has {total:,} combinations of properties, more than {MAX_VARIANTS}")
    if room is None:
        chosen: list[Schema] = [
            {**schema, "required": [*required, *names]} for size in sizes for names in combinations(optional, size)
        ]
        more = combinations(optional, need - 1) if is_open else iter(())
        return [*chosen, *(_exactly(schema, optional, names, 1, None) for names in more)]
    return [
        _exactly(schema, optional, names, max(need - size, 0), room - size if is_open else 0)
        for size in sizes
        for names in combinations(optional, size)
    ]


def _exactly(
    schema: dict[str, Any], optional: list[str], names: tuple[str, ...], least: int, most: int | None
) -> dict[str, Any]:
    """An object with these of its optional properties, and `least` to `most` that are not listed."""
    required = [*schema.get("required", []), *names]
    properties = {
        key: False if key in optional and key not in names else each
        for key, each in schema.get("properties", {}).items()
    }
    out = {**schema, "properties": properties, "required": required}
    if least:
        out["minProperties"] = len(required) + least
    if most is not None:
        out["maxProperties"] = len(required) + most
    return out


def with_names(schema: dict[str, Any], names: Schema, place: Place, lookup: Lookup) -> dict[str, Any]:
    """An object whose keys conform to the schema of `propertyNames`.

    Raises:
        ParameterError: keys cannot be held to it.
    """
    for _ in range(8):
        target = lookup(names["$ref"]) if isinstance(names, dict) and "$ref" in names else None
        names = names if target is None else target
    if names is True or names == {"type": "string"}:
        return schema
    additional, patterns = schema.get("additionalProperties", True), schema.get("patternProperties", {})
    listed = values_of(names, lookup)
    if listed is not None and not patterns:
        allowed = [value for value in listed if isinstance(value, str)]
        declared = schema.get("properties", {})
        properties = {key: each if key in allowed else False for key, each in declared.items()}
        properties |= {key: additional for key in allowed if key not in declared}
        return {**schema, "properties": properties, "additionalProperties": False}
    form = _key_pattern(names)
    declared = dict.fromkeys(schema.get("required", ()), additional) | schema.get("properties", {})
    if not isinstance(names, dict) or form is None or patterns or (declared and "pattern" in names):
        raise not_enforced(place, "propertyNames", "it is neither a list of names nor a pattern or a length")
    least, most = names.get("minLength", 0), names.get("maxLength")
    fitting = {
        key: each if least <= len(key) <= (len(key) if most is None else most) else False
        for key, each in declared.items()
    }
    return {**schema, "properties": fitting, "patternProperties": {form: additional}, "additionalProperties": False}


def _key_pattern(names: Schema) -> str | None:
    """A regular expression for keys."""
    if not isinstance(names, dict) or names.get("type") != "string":
        return None
    if set(names) <= {"type", "pattern"}:
        return str(names["pattern"])
    if set(names) <= {"type", "minLength", "maxLength"}:
        return f"^[\\x{{0}}-\\x{{10ffff}}]{{{names.get('minLength', 0)},{names.get('maxLength', '')}}}$"
    return None


def required_names(node: dict[str, Any], place: Place) -> list[str]:
    """The names in `required`, each once."""
    return names(node.get("required", []), place / "required")


def names(value: object, place: Place) -> list[str]:
    """A list of property names, each once."""
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise refuse(place, "not a list of property names")
    return list(dict.fromkeys(value))


def dependencies(node: dict[str, Any], place: Place) -> Iterator[tuple[str, Any, Place]]:
    """Each key that requires others, with a list of names or a schema, and its place."""
    for keyword in ("dependentRequired", "dependentSchemas", "dependencies"):
        value = node.get(keyword, {})
        if not isinstance(value, dict):
            raise refuse(place / keyword, "not an object")
        for key, each in value.items():
            yield key, each, place / keyword / key
