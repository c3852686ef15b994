"""Answers under a JSON schema conform to it: random schemas, and what pydantic, zod and the OpenAI client send."""

from __future__ import annotations

import datetime
import enum
import uuid
from decimal import Decimal
from pathlib import Path
from typing import Annotated, Any, Literal, Optional, Union

import pydantic
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from json_answers import answers, answers_or_refusal, violations
from openai import pydantic_function_tool
from openai.lib._pydantic import to_strict_json_schema

from llm_edge.runtime.errors import ParameterError
from llm_edge.runtime.sampling.constraint import Constraint


def conforming(schema: Any, count: int = 12) -> list[str]:
    """Random answers, all of which a validator accepts."""
    found = list(answers(schema, count))
    for answer in found:
        assert violations(answer, schema) == [], answer
    return found


# ---- random schemas

KEYS = ["a", "b", "ab", "c"]
COUNTS = st.integers(0, 3)
NUMBERS = st.one_of(st.integers(-20, 20), st.sampled_from([0.5, -1.25, 0.1, 2.0, 1e-7, 123456.75, -3.999, 2**53]))
SCALARS = st.one_of(st.none(), st.booleans(), NUMBERS, st.sampled_from(["", "a", "b", "ab", '"\\', "é\n"]))
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=2), st.dictionaries(st.sampled_from(KEYS), inner, max_size=2)
    ),
    max_leaves=4,
)  # fmt: skip
PATTERNS = [
    "^a",
    "b$",
    "^[ab]*$",
    "^(?!a)",
    "a|b",
    "^[^a]+$",
    r"\d",
    "^(?=a).{2}$",
    "[[&]",
    r"^\W$",
    "^(?!.*ab)[a-c]*$",
]
NAMES = [{"type": "string"}, {"enum": ["a", "b"]}, {"maxLength": 2}, {"pattern": "^a"}]
REFERENCES = st.sampled_from([{"$ref": "#"}, {"$ref": "#/$defs/x"}, {"$ref": "#/$defs/y"}])


def some(**keywords: Any) -> Any:
    return st.fixed_dictionaries({}, optional=keywords)


def typed(inner: Any) -> list[Any]:
    """Schemas of one type or of several."""
    names = st.lists(st.sampled_from(KEYS), max_size=2, unique=True)
    steps = st.sampled_from([1, 2, 3, 0.5, 0.1, 0.25, 7, 1.5])
    number = some(
        minimum=NUMBERS, maximum=NUMBERS, exclusiveMinimum=NUMBERS, exclusiveMaximum=NUMBERS, multipleOf=steps
    )
    string = some(
        minLength=COUNTS,
        maxLength=COUNTS,
        pattern=st.sampled_from(PATTERNS),
        format=st.sampled_from(["date", "ipv4", "password", "uuid"]),
    )
    array = some(
        items=inner,
        minItems=COUNTS,
        maxItems=COUNTS,
        prefixItems=st.lists(inner, min_size=1, max_size=2),
        uniqueItems=st.booleans(),
        contains=inner,
    )
    thing = some(
        properties=st.dictionaries(st.sampled_from(KEYS), inner, max_size=3),
        required=names,
        additionalProperties=inner,
        patternProperties=st.dictionaries(st.sampled_from(["^a", "b$", "^[ab]$"]), inner, min_size=1, max_size=1),
        minProperties=COUNTS,
        maxProperties=COUNTS,
        propertyNames=st.sampled_from(NAMES),
        dependentRequired=st.dictionaries(st.sampled_from(KEYS), names, max_size=1),
        unevaluatedProperties=st.booleans(),
    )
    kinds = [(number, "number"), (number, "integer"), (string, "string"), (array, "array"), (thing, "object")]
    mixed = st.builds(lambda *parts: {key: each for part in parts for key, each in part.items()}, number, string, thing)
    return [
        *(st.builds(lambda kind, each: {"type": kind, **each}, st.just(kind), each) for each, kind in kinds),
        thing,
        st.builds(
            lambda each, kind: {**each, "type": kind}, mixed, st.sampled_from([["string", "object"], ["integer"]])
        ),
    ]


def combined(inner: Any) -> Any:
    """Schemas made of others."""
    several = st.lists(inner, min_size=1, max_size=3)
    parts = [
        some(anyOf=several),
        some(allOf=several),
        some(oneOf=several),
        some(enum=st.lists(VALUES, min_size=1, max_size=4)),
        # Not the schema itself: jsonschema would follow a reference to itself for ever.
        some(properties=st.dictionaries(st.sampled_from(KEYS), REFERENCES, max_size=2), items=REFERENCES),
        some(**{"not": inner}),
        some(**{"if": inner, "then": inner, "else": inner}),
    ]
    own, part = st.one_of(*typed(inner)), st.one_of(*parts)
    return st.one_of(own, part, st.builds(lambda one, other: {**one, **other}, own, part))


LEAVES = st.one_of(
    st.booleans(),
    st.builds(
        lambda kind: {"type": kind}, st.sampled_from(["null", "boolean", "integer", "number", "string", "array"])
    ),
    st.builds(lambda value: {"const": value}, VALUES),
    *typed(st.booleans()),
)
SCHEMAS = st.recursive(LEAVES, combined, max_leaves=8)


@settings(max_examples=150, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(SCHEMAS.filter(lambda each: isinstance(each, dict)), SCHEMAS, SCHEMAS)
def test_random_answers_to_random_schemas_conform(schema: dict[str, Any], one: Any, other: Any) -> None:
    schema = {**schema, "$defs": {"x": one, "y": other}}
    for answer in answers_or_refusal(schema, 4, max_tokens=100):
        assert violations(answer, schema) == [], answer


# ---- pydantic


class Color(enum.Enum):
    """A closed set of names."""

    RED = "red"
    BLUE = "blue"


class Cat(pydantic.BaseModel):
    kind: Literal["cat"] = "cat"  # not required, as pydantic writes fields that have a default
    lives: int


class Dog(pydantic.BaseModel):
    kind: Literal["dog"] = "dog"
    lives: int


class Tree(pydantic.BaseModel):
    size: Annotated[int, pydantic.Field(ge=0, le=9)]
    children: Annotated[list[Tree], pydantic.Field(max_length=2)] = []


FIELDS: dict[str, Any] = {
    "decimal": Decimal,
    "decimal with digits": Annotated[Decimal, pydantic.Field(max_digits=6, decimal_places=2, gt=0)],
    "datetime": datetime.datetime,
    "date": datetime.date,
    "time": datetime.time,
    "timedelta": datetime.timedelta,
    "set of an enumeration": set[Color],
    "set of literals": frozenset[Literal["a", "b", 3]],
    "dict": dict[str, int],
    "dict of an enumeration": dict[Color, int],
    "dict of literals": dict[Literal["a", "b"], int],
    "dict of UUID": dict[uuid.UUID, bool],
    "dict of short keys": dict[Annotated[str, pydantic.Field(min_length=1, max_length=3)], int],
    "dict of a pattern": dict[Annotated[str, pydantic.Field(pattern="^x")], int],
    "dict with a length": Annotated[dict[str, int], pydantic.Field(min_length=1, max_length=2)],
    "optional": Optional[int],  # noqa: UP045
    "union": Union[int, str, None],  # noqa: UP007
    "discriminated union": Annotated[Cat | Dog, pydantic.Field(discriminator="kind")],
    "recursive model": Tree,
    "secret": pydantic.SecretStr,
    "path": Path,
    "url": pydantic.AnyUrl,
    "http url": pydantic.HttpUrl,
    "ip": pydantic.IPvAnyAddress,
    "bytes": bytes,
    "base64": pydantic.Base64Str,
    "tuple": tuple[int, Annotated[str, pydantic.Field(max_length=3)]],
    "64 bits": Annotated[int, pydantic.Field(ge=0, le=2**64 - 1)],
    "positive": pydantic.PositiveFloat,
    "between": Annotated[float, pydantic.Field(gt=0, lt=1)],
    "cents": Annotated[float, pydantic.Field(multiple_of=0.01)],
    "pattern": Annotated[str, pydantic.Field(pattern=r"^\w{1,3}\d$")],
    "json": pydantic.Json[Any],
    "uuid": uuid.UUID,
}


@pytest.mark.parametrize("mode", ["validation", "serialization"])
@pytest.mark.parametrize("name", FIELDS)
def test_schemas_of_pydantic_are_accepted(name: str, mode: Literal["validation", "serialization"]) -> None:
    model = pydantic.create_model("Answer", value=(Annotated[FIELDS[name], pydantic.Field(description="x")], ...))
    found = conforming(model.model_json_schema(mode=mode))
    assert found
    if name in ("date", "datetime", "time", "uuid", "recursive model", "discriminated union", "positive", "between"):
        for answer in found:
            model.model_validate_json(answer)


def test_sets_of_anything_name_the_remedy_and_are_accepted_with_it() -> None:
    model = pydantic.create_model("Answer", tags=(set[str], ...))
    schema = model.model_json_schema()
    with pytest.raises(ParameterError, match=r'/properties/tags/uniqueItems: .*unchecked=\("uniqueItems",\)'):
        list(answers(schema, 1))
    for answer in answers(Constraint.json_schema(schema, unchecked=("uniqueItems",)), 5):
        model.model_validate_json(answer)  # a set takes equal items once


# ---- the OpenAI client


class Step(pydantic.BaseModel):
    """One step."""

    text: str
    pet: Cat | Dog | None = None
    color: Color = Color.RED
    numbers: dict[Literal["x"], float] | None


def test_strict_schemas_of_the_openai_client_are_accepted() -> None:
    strict = to_strict_json_schema(Step)
    tool = pydantic_function_tool(Step, name="step", description="x")["function"]["parameters"]
    for schema in (strict, tool, to_strict_json_schema(Tree)):
        assert conforming(schema)


# ---- zod

EMAIL = r"^(?!\.)(?!.*\.\.)([A-Za-z0-9_'+\-\.]*)[A-Za-z0-9_+-]@([A-Za-z0-9][A-Za-z0-9\-]*\.)+[A-Za-z]{2,}$"
DURATION = r"^P(?:(\d+W)|(?!.*W)(?=\d|T\d)(\d+Y)?(\d+M)?(\d+D)?(T(?=\d)(\d+H)?(\d+M)?(\d+([.,]\d+)?S)?)?)$"
DATE = (
    r"^(?:(?:\d\d[2468][048]|\d\d[13579][26]|\d\d0[48]|[02468][048]00|[13579][26]00)-02-29|\d{4}-(?:(?:0[13578]|1[02])"
    r"-(?:0[1-9]|[12]\d|3[01])|(?:0[469]|11)-(?:0[1-9]|[12]\d|30)|(?:02)-(?:0[1-9]|1\d|2[0-8])))$"
)
SAFE = {"minimum": -9007199254740991, "maximum": 9007199254740991}
ZOD: dict[str, dict[str, Any]] = {
    "email": {"type": "string", "format": "email", "pattern": EMAIL},
    "duration": {"type": "string", "format": "duration", "pattern": DURATION},
    "date": {"type": "string", "format": "date", "pattern": DATE},
    "url": {"type": "string", "format": "uri"},
    "base64": {"type": "string", "format": "base64", "contentEncoding": "base64"},
    "jwt": {"type": "string", "format": "jwt"},
    "cuid": {"type": "string", "format": "cuid", "pattern": "^[cC][^\\s-]{8,}$"},
    "starts with": {"type": "string", "pattern": "^https:.*"},
    "hostname": {"type": "string", "pattern": r"^(?=.{1,253}\.?$)[a-zA-Z0-9](?:[a-zA-Z0-9-]{0,61}[a-zA-Z0-9])?\.?$"},
    "int": {"type": "integer", **SAFE},
    "float64": {"type": "number", "minimum": -1.7976931348623157e308, "maximum": 1.7976931348623157e308},
    "positive": {"type": "number", "exclusiveMinimum": 0},
    "record": {"type": "object", "propertyNames": {"type": "string"}, "additionalProperties": {"type": "integer"}},
    "record of an enumeration": {
        "type": "object",
        "propertyNames": {"type": "string", "enum": ["a", "b"]},
        "additionalProperties": {"type": "integer", **SAFE},
        "required": ["a", "b"],
    },
    "tuple": {"type": "array", "prefixItems": [{"type": "string"}, {"type": "boolean"}], "items": {"type": "null"}},
    "tuple of draft 7": {"type": "array", "items": [{"type": "boolean"}], "additionalItems": False, "minItems": 1},
    "discriminated union": {
        "oneOf": [
            {"type": "object", "properties": {"t": {"type": "string", "const": kind}}, "required": ["t"]}
            for kind in "ab"
        ]
    },
    "never": {"type": "object", "properties": {"a": {"not": {}}, "b": {"type": "null"}}, "required": ["b"]},
    "intersection": {
        "allOf": [
            {"type": "object", "properties": {"a": {"type": "null"}}, "required": ["a"]},
            {"type": "object", "properties": {"b": {"type": "null"}}, "required": ["b"]},
        ]
    },
    "recursive": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "type": "object",
        "properties": {"next": {"anyOf": [{"$ref": "#"}, {"type": "null"}]}},
        "required": ["next"],
        "additionalProperties": False,
    },
    "nullable of OpenAPI": {"type": "string", "nullable": True, "maxLength": 3},
    "annotations": {
        "type": "boolean",
        **dict.fromkeys(("title", "description", "$comment", "contentMediaType", "x-order", "example"), "x"),
        **dict.fromkeys(("deprecated", "readOnly", "writeOnly"), True),
        "examples": [True],
        "discriminator": {"propertyName": "x"},
        "x-guidance": {"lenient": True},
    },
}


@pytest.mark.parametrize("name", ZOD)
def test_schemas_of_zod_are_accepted(name: str) -> None:
    found = list(answers(ZOD[name], 12))
    assert found
    schema = dict(ZOD[name])
    if schema.pop("nullable", False):
        schema["type"] = ["string", "null"]
    if isinstance(schema.get("items"), list):
        schema["$schema"] = "http://json-schema.org/draft-07/schema#"
    for answer in found:
        assert violations(answer, schema) == [], answer
