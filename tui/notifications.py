"""Notifications that are safe to show, whatever text they contain, and that do not pile up."""

from __future__ import annotations

from typing import Any, Literal

from textual.app import App
from textual.widget import Widget

from llm_edge.chat.text import printable

Severity = Literal["information", "warning", "error"]
_RANK = {"information": 0, "warning": 1, "error": 2}


def notify(
    source: App[Any] | Widget, text: str, severity: Severity = "information", timeout: float | None = None
) -> None:
    """Show a notification without markup or control characters; it replaces those that are not more severe."""
    app = source if isinstance(source, App) else source.app
    for shown in [each for each in app._notifications if _RANK[each.severity] <= _RANK[severity]]:
        app._unnotify(shown)
    source.notify(printable(text), severity=severity, timeout=timeout, markup=False)
