"""`run`: what a command prints where limits are hit, and when native libraries print too."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from pathlib import Path

import pytest

from llm_edge.runtime.command import run
from llm_edge.runtime.errors import MachineError

SCRIPTS = Path(sysconfig.get_path("scripts"))
NATIVE = """
import os, sys
from llm_edge.runtime.command import run
def command():
    os.write(2, b"thread panicked\\n")
    print("ours", file=sys.stderr)
sys.exit(run(command))
"""


def failing(error: BaseException, cause: BaseException | None = None) -> Callable[[], None]:
    def command() -> None:
        raise error from cause

    return command


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (failing(MemoryError()), "not enough memory"),
        (failing(ValueError("x"), MemoryError()), "not enough memory"),
        (failing(RuntimeError("can't start new thread")), "no further thread can be started"),
        (failing(OSError(errno.EFBIG, "File too large", "x.db")), "x.db: File too large"),
        (failing(OSError(errno.ENOMEM, "Cannot allocate memory")), "disk: Cannot allocate memory"),
        (failing(OSError(errno.EMFILE, "Too many open files", "x")), "x: Too many open files"),
        (
            failing(ImportError("long\nadvice"), ImportError("x.so: failed to map")),
            "a library cannot be loaded (x.so: ",
        ),
        (failing(MachineError("the disk is full")), "the disk is full"),
    ],
)
def test_a_failure_of_the_machine_is_one_line(
    command: Callable[[], None], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(command) == 3
    printed = capsys.readouterr().err
    assert printed.startswith(f"error: {line}")
    assert printed.count("\n") == 1


@pytest.mark.parametrize(
    "error", [ValueError("x"), RuntimeError("x"), ImportError("x", name="llm_edge.x"), KeyError(1)]
)
def test_a_bug_keeps_its_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        run(failing(error))


@pytest.mark.skipif(sys.platform != "linux", reason="limits the address space with Linux's ulimit")
@pytest.mark.parametrize("limit", ["-v 200000", "-v 350000", "-f 0"])
@pytest.mark.parametrize("name", ["llm-chat", "llm-bench", "llm-export"])
def test_commands_under_a_limit_print_one_line(tiny_bundle: Path, tmp_path: Path, name: str, limit: str) -> None:
    arguments = {
        "llm-chat": [tiny_bundle, "--ask", "hi", "--max-tokens", "2"],
        "llm-bench": [tiny_bundle, "--precision", "fp32", "--rounds", "1", "--repeats", "1"],
        "llm-export": [tiny_bundle.parent, "-o", tmp_path / "out", "--progress", "none"],
    }
    words = [SCRIPTS / name, *arguments[name]]
    done = subprocess.run(
        ["bash", "-c", f'ulimit {limit}; exec "$@"', "bash", *map(str, words)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
        stdin=subprocess.DEVNULL,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"},
    )
    errors = [line for line in done.stderr.splitlines() if not line.startswith(("round ", "("))]
    assert "Traceback" not in done.stderr
    assert done.returncode in (0, 2, 3), done.stderr
    assert len(errors) == (0 if done.returncode == 0 else 1), done.stderr


def test_output_of_native_libraries_is_hidden_unless_debugging() -> None:
    words = [sys.executable, "-c", NATIVE]
    for variables, expected in (({}, "ours\n"), ({"LLM_EDGE_DEBUG": "1"}, "thread panicked\nours\n")):
        environment = {**os.environ, **variables}
        done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=60, env=environment)
        assert (done.returncode, done.stderr) == (0, expected)
