"""A sample of `make fuzz` with a fixed seed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

FUZZ = Path(__file__).with_name("run.py")


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="limits and figures of forked processes are Linux's")
def test_hostile_input_is_read_or_rejected_in_one_line() -> None:
    done = subprocess.run(
        [sys.executable, FUZZ, "20260", "--count", "11"], capture_output=True, text=True, check=False, timeout=900
    )
    assert done.returncode == 0, done.stdout + done.stderr
