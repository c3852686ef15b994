"""Progress reporting of an export."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float | None, str], None]
"""Called with a stage (one of `STAGES`), the completed fraction of it (None if unknown) and the current item."""

STAGES = (
    "recovering",
    "reading",
    "calibrating",
    "refining",
    "tracing",
    "quantizing",
    "validating",
    "writing",
    "interrupted",
)

ItemProgress = Callable[[float, str], None]
"""Called with the completed fraction of a part of a stage and the current item."""
