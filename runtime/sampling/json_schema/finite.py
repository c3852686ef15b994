"""Removes what no answer can finish: references that lead to themselves again and again."""

from __future__ import annotations

from typing import Any

from llm_edge.runtime.sampling.json_schema.canonical import all_of, any_of, property_of
from llm_edge.runtime.sampling.json_schema.document import Schema

MAX_PASSES = 100  # over all definitions; what is not known to be finite then is removed as well


def without_endless(root: Schema, definitions: dict[str, Schema]) -> tuple[Schema, dict[str, Schema]]:
    """The schema and its definitions without references that no finite value conforms to."""
    finite: set[str] = set()
    names = list(definitions)
    for _ in range(MAX_PASSES):  # a definition follows those that refer to it
        before = len(finite)
        names.reverse()
        for name in names:
            if name not in finite and _is_finite(definitions[name], finite):
                finite.add(name)
        if len(finite) in (before, len(names)):
            break
    if len(finite) == len(definitions):
        return root, definitions
    return _pruned(root, finite), {name: _pruned(definitions[name], finite) for name in sorted(finite)}


def _is_finite(schema: Schema, finite: set[str]) -> bool:
    if isinstance(schema, bool):
        return schema
    if "$ref" in schema:
        return schema["$ref"] in finite
    if "anyOf" in schema:
        return any(_is_finite(each, finite) for each in schema["anyOf"])
    if "allOf" in schema:
        return all(_is_finite(each, finite) for each in schema["allOf"])
    if schema.get("type") == "object":
        return all(_is_finite(property_of(schema, key), finite) for key in schema.get("required", ()))
    if schema.get("type") == "array":
        least, prefix = schema.get("minItems", 0), schema.get("prefixItems", [])
        items = prefix[:least] + ([schema.get("items", True)] if least > len(prefix) else [])
        return all(_is_finite(each, finite) for each in items)
    return True


def _pruned(schema: Schema, finite: set[str]) -> Schema:
    if isinstance(schema, bool):
        return schema
    if not _is_finite(schema, finite):
        return False
    if "anyOf" in schema:
        return any_of(_pruned(each, finite) for each in schema["anyOf"])
    if "allOf" in schema:
        return all_of(_pruned(each, finite) for each in schema["allOf"])
    out: dict[str, Any] = dict(schema)
    for keyword in ("properties", "patternProperties"):
        if keyword in out:
            out[keyword] = {key: _pruned(each, finite) for key, each in out[keyword].items()}
    for keyword in ("items", "additionalProperties"):
        if keyword in out:
            out[keyword] = _pruned(out[keyword], finite)
    if "prefixItems" in out:
        out["prefixItems"] = [_pruned(each, finite) for each in out["prefixItems"]]
    return out
