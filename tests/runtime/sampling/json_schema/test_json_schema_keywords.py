"""Keywords of JSON Schema, one by one: enforced, taken for annotations, or refused with the remedy."""

from __future__ import annotations

import json
import random
import re
import time
from typing import Any

import pytest
from json_answers import answers, answers_or_refusal, violations

from llm_edge.runtime.errors import ParameterError
from llm_edge.runtime.sampling.constraint import Constraint

NULL = {"type": "null"}
CAT = {"type": "object", "properties": {"kind": {"const": "cat"}}, "additionalProperties": False}
DOG = {"type": "object", "properties": {"kind": {"const": "dog"}}, "additionalProperties": False}
CLOSED = {"type": "object", "additionalProperties": False}
ABC = {"properties": {"a": NULL, "b": NULL, "c": NULL}}
EVENT = {
    **CLOSED,
    "properties": {"kind": {"enum": ["x", "y", "z"]}, "n": {"enum": [1, 2]}},
    "required": ["kind"],
    "if": {"properties": {"kind": {"const": "x"}}, "required": ["kind"]},
    "then": {"required": ["n"]},
    "else": {"properties": {"n": False}},
}
ENFORCED: dict[str, tuple[dict[str, Any], set[str] | None]] = {  # all answers; None: too many to list
    "oneOf of different types": ({"oneOf": [{"const": 1}, {"enum": ["a"]}]}, {"1", '"a"'}),
    "oneOf of different constants": ({"oneOf": [CAT, DOG]}, {'{"kind":"cat"}', '{"kind":"dog"}'}),
    "oneOf of ranges": ({"oneOf": [{"type": "integer", "minimum": 3, "maximum": 4}, {"const": 5}]}, {"3", "4", "5"}),
    "not a type": ({"enum": [1, "a", None], "not": {"type": "string"}}, {"1", "null"}),
    "not a value": ({"enum": [1, 2, 3], "not": {"enum": [1, 3]}}, {"2"}),
    "not a property": ({**CLOSED, **ABC, "not": {"required": ["a"]}, "maxProperties": 0}, {"{}"}),
    "if and else": (EVENT, {'{"kind":"x","n":1}', '{"kind":"x","n":2}', '{"kind":"y"}', '{"kind":"z"}'}),
    "at least two": (
        {**CLOSED, **ABC, "minProperties": 2, "maxProperties": 2},
        {'{"a":null,"b":null}', '{"a":null,"c":null}', '{"b":null,"c":null}'},
    ),
    "dependent": (
        {**CLOSED, "properties": {"a": NULL, "b": NULL}, "dependentRequired": {"a": ["b"]}},
        {"{}", '{"b":null}', '{"a":null,"b":null}'},
    ),
    "dependencies of draft 7": (
        {**CLOSED, "properties": {"a": NULL, "b": NULL}, "dependencies": {"a": {"required": ["b"]}}},
        {"{}", '{"b":null}', '{"a":null,"b":null}'},
    ),
    "a set of listed values": (
        {"type": "array", "items": {"enum": [1, 0]}, "uniqueItems": True},
        {"[]", "[1]", "[0]", "[1,0]", "[0,1]"},
    ),
    "merged objects": (
        {
            "allOf": [{"properties": {"a": NULL}, "required": ["a"]}, {"properties": {"b": NULL}, "required": ["b"]}],
            "type": "object",
            "unevaluatedProperties": False,
        },
        {'{"a":null,"b":null}'},
    ),
    "an escaped pointer": ({"$ref": "#/$defs/a~1b%25~0", "$defs": {"a/b%~": NULL}}, {"null"}),
    "an anchor": ({"$ref": "#n", "$defs": {"x": {"$anchor": "n", "const": 1}}}, {"1"}),
    "an own URI": (
        {"$id": "http://h/x", "$ref": "y#/$defs/n", "$defs": {"y": {"$id": "y", "$defs": {"n": NULL}}}},
        {"null"},
    ),
    "exclusive bounds of draft 4": (
        {"type": "integer", "minimum": 0, "exclusiveMinimum": True, "maximum": 2},
        {"1", "2"},
    ),
    "a recursion that may end": ({**CLOSED, "properties": {"a": {"$ref": "#"}, "b": NULL}, "maxProperties": 1}, None),
    "an endless branch": (
        {"anyOf": [{"const": 1}, {"type": "array", "items": {"$ref": "#/anyOf/1"}, "minItems": 1}]},
        {"1"},
    ),
    "common multiples": (
        {"allOf": [{"multipleOf": 6}, {"multipleOf": 4}], "type": "integer", "minimum": 1, "maximum": 30},
        {"12", "24"},
    ),
    "a type list": ({"type": ["integer", "null"], "minimum": 1, "maximum": 1}, {"1", "null"}),
    "half a range": ({"type": "integer", "exclusiveMinimum": 1.5, "maximum": 3.5}, {"2", "3"}),
    "64 bits": ({"type": "integer", "minimum": -(2**63), "maximum": 2**64 - 1}, None),
    "a range of floats": ({"type": "number", "exclusiveMinimum": 1, "exclusiveMaximum": 2}, None),
    "long arrays": ({"type": "array", "items": NULL, "maxItems": 2**31 - 1}, None),
    "long strings": ({"type": "string", "maxLength": 2**63}, None),
    "a length as a float": ({"type": "string", "maxLength": 1.0, "minLength": 1.0, "pattern": "a"}, {'"a"'}),
}  # fmt: skip


@pytest.mark.parametrize("name", ENFORCED)
def test_answers_are_exactly_those_that_conform(name: str) -> None:
    schema, wanted = ENFORCED[name]
    found = set(answers(schema, 200 if wanted else 15))
    assert found
    assert wanted is None or found == wanted
    if "draft 4" not in name:
        assert all(violations(answer, schema) == [] for answer in found)


@pytest.mark.parametrize(
    ("schema", "pointer", "keyword"),
    [
        ({"type": "array", "uniqueItems": True}, "/uniqueItems", "uniqueItems"),
        (
            {"$defs": {"a/b": {"minProperties": 2}}, "$ref": "#/$defs/a~1b"},
            "/$defs/a~1b/minProperties",
            "minProperties",
        ),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "/oneOf", "oneOf"),
        ({"anyOf": [NULL, {"type": "array", "contains": NULL}]}, "/anyOf/1/contains", "contains"),
        ({"not": {"pattern": "a"}}, "/not", "not"),
        ({"if": {"minimum": 3}, "then": {"maximum": 5}}, "/if", "if"),
        ({"properties": {"p": {"pattern": "(?<=a)"}}}, "/properties/p/pattern", "pattern"),
        ({"type": "number", "multipleOf": 1_000_003}, "/multipleOf", "multipleOf"),
        ({"allOf": [{"multipleOf": 99_991}, {"multipleOf": 99_989}]}, "/multipleOf", "multipleOf"),
        ({"properties": {"a": {}}, "propertyNames": {"pattern": "^a"}}, "/propertyNames", "propertyNames"),
        ({"anyOf": [CAT, DOG], "unevaluatedProperties": False}, "/unevaluatedProperties", "unevaluatedProperties"),
        ({"maxProperties": 1, **ABC, "required": ["a"], "minProperties": 3}, "", ""),
        (
            {**CLOSED, "properties": {str(n): NULL for n in range(30)}, "minProperties": 9},
            "/minProperties",
            "minProperties",
        ),
    ],
)
def test_what_cannot_be_enforced_is_refused_and_can_be_left_unchecked(
    schema: dict[str, Any], pointer: str, keyword: str
) -> None:
    if not keyword:
        Constraint.json_schema(schema).check()  # other types than objects conform
        return
    remedy = re.escape(f'pass unchecked=("{keyword}",) and check answers yourself')
    with pytest.raises(ParameterError, match=rf"^constraint \(json_schema\): {re.escape(pointer)}: .*{remedy}$"):
        Constraint.json_schema(schema).check()
    assert list(answers(Constraint.json_schema(schema, unchecked=[keyword]), 5))


@pytest.mark.parametrize(
    ("schema", "message"),
    [
        ({"type": "nonsense"}, '/type: unknown type "nonsense"'),
        ({"type": 5}, "/type: not a type"),
        ({"properties": []}, "/properties: not an object"),
        ({"properties": {"a\n": 5}}, r"/properties/a\\n: not a schema"),
        ({"required": True, "type": "object"}, "/required: not a list of property names"),
        ({"minLength": -1}, "/minLength: not a whole number"),
        ({"minimum": "1"}, "/minimum: not a number"),
        ({"multipleOf": 0}, "/multipleOf: not above 0"),
        ({"anyOf": []}, "/anyOf: not a list of schemas"),
        ({"enum": 5}, "/enum: not a list"),
        ({"pattern": 5}, "/pattern: not a string"),
        ({"$ref": 5}, "/\\$ref: not a string"),
        ({"$ref": "http://localhost/x"}, "is not in the schema"),
        ({"$ref": "#/$defs/x"}, "names no schema"),
        ({"$ref": "http://[x"}, "is not in the schema"),
        ({"const": 2**60}, "/const: a number has too many digits"),
        ({"const": 0.12345678901234567}, "/const: a number has too many digits"),
        ({"enum": ["\x01"]}, "/enum: a value contains control characters"),
        ({"$ref": "#"}, "nothing can match it"),
        ({"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}, "nothing can match it"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "nothing can match it"),
        ({"type": "string", "pattern": "^a$", "minLength": 2}, "nothing can match it"),
        ({"type": "integer", "minimum": 2**70}, "/minimum: beyond 64 bits"),
        ({"type": "array", "minItems": 10**6}, "/minItems: above 50,000"),
        ('{"type":"null","type":"string"}', "the key 'type' is given twice"),
    ],
)
def test_invalid_schemas_are_refused_with_the_place(schema: Any, message: str) -> None:
    with pytest.raises(ParameterError, match=rf"^constraint \(json_schema\): [^\n]*{message}[^\n]*$"):
        Constraint.json_schema(schema).check()


@pytest.mark.parametrize("unchecked", ["uniqueItems", ["nonsense"], [5], ["$defs"], ["title"]])
def test_unknown_keywords_cannot_be_left_unchecked(unchecked: Any) -> None:
    with pytest.raises(ParameterError, match=r"^constraint \(json_schema\): unchecked [^\n]+$"):
        Constraint.json_schema({}, unchecked=unchecked)


def test_properties_named_like_a_keyword_are_kept() -> None:
    schema = {"properties": {"uniqueItems": {"items": {"uniqueItems": True}}}, "required": ["uniqueItems"]}
    text = Constraint.json_schema(schema, unchecked=("uniqueItems", "oneOf", "if")).text
    assert json.loads(text) == {"properties": {"uniqueItems": {"items": {}}}, "required": ["uniqueItems"]}


def test_the_schema_itself_stays_as_given_for_endpoints() -> None:
    schema = {"type": "string", "format": "password", "description": "x"}
    assert json.loads(Constraint.json_schema(schema).text) == schema


def test_a_listed_key_cannot_be_written_again_with_escapes() -> None:
    schema = {"type": "object", "properties": {"a": {"type": "integer"}}, "additionalProperties": {"type": "string"}}
    for answer in answers(schema, 60):
        assert "\\u" not in answer
        pairs = json.loads(answer, object_pairs_hook=list)
        assert [key for key, _ in pairs].count("a") <= 1


@pytest.mark.parametrize("form", ["date", "date-time", "uuid", "ipv4", "ipv6", "email", "hostname", "duration", "uri"])
def test_enforced_formats_and_annotations(form: str) -> None:
    from jsonschema import FormatChecker

    for answer in answers({"type": "string", "format": form}, 12):
        FormatChecker().check(json.loads(answer), form)


def test_dates_exist() -> None:
    leap = {"type": "string", "format": "date", "pattern": "-02-29$"}
    years = {int(json.loads(answer)[:4]) for answer in answers(leap, 40)}
    assert years
    assert all(year and year % 4 == 0 and (year % 100 or year % 400 == 0) for year in years)


# ---- hostile schemas


def nested(keyword: str, depth: int) -> str:
    return f'{{"{keyword}":' * depth + "{}" + "}" * depth


def doubled(keyword: str, depth: int) -> dict[str, Any]:
    """References that double at every level."""
    defs = {f"d{n}": {keyword: [{"$ref": f"#/$defs/d{n + 1}"}] * 2} for n in range(depth)}
    return {"$ref": "#/$defs/d0", "$defs": {**defs, f"d{depth}": {"type": "string"}}}


HOSTILE: dict[str, Any] = {
    "deep": nested("items", 115),
    "chain": {
        "$ref": "#/$defs/a0",
        "$defs": {f"a{n}": {"items": {"$ref": f"#/$defs/a{n + 1}"}, "minItems": 1} for n in range(9_000)}
        | {"a9000": {}},
    },
    "endless chain": {
        "$ref": "#/$defs/a0",
        "$defs": {f"a{n}": {"$ref": f"#/$defs/a{(n + 1) % 3000}"} for n in range(3000)},
    },
    "deeper": nested("not", 900),
    "many properties": {"properties": {f"p{n}": {"type": "string", "maxLength": 9} for n in range(20_000)}},
    "many values": {"enum": list(range(90_000))},
    "too many values": {"enum": [[n] for n in range(110_000)]},
    "many branches": {"oneOf": [{"properties": {"k": {"type": "integer", "minimum": n}}} for n in range(400)]},
    "product": {"allOf": [{"anyOf": [{"properties": {f"k{i}{j}": {"const": i}}} for j in range(9)]} for i in range(9)]},
    "dependencies": {"type": "object", "dependentRequired": {f"a{n}": [f"b{n}"] for n in range(40)}},
    "combinations": {"type": "object", "properties": {f"p{n}": {} for n in range(9)}, "minProperties": 4},
    "nested combinations": {"properties": {f"p{n}": {"properties": {f"q{m}": {} for m in range(9)}, "minProperties": 4}
                                           for n in range(9)}, "minProperties": 4, "type": "object"},
    "doubled oneOf": doubled("oneOf", 40),
    "doubled allOf": doubled("allOf", 40),
    "doubled anyOf": doubled("anyOf", 40),
    "large numbers": {"type": "number", "minimum": -(10**4000), "maximum": 10**4000, "multipleOf": 1e-300},
    "a tiny step": {"type": "number", "multipleOf": 5e-324},
    "long pattern": {"type": "string", "pattern": "^(" + "a?" * 5000 + ")$"},
    "many groups": {"type": "string", "pattern": "(" * 20_000},
    "look-aheads": {"type": "string", "pattern": "^" + "(?!a)" * 3000 + "b"},
    "permutations": {"type": "array", "items": {"enum": list(range(3000))}, "uniqueItems": True},
    "a long pointer": {"$ref": "#" + "/a" * 50_000},
    "a long key": {"properties": {"k" * 100_000: {"type": "nonsense"}}},
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_schemas_take_seconds_at_most_and_one_line(name: str) -> None:
    began = time.process_time()
    answers_or_refusal(HOSTILE[name], 1, max_tokens=20)
    assert time.process_time() - began < 25


def test_damaged_schemas_are_accepted_or_refused_in_one_line() -> None:
    keywords = [*(key for schema, _ in ENFORCED.values() for key in schema), "pattern", "contains", "propertyNames"]
    values: list[Any] = [None, True, -1, 1.5, "", "#", "object", [], [1], {}, {"a": 1}, [{}], {"$ref": "#"}, 10**30]
    rng = random.Random(0)
    for _ in range(400):
        schema = {rng.choice(keywords): rng.choice(values) for _ in range(rng.randint(1, 4))}
        answers_or_refusal(schema, 1, max_tokens=5)
