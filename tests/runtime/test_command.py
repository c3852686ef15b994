"""`run`: what a command prints when native libraries print too."""

from __future__ import annotations

import os
import subprocess
import sys

NATIVE = """
import os, sys
from llm_edge.runtime.command import run
def command():
    os.write(2, b"thread panicked\\n")
    print("ours", file=sys.stderr)
sys.exit(run(command))
"""


def test_output_of_native_libraries_is_hidden_unless_debugging() -> None:
    words = [sys.executable, "-c", NATIVE]
    for variables, expected in (({}, "ours\n"), ({"LLM_EDGE_DEBUG": "1"}, "thread panicked\nours\n")):
        environment = {**os.environ, **variables}
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60, env=environment)
        assert (done.returncode, done.stderr) == (0, expected)
