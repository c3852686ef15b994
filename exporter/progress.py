"""What an export tells of itself while it works."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, float | None, str], None]
"""Told a stage (one of `STAGES`), its share done (None: unknown) and what is at work."""

STAGES = ("reading", "calibrating", "tracing", "quantizing", "validating", "writing")
