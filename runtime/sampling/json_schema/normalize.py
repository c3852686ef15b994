"""`enforceable`: turns a user's JSON schema into one that llguidance enforces completely.

The result allows what the schema allows, or less where a grammar cannot express all of it; never more.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from llm_edge.runtime.sampling.json_schema import arrays, keywords, objects, scalars
from llm_edge.runtime.sampling.json_schema.canonical import (
    TYPES,
    all_of,
    any_of,
    common_types,
    has_type,
    joined,
    key_of,
    narrower,
    one_of,
    values_of,
)
from llm_edge.runtime.sampling.json_schema.document import (
    Document,
    Place,
    Schema,
    not_enforced,
    refuse,
    target_of,
)
from llm_edge.runtime.sampling.json_schema.finite import without_endless

if TYPE_CHECKING:
    from llguidance._lib import JsonCompileOptions

# How llguidance writes JSON. Flexible white space is unbounded: at high temperatures a model may generate it until
# max_tokens. With escapes like \u0061 it could write a key that `properties` lists as an additional one.
JSON_STYLE: JsonCompileOptions = {"whitespace_flexible": False, "json_allowed_escapes": 'nrbtf\\"'}
MAX_SCHEMAS = 50_000  # that are visited, some of them several times
MAX_SIZE = 4_000_000  # of the result, in characters


def enforceable(schema: Any) -> str:
    """The JSON text of a schema for llguidance.

    Raises:
        ParameterError: answers cannot be held to the schema; the message names the keyword, its JSON pointer and the
            remedy.
    """
    try:
        root, definitions = _Normalizer(schema).result()
    except RecursionError:
        raise refuse(Place("", ""), "nested too deeply") from None
    if root is False:
        raise refuse(Place("", ""), "nothing can match it: its keywords contradict each other")
    out = root if isinstance(root, dict) else {}
    text = json.dumps({**out, "$defs": definitions} if definitions else out, separators=(",", ":"))
    if len(text) > MAX_SIZE:
        raise refuse(Place("", ""), "it is too large: simplify it")
    return text


class _Normalizer:
    def __init__(self, schema: Any) -> None:
        self._document = Document(schema)
        self._schema = schema
        self._names: dict[int, str] = {}  # of definitions, by the identity of the schema that is referred to
        self._waiting: deque[str] = deque()
        self._sources: dict[str, tuple[Schema, Place]] = {}
        self._definitions: dict[str, Schema] = {}
        self._visited = 0

    def result(self) -> tuple[Schema, dict[str, Schema]]:
        root = self._normal(self._schema, self._document.root, TYPES)
        while self._waiting:
            self._lookup(self._waiting.popleft())
        root, definitions = without_endless(root, self._definitions)
        return root, {name.rpartition("/")[2]: each for name, each in definitions.items()}

    def _lookup(self, name: str) -> Schema | None:
        """A definition; None while it is being normalized."""
        if name in self._sources:
            self._definitions[name] = self._normal(*self._sources.pop(name), TYPES)
        return self._definitions.get(name)

    def _reference(self, node: dict[str, Any], keyword: str, place: Place) -> Schema:
        if not isinstance(node[keyword], str):
            raise refuse(place / keyword, "not a string")
        target, at = self._document.resolve(node[keyword], place)
        if isinstance(target, bool):
            return target
        name = self._names.get(id(target))
        if name is None:
            name = self._names[id(target)] = f"#/$defs/d{len(self._names)}"
            self._sources[name] = target, at
            self._waiting.append(name)
        return {"$ref": name}

    def _normal(self, node: Any, place: Place, types: Iterable[str]) -> Schema:
        """A schema, restricted to some types."""
        self._visited += 1
        if self._visited > MAX_SCHEMAS:
            raise refuse(place, "too many combinations: simplify the schema")
        if isinstance(node, bool):
            return node and (True if tuple(types) == TYPES else any_of({"type": each} for each in types))
        if not isinstance(node, dict):
            raise refuse(place, "not a schema: give an object or a boolean")
        place = target_of(node, place)
        allowed = self._types(node, place, types)
        parts: list[Schema] = [self._typed(node, place, allowed)]
        parts += [self._values(node, each, place, allowed) for each in ("const", "enum") if each in node]
        references = ("$ref", "$dynamicRef", "$recursiveRef")
        parts += [self._reference(node, each, place) for each in references if each in node]
        parts += self._list(node, "allOf", place, allowed)
        if "anyOf" in node:
            parts.append(any_of(self._list(node, "anyOf", place, allowed)))
        if "oneOf" in node:
            found = one_of(self._list(node, "oneOf", place, allowed), self._lookup)
            if found is None:
                raise not_enforced(
                    place,
                    "oneOf",
                    "an answer could match several of its schemas",
                    "give each a required property with its own `const`, use anyOf",
                )
            parts.append(found)
        if "not" in node:
            parts.append(self._not(node, place, allowed))
        parts += self._dependent(node, place, allowed)
        if "if" in node and ("then" in node or "else" in node):
            parts.append(self._conditional(node, place, allowed))
        return joined(parts, place)

    def _types(self, node: dict[str, Any], place: Place, types: Iterable[str]) -> tuple[str, ...]:
        given = node.get("type", list(TYPES))
        given = [given] if isinstance(given, str) else given
        if not isinstance(given, list) or not given:
            raise refuse(place / "type", "not a type or a list of types")
        for each in given:
            if each not in (*TYPES, "integer"):
                raise refuse(place / "type", f"unknown type {json.dumps(each)[:40]}")
        if node.get("nullable") is True:
            given = [*given, "null"]
        return common_types(given, types)

    def _typed(self, node: dict[str, Any], place: Place, types: tuple[str, ...]) -> Schema:
        """The keywords that apply to one type of values."""
        options: list[Schema] = []
        for kind in types:
            if not any(keyword in node for keyword in keywords.BY_TYPE.get(kind, ())):
                options.append({"type": kind})
            elif kind in ("number", "integer"):
                options.append(scalars.number(kind, node, place))
            elif kind == "string":
                options.append(scalars.string(node, place))
            elif kind == "array":
                options.append(self._array(node, place))
            else:
                options += self._object(node, place)
        if [*TYPES] == [option.get("type") for option in options if isinstance(option, dict) and len(option) == 1]:
            return True
        return any_of(options)

    def _values(self, node: dict[str, Any], keyword: str, place: Place, types: tuple[str, ...]) -> Schema:
        values = [node["const"]] if keyword == "const" else node["enum"]
        if not isinstance(values, list):
            raise refuse(place / keyword, "not a list")
        if node.get("nullable") is True:
            values = [*values, None]
        fitting = [each for each in values if any(has_type(each, kind) for kind in types)]
        excluded = self._excluded(node.get("not"), place)
        kept = [each for each in fitting if excluded is None or key_of(each) not in excluded]
        found = {key_of(value): value for value in (scalars.literal(each, place / keyword) for each in kept)}
        return {"enum": list(found.values())} if found else False

    def _excluded(self, node: Any, place: Place) -> set[str] | None:
        """The values that `not` lists, if it does nothing else."""
        if not isinstance(node, dict) or set(node) & keywords.RESTRICTING - {"type"} not in ({"enum"}, {"const"}):
            return None
        found = self._normal(node, place / "not", TYPES)
        return {key_of(value) for value in values_of(found, self._lookup) or ()}

    def _list(self, node: dict[str, Any], keyword: str, place: Place, types: tuple[str, ...]) -> list[Schema]:
        if keyword not in node:
            return []
        if not isinstance(node[keyword], list) or not node[keyword]:
            raise refuse(place / keyword, "not a list of schemas")
        return [self._normal(each, place / keyword / at, types) for at, each in enumerate(node[keyword])]

    def _array(self, node: dict[str, Any], place: Place) -> Schema:
        size = scalars.limits(node, "minItems", "maxItems", scalars.MAX_ITEMS, place)
        if size is None:
            return False
        first, rest = ("prefixItems", "items") if "prefixItems" in node else ("items", "additionalItems")
        if not isinstance(node.get(first), list):
            first, rest = "", "items"
        prefix = self._list(node, first, place, TYPES) if node.get(first) else []
        key = rest if rest in node or "unevaluatedItems" not in node else "unevaluatedItems"
        if key == "unevaluatedItems" and any(each in node for each in (*keywords.APPLICATORS, "contains")):
            raise not_enforced(place, key, "it depends on what other schemas allow")
        out: dict[str, Any] = {"type": "array", **size}
        if prefix:
            out["prefixItems"] = prefix
        if key in node:
            out["items"] = self._normal(node[key], place / key, TYPES)
        for at, each in enumerate([*prefix, out.get("items", True)]):
            if each is False:  # nothing can stand here, so the array ends before
                out["maxItems"] = min(out.get("maxItems", at), at)
                break
        out = self._contains(out, node, place)
        if out.get("minItems", 0) > out.get("maxItems", scalars.MAX_ITEMS):
            return False
        return arrays.without_repeats(out, place, self._lookup) if node.get("uniqueItems") is True else out

    def _contains(self, out: dict[str, Any], node: dict[str, Any], place: Place) -> dict[str, Any]:
        least = scalars.count(node, "minContains", place)
        least = 1 if least is None else least
        if "contains" not in node or (least == 0 and "maxContains" not in node):
            return out
        if self._normal(node["contains"], place / "contains", TYPES) is not True:
            raise not_enforced(place, "contains", "an array may end before such an item")
        most = scalars.count(node, "maxContains", place)
        out["minItems"] = max(out.get("minItems", 0), least)
        return out if most is None else {**out, "maxItems": min(out.get("maxItems", most), most)}

    def _object(self, node: dict[str, Any], place: Place) -> list[Schema]:
        out: dict[str, Any] = {"type": "object"}
        for keyword in ("properties", "patternProperties"):
            entries = node.get(keyword, {})
            if not isinstance(entries, dict):
                raise refuse(place / keyword, "not an object")
            if entries:
                out[keyword] = {key: self._normal(each, place / keyword / key, TYPES) for key, each in entries.items()}
        if "patternProperties" in out:
            at = place / "patternProperties"
            expressions = {key: scalars.pattern(key, at, key) for key in out["patternProperties"]}
            if any(len(each) > 1 for each in expressions.values()):
                raise not_enforced(place, "patternProperties", "a key has a look-ahead")
            out["patternProperties"] = {expressions[key][0]: each for key, each in out["patternProperties"].items()}
        if "additionalProperties" in node:
            out["additionalProperties"] = self._normal(
                node["additionalProperties"], place / "additionalProperties", TYPES
            )
        elif "unevaluatedProperties" in node:
            out |= self._unevaluated(node, place)
        if required := objects.required_names(node, place):
            out["required"] = required
        if "propertyNames" in node:
            names = self._normal(node["propertyNames"], place / "propertyNames", ("string",))
            out = objects.with_names(out, names, place, self._lookup)
        properties = out.get("properties", {})
        is_closed = out.get("additionalProperties") is False and "patternProperties" not in out
        if any(properties.get(key, not is_closed) is False for key in required):
            return []
        return objects.with_counts(out, node, place)

    def _unevaluated(self, node: dict[str, Any], place: Place) -> dict[str, Any]:
        """`additionalProperties` in the place of `unevaluatedProperties`."""
        found = self._normal(node["unevaluatedProperties"], place / "unevaluatedProperties", TYPES)
        names = self._evaluated(node, place, 0)
        if names is None:
            if found is True:
                return {}
            raise not_enforced(place, "unevaluatedProperties", "it depends on what other schemas allow")
        own = dict.fromkeys(names, True)
        normal = {key: self._normal(each, place / "properties" / key, TYPES)
                  for key, each in node.get("properties", {}).items()}  # fmt: skip
        return {"properties": {**own, **normal}, "additionalProperties": found}

    def _evaluated(self, node: Any, place: Place, depth: int) -> list[str] | None:
        """The properties that a schema, its references and its `allOf` evaluate; None if that depends on the answer."""
        unsure = {*keywords.APPLICATORS, "patternProperties", "additionalProperties"} - {"$ref", "allOf"}
        if isinstance(node, bool):
            return []
        if (
            not isinstance(node, dict)
            or unsure & set(node)
            or depth > 16
            or (depth and "unevaluatedProperties" in node)
        ):
            return None
        found: list[str] = list(node.get("properties", {}))
        targets = [(each, place) for each in node.get("allOf", [])]
        if isinstance(node.get("$ref"), str):
            targets.append(self._document.resolve(node["$ref"], place))
        for target, at in targets:
            more = self._evaluated(target, at, depth + 1)
            if more is None:
                return None
            found += more
        return found

    def _not(self, node: dict[str, Any], place: Place, types: tuple[str, ...]) -> Schema:
        inner, at = node["not"], place / "not"
        if isinstance(inner, dict) and not set(inner) & keywords.RESTRICTING:
            inner = True
        if isinstance(inner, bool):
            return not inner
        used = set(inner) & keywords.RESTRICTING if isinstance(inner, dict) else set()
        if used == {"not"}:
            return self._normal(inner["not"], at / "not", types)
        if used == {"anyOf"} and isinstance(inner["anyOf"], list):
            return all_of(self._not({"not": each}, at / "anyOf" / n, types) for n, each in enumerate(inner["anyOf"]))
        if used == {"type"}:
            refused = self._types(inner, at, TYPES)
            if not ("integer" in refused and "number" in types and "number" not in refused):
                left = [each for each in types if all(narrower(each, other) != each for other in refused)]
                return any_of({"type": each} for each in left)
        if used in ({"required"}, {"required", "type"}) and inner.get("type", "object") == "object":
            names = objects.required_names(inner, at)
            others = types if "type" in used else ()
            absent = [{"type": "object", "properties": {key: False}} for key in names]
            return any_of([*_without_object(others), *(absent if "object" in types else ())])
        if {"enum", "const"} & set(node) and self._excluded(inner, place) is not None:
            return True  # `_values` has left them out
        raise not_enforced(place, "not", "only types, required properties and listed values can be excluded")

    def _dependent(self, node: dict[str, Any], place: Place, types: tuple[str, ...]) -> list[Schema]:
        """What the presence of a property requires."""
        parts: list[Schema] = []
        for key, needed, at in objects.dependencies(node, place) if "object" in types else ():
            present: Schema
            if isinstance(needed, list):
                present = {"type": "object", "required": list(dict.fromkeys([key, *objects.names(needed, at)]))}
            else:
                present = all_of([{"type": "object", "required": [key]}, self._normal(needed, at, ("object",))])
            absent: Schema = {"type": "object", "properties": {key: False}}
            parts.append(any_of([*_without_object(types), absent, present]))
        return parts

    def _conditional(self, node: dict[str, Any], place: Place, types: tuple[str, ...]) -> Schema:
        """`if` a property has some of its listed values, `then` and `else`."""
        then = self._normal(node.get("then", True), place / "then", types)
        otherwise = self._normal(node.get("else", True), place / "else", types)
        if isinstance(node["if"], bool):
            return then if node["if"] else otherwise
        condition = node["if"] if isinstance(node["if"], dict) else {}
        tested = condition.get("properties")
        own = node.get("properties")
        used = set(condition) & keywords.RESTRICTING
        if isinstance(tested, dict) and len(tested) == 1 and isinstance(own, dict) and {*tested} <= {*own}:
            (key,) = tested
            all_values = values_of(self._normal(own[key], place / "properties" / key, TYPES), self._lookup)
            some = values_of(self._normal(tested[key], place / "if" / "properties" / key, TYPES), self._lookup)
            if (
                used <= {"properties", "required", "type"}
                and condition.get("required", [key]) == [key]
                and condition.get("type", "object") == "object"
                and types == ("object",)
                and all_values is not None
                and some is not None
            ):
                chosen = {key_of(value) for value in some}
                hits = [value for value in all_values if key_of(value) in chosen]
                misses = [value for value in all_values if key_of(value) not in chosen]
                absent: Schema = {"type": "object", "properties": {key: False}}
                return any_of([
                    all_of([_holds(key, hits), then]),
                    all_of([_holds(key, misses), otherwise]),
                    all_of([absent, otherwise if "required" in condition else then]),
                ])  # fmt: skip
        reason = "only one required property with an `enum` can decide"
        raise not_enforced(place, "if", reason, "use anyOf")


def _holds(key: str, values: list[Any]) -> Schema:
    """Objects in which a property has one of these values."""
    return {"type": "object", "properties": {key: {"enum": values}}, "required": [key]} if values else False


def _without_object(types: Iterable[str]) -> list[Schema]:
    return [{"type": each} for each in types if each != "object"]
