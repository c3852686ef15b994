"""Sends requests made from the server's OpenAPI document, valid and invalid ones, and fails on a 5xx."""

from __future__ import annotations

from typing import Any

import httpx2
import hypothesis
import schemathesis
from schemathesis.generation import GenerationMode

from llm_edge.runtime.sampling.params import PARAMETERS

_EXTRA = [name for name in PARAMETERS if name != "max_tokens"]
_SECONDS = 60


def operations(url: str) -> list[Any]:
    """The operations of a server; their bodies get a few sampling parameters of any type, which the document lacks."""
    document = httpx2.get(f"{url}/openapi.json").json()
    for name, schema in document["components"]["schemas"].items():
        if schema.get("additionalProperties") is True and name.lower() not in ("tokenize", "detokenize"):
            schema["properties"] |= {extra: {} for extra in _EXTRA}
    return [found.ok() for found in schemathesis.openapi.from_dict(document).get_all_operations()]


def send_cases(url: str, operation: Any, examples: int, seed: int) -> int:
    """Send this many valid and as many invalid requests of an operation, if it takes any input; returns how many."""
    sent = 0
    for mode in GenerationMode:

        @hypothesis.seed(seed)
        @hypothesis.settings(
            max_examples=examples,
            deadline=None,
            database=None,
            phases=[hypothesis.Phase.generate],
            suppress_health_check=list(hypothesis.HealthCheck),
        )
        @hypothesis.given(case=operation.as_strategy(generation_mode=mode))
        def check(case: Any) -> None:
            nonlocal sent
            sent += 1
            response = case.call(base_url=url, timeout=_SECONDS)
            assert response.status_code < 500, f"{case.as_curl_command()}\n{response.status_code} {response.text[:500]}"

        try:
            check()
        except hypothesis.errors.Unsatisfiable:  # no invalid request exists where there is no input
            continue
    return sent
