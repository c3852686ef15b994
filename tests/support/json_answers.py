"""Random JSON answers under a constraint, drawn token by token, and their check with jsonschema."""

from __future__ import annotations

import functools
import json
import random
import re
import warnings
from collections.abc import Iterator
from decimal import Decimal
from typing import Any

import jsonschema
import numpy as np
import tiny

from llm_edge.runtime.errors import ParameterError
from llm_edge.runtime.sampling.constraint import Constraint
from llm_edge.runtime.sampling.grammar import ConstraintCompiler

SIZE, END = 331, 2
FAVOURED = {'"': 40, "]": 8, "}": 8, ",": 2, "a": 4, "b": 4, "0": 3, "1": 3, "-": 2, ".": 2, "\\": 2, "u": 3}


@functools.cache
def compiler() -> ConstraintCompiler:
    """Of the small tokenizer."""
    return ConstraintCompiler(tiny.tokenizer().to_str(), SIZE, [END])


@functools.cache
def _weights() -> np.ndarray[Any, np.dtype[np.float64]]:
    weights = np.full(SIZE, 0.3)
    for char, weight in FAVOURED.items():
        weights[tiny.tokenizer().encode(char).ids] = weight
    return weights


def answers(schema: Any, count: int, seed: int = 0, max_tokens: int = 150) -> Iterator[str]:
    """Random complete answers of at most `max_tokens`; others are left out."""
    constraint = schema if isinstance(schema, Constraint) else Constraint.json_schema(schema)
    text = tiny.tokenizer()
    for index in range(count):
        rng = random.Random(f"{seed} {index}")
        processor, tokens = compiler().start(constraint), [7]
        for _ in range(max_tokens):
            allowed = np.flatnonzero(np.isfinite(processor(np.zeros(SIZE, np.float32), tokens)))
            if END in allowed and (len(allowed) == 1 or rng.random() < 0.4):
                yield text.decode(tokens[1:])
                break
            allowed = allowed[allowed != END]
            tokens.append(int(rng.choices(allowed, _weights()[allowed])[0]))


def answers_or_refusal(schema: Any, count: int, max_tokens: int) -> list[str]:
    """Random answers, or none where the schema is refused in one line; any other failure is raised."""
    try:
        return list(answers(schema, count, max_tokens=max_tokens))
    except ParameterError as e:
        if not re.fullmatch(r"constraint \(json_schema\): [^\n]{1,400}", str(e)):
            raise
        return []


def violations(answer: str, schema: Any) -> list[str]:
    """What a validator objects to, with exact numbers and with doubles."""
    kind: Any = jsonschema.validators.validator_for(schema, jsonschema.Draft202012Validator)
    exact = json.loads(json.dumps(schema), parse_float=Decimal)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # Python's about a pattern such as `[[]`
        found = [error.message for error in kind(exact).iter_errors(json.loads(answer, parse_float=Decimal))]
        if "multipleOf" not in json.dumps(schema):  # jsonschema divides doubles
            found += [error.message for error in kind(schema).iter_errors(json.loads(answer))]
    return found
