"""Errors of the runtime as those of the API."""

from __future__ import annotations

import io
import logging
import re

from llm_edge.runtime.errors import LlmEdgeError
from llm_edge.server.errors import api_error


def test_a_failed_generation_names_an_id_that_the_log_explains() -> None:
    logged = io.StringIO()
    handler = logging.StreamHandler(logged)
    logging.getLogger("llm_edge.server").addHandler(handler)
    try:
        error = api_error(LlmEdgeError("the step failed in /srv/model.onnx"))
    finally:
        logging.getLogger("llm_edge.server").removeHandler(handler)
    assert (error.status, error.code) == (500, "generation_failed")
    assert "/srv" not in error.message
    found = re.search(r"see error (\w+) in the server's log", error.message)
    assert found
    assert f"error {found[1]}: the step failed in /srv/model.onnx" in logged.getvalue()
