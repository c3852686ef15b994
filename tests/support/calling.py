"""Runs a command in the test's process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest


def call(main: Callable[[], object], capture: pytest.CaptureFixture[Any], *words: object) -> tuple[int, str, str]:
    """Run a command's `main` with these words as its command line; returns exit code, stdout and stderr."""
    capture.readouterr()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", [*map(str, words)])
        with pytest.raises(SystemExit) as ended:
            main()
    captured = capture.readouterr()
    assert isinstance(ended.value.code, int)
    return ended.value.code, captured.out, captured.err
