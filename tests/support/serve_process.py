"""Runs the command `llm-serve` as a process, for tests of its signals, its output and its exit code."""

from __future__ import annotations

import os
import subprocess
import sysconfig
from pathlib import Path

COMMAND = Path(sysconfig.get_path("scripts")) / "llm-serve"


class ServeProcess:
    """`llm-serve` on a free port; usable as a context manager, which kills what still runs.

    Attributes:
        url: where it listens.
        process: the process.
    """

    def __init__(self, *words: object, cwd: Path) -> None:
        command = [str(COMMAND), "--port", "0", "--threads", "1", *map(str, words)]
        environment = {**os.environ, "OMP_WAIT_POLICY": "passive"}
        environment |= {"LLM_EDGE_DATA": str(cwd), "LLM_EDGE_CONFIG": str(cwd)}  # not the user's conversations
        self.process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=environment
        )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert " on http://" in line, f"{line}{self.process.stderr.read() if self.process.stderr else ''}"
        self.url = line.split()[-1].replace("localhost", "127.0.0.1")

    def wait(self, timeout: float = 60) -> tuple[int, str]:
        """The exit code and what was written to stderr, once the process has ended."""
        _, err = self.process.communicate(timeout=timeout)
        return self.process.returncode, err

    def stop(self) -> tuple[int, str]:
        """End the process with SIGTERM; returns what `wait` does."""
        self.process.terminate()
        return self.wait()

    def __enter__(self) -> ServeProcess:
        return self

    def __exit__(self, *_: object) -> None:
        if self.process.poll() is None:
            self.process.kill()
        self.process.communicate()
