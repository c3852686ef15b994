"""Notifications that are safe to show, whatever text they contain."""

from __future__ import annotations

from typing import Any, Literal

from textual.app import App
from textual.widget import Widget

from llm_edge.chat.text import printable

Severity = Literal["information", "warning", "error"]


def notify(
    source: App[Any] | Widget, text: str, severity: Severity = "information", timeout: float | None = None
) -> None:
    """Show a notification without markup or control characters."""
    source.notify(printable(text), severity=severity, timeout=timeout, markup=False)
