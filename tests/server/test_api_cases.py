"""A sample of what `make schemathesis` sends: no request that follows or violates the OpenAPI document gets a 5xx."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from serving import Served

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    pytest.importorskip("schemathesis")
    from api_cases import operations, send_cases


@pytest.fixture(scope="module")
def served(models_folder: Path) -> Iterator[Served]:
    limits = {"default": "tiny", "precision": "fp32", "generation": {"max_tokens": 2}}
    server = Served(models_folder, models=limits)
    yield server
    server.stop()


def test_no_request_gets_a_server_error(served: Served) -> None:
    sent = sum(send_cases(served.url, operation, examples=4, seed=1) for operation in operations(served.url))
    assert sent > 100
