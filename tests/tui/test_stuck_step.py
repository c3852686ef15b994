"""Ctrl-C and SIGTERM end a chat whose model's step does not end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SUPPORT = Path(__file__).parents[1] / "support"
PROGRAM = f"""
import sys
sys.path[:0] = [{str(SUPPORT)!r}]
from endless import Endless
from llm_edge.runtime.backend import graph

class Announced(Endless):
    def run_with_iobinding(self, binding, options):
        print("stuck", flush=True)
        super().run_with_iobinding(binding, options)

create = graph.Graph.__init__

def created(self, *arguments):
    create(self, *arguments)
    self.inference = Announced(self.inference)

graph.Graph.__init__ = created
from llm_edge.tui.cli import main
main()
"""


@pytest.mark.skipif(os.name == "nt", reason="sends POSIX signals")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
@pytest.mark.parametrize("mode", [["--ask", "hi", "--no-stdin"], ["--plain"]], ids=["ask", "plain"])
def test_a_signal_ends_a_chat_with_a_stuck_step(tiny_bundle: Path, mode: list[str], name: str) -> None:
    words = [sys.executable, "-c", PROGRAM, str(tiny_bundle), "--precision", "fp32", *mode]
    pipe = subprocess.PIPE
    with subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        if mode == ["--plain"]:
            process.stdin.write("hi\n")
            process.stdin.flush()
        assert process.stdout.readline() == "stuck\n"
        process.send_signal(getattr(signal, name))
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    assert err.splitlines()[-1] == "interrupted"
    assert "Traceback" not in err
