"""The keywords of JSON Schema, and how a schema is walked."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

from llm_edge.runtime.errors import ParameterError

# Keywords that restrict answers, by the type of value that they restrict. All others are annotations.
NUMBER = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum", "multipleOf")
STRING = ("minLength", "maxLength", "pattern", "format")
ARRAY = (
    *("items", "prefixItems", "additionalItems", "minItems", "maxItems", "uniqueItems"),
    *("contains", "minContains", "maxContains", "unevaluatedItems"),
)
OBJECT = (
    *("properties", "patternProperties", "additionalProperties", "required", "minProperties", "maxProperties"),
    *("propertyNames", "unevaluatedProperties", "dependentRequired", "dependentSchemas", "dependencies"),
)
APPLICATORS = (
    *("$ref", "$dynamicRef", "$recursiveRef", "allOf", "anyOf", "oneOf", "not", "if", "then", "else"),
    *("dependentSchemas", "dependencies"),
)
RESTRICTING = frozenset((*NUMBER, *STRING, *ARRAY, *OBJECT, *APPLICATORS, "type", "enum", "const", "nullable"))
BY_TYPE = {"number": NUMBER, "integer": NUMBER, "string": STRING, "array": ARRAY, "object": OBJECT}

_ONE = (
    *("items", "additionalItems", "unevaluatedItems", "contains", "additionalProperties", "unevaluatedProperties"),
    *("propertyNames", "not", "if", "then", "else", "contentSchema"),
)
_LISTS = ("allOf", "anyOf", "oneOf", "prefixItems", "items")
_MAPS = ("properties", "patternProperties", "$defs", "definitions", "dependentSchemas", "dependencies")


def without_keywords(schema: Any, unchecked: Collection[str]) -> Any:
    """A schema without some of its keywords, wherever they are; `oneOf` becomes `anyOf`.

    Raises:
        ParameterError: a keyword does not exist, or restricts nothing.
    """
    if isinstance(unchecked, str) or not all(isinstance(each, str) for each in unchecked):
        raise ParameterError('constraint (json_schema): unchecked is not a list of keywords such as ("uniqueItems",)')
    for keyword in unchecked:
        if keyword not in RESTRICTING:
            raise ParameterError(
                f"constraint (json_schema): unchecked has {keyword[:40]!r}, which is no keyword that restricts answers"
            )
    dropped = {*unchecked, *(("then", "else") if "if" in unchecked else ())}
    dropped |= {"minContains", "maxContains"} if "contains" in unchecked else set()

    def strip(node: Any) -> Any:
        if not isinstance(node, dict):
            return node
        out = {key: each for key, each in map_schemas(node, strip).items() if key not in dropped}
        if "oneOf" in node and "oneOf" in dropped and isinstance(node["oneOf"], list):
            branches = [strip(each) for each in node["oneOf"]]
            if "anyOf" in out:
                out["allOf"] = [*out.get("allOf", []), {"anyOf": branches}]
            elif "anyOf" not in dropped:
                out["anyOf"] = branches
        return out

    return strip(schema)


def map_schemas(node: dict[str, Any], change: Callable[[Any], Any]) -> dict[str, Any]:
    """A copy of a schema in which each schema directly inside it is changed."""
    out = dict(node)
    for key, value in node.items():
        if key in _LISTS and isinstance(value, list):
            out[key] = [change(each) for each in value]
        elif key in _MAPS and isinstance(value, dict):
            out[key] = {name: change(each) for name, each in value.items()}
        elif key in _ONE:
            out[key] = change(value)
    return out
