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
    source.notify(printable(text), severity=severity, timeout=timeout, markup=False)
    app.call_later(_keep_latest, app)  # Textual adds notifications in a message of their own


def _keep_latest(app: App[Any]) -> None:
    """Remove all notifications but the last one and more severe ones."""
    *earlier, last = [*app._notifications] or [None]
    for shown in earlier:
        if shown is not None and last is not None and _RANK[shown.severity] <= _RANK[last.severity]:
            app._unnotify(shown)
