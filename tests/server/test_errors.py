"""Errors of the runtime as those of the API."""

from __future__ import annotations

import logging
import re

import pytest

from llm_edge.runtime.errors import LlmEdgeError
from llm_edge.server.errors import api_error


def test_a_failed_generation_names_an_id_that_the_log_explains(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.ERROR):
        error = api_error(LlmEdgeError("the step failed in /srv/model.onnx"))
    assert (error.status, error.code) == (500, "generation_failed")
    assert "/srv" not in error.message
    found = re.search(r"see error (\w+) in the server's log", error.message)
    assert found
    assert f"error {found[1]}: the step failed in /srv/model.onnx" in caplog.text
