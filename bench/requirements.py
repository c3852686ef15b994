"""`require_modules`: what a benchmark needs of the system."""

from __future__ import annotations

import importlib.util

from llm_edge.runtime.errors import InputError


def require_modules(benchmark: str, *names: str) -> None:
    """Raise InputError if the system lacks one of these modules of Python, which exist only on Unix."""
    missing = [name for name in names if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(f"{benchmark} needs the Python module {', '.join(missing)}: run it on Linux or macOS")
