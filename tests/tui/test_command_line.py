"""The options of the commands: version, help, completion, `python -m`, and combinations that would be ignored."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = {"llm-chat": "llm_edge.tui", "llm-export": "llm_edge.exporter", "llm-bench": "llm_edge.bench"}


def call(module: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", module, *arguments],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=120,
        cwd=folder,
        env=os.environ | {"LLM_EDGE_DATA": str(folder), "LLM_EDGE_CONFIG": str(folder)},
        check=False,
    )


@pytest.mark.parametrize("module", COMMANDS.values())
def test_every_command_has_version_help_and_completion(module: str, tmp_path: Path) -> None:
    shown = call(module, "--version", folder=tmp_path)
    assert (shown.returncode, shown.stderr) == (0, "")
    assert shown.stdout.startswith("llm-edge ")
    short = call(module, "-h", folder=tmp_path)
    assert short.returncode == 0
    assert all(each in short.stdout for each in ("Usage:", "--version", "--install-completion"))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--host", "0.0.0.0", "--ask", "Hi"], "--host has no effect without --serve"),
        (["--port", "8021"], "--port has no effect without --serve"),
        (["--save"], "--save needs --ask or --plain"),
        (["--ask", ""], "--ask is empty"),
        (["--ask", "Hi", "--plain"], "--ask and --plain exclude each other"),
        (["--endpoint", "http://127.0.0.1:1/v1", "--model", "m", "--precision", "int8"], "--precision has no effect"),
        (["some-bundle", "--endpoint", "http://127.0.0.1:1/v1", "--model", "m"], "a bundle has no effect"),
        (["some-bundle", "--fake"], "a bundle has no effect with --fake"),
        (["Why is the sky blue?"], "to ask a question, put --ask before it"),
        (["--continue", "--ask", "Hi", "--endpoint", "http://127.0.0.1:1/v1", "--model", "m"], "127.0.0.1:1 refused"),
    ],
)
def test_options_that_would_be_ignored_are_refused(arguments: list[str], reason: str, tmp_path: Path) -> None:
    done = call("llm_edge.tui", *arguments, folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert reason in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_bundle_given_to_llm_export_is_named_as_one(tiny_bundle: Path, tmp_path: Path) -> None:
    done = call("llm_edge.exporter", str(tiny_bundle), folder=tmp_path)
    assert done.returncode == 2
    assert "is a bundle already: chat with it (llm-chat" in done.stderr
    assert done.stderr.count("\n") == 1
