"""The folder in which downloads and derived files are kept for later runs."""

from __future__ import annotations

import os
from pathlib import Path

VARIABLE = "LLM_EDGE_CACHE"


def user_cache() -> Path | None:
    """The folder `$LLM_EDGE_CACHE`, by default `llm-edge` in the user's cache; None without a home folder."""
    if own := os.environ.get(VARIABLE):
        return Path(own).absolute()
    shared = os.environ.get("XDG_CACHE_HOME", "")
    try:
        base = Path(shared) if Path(shared).is_absolute() else Path.home() / ".cache"  # relative ones are invalid
    except RuntimeError:
        return None
    return base / "llm-edge"


def derived_files(name: str) -> Path | None:
    """A folder in the cache for files that only save time; None without a cache, or if `LLM_EDGE_CACHE` is empty."""
    base = None if os.environ.get(VARIABLE) == "" else user_cache()
    return None if base is None else base / name
