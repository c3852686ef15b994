"""Color themes: our own with muted colors, a high-contrast one, the chosen one, and matching styles for code."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from rich.style import Style
from textual.app import App
from textual.color import Color
from textual.theme import Theme

from llm_edge.chat.settings import THEME, Settings
from llm_edge.runtime.errors import LlmEdgeError
from llm_edge.tui.notifications import notify

HIGH_CONTRAST = Theme(
    name="high-contrast",
    primary="#00ffff",
    secondary="#ffffff",
    accent="#ffff00",
    warning="#ffff00",
    error="#ff6060",
    success="#00ff00",
    foreground="#ffffff",
    background="#000000",
    surface="#000000",
    panel="#202020",
    boost="#303030",
    dark=True,
    text_alpha=1.0,
    variables={"text-muted": "#e0e0e0", "footer-key-foreground": "#ffff00", "input-selection-background": "#0050ff"},
)

DARK = Theme(
    name="llm-edge-dark",
    primary="#5f8fbf",
    secondary="#7d8896",
    accent="#79aee0",
    warning="#cfa45c",
    error="#d8707a",
    success="#7aab82",
    foreground="#d5dbe3",
    background="#14171c",
    surface="#191d24",
    panel="#262c36",
    boost="#20252e",
    dark=True,
    variables={"footer-key-foreground": "#79aee0", "border": "#79aee0", "block-cursor-background": "#34506e"},
)
LIGHT = Theme(
    name="llm-edge-light",
    primary="#3a6ea5",
    secondary="#6b7480",
    accent="#1f5fa8",
    warning="#8a5a00",
    error="#b3323e",
    success="#2f7a3d",
    foreground="#1d232b",
    background="#fafbfc",
    surface="#f2f4f7",
    panel="#dfe4ea",
    boost="#e9edf2",
    dark=False,
    variables={"footer-key-foreground": "#1f5fa8", "border": "#1f5fa8"},
)
_CODE_THEMES = {DARK.name: "github-dark", "gruvbox": "gruvbox-dark", "nord": "nord", "dracula": "dracula"}


def code_theme(theme: Theme) -> str:
    """The Pygments style that matches a theme."""
    if theme.name == HIGH_CONTRAST.name:
        return "github-dark"
    return _CODE_THEMES.get(theme.name, "monokai" if theme.dark else "tango")


def theme_style(variables: Mapping[str, str], name: str) -> Style:
    """A style in one of the theme's colors, which may be a terminal color such as `ansi_blue`."""
    return Style(color=Color.parse(variables[name]).rich_color)


def restore_theme(app: App[Any], settings: Settings, use_code_theme: Callable[[str], None]) -> None:
    """Use the theme from the settings, and store the user's choice from now on.

    `use_code_theme` is called with the matching Pygments style, now and whenever the theme changes.
    """

    def store(name: str) -> None:
        try:
            settings.change(THEME, lambda _: name)
        except LlmEdgeError as error:
            app.call_from_thread(notify, app, str(error), "warning")

    current = ""  # the theme that was restored or chosen last

    def changed(theme: Theme) -> None:
        nonlocal current
        if theme.name == current:  # restored, rather than chosen
            return
        current = theme.name
        use_code_theme(code_theme(theme))
        app.run_worker(functools.partial(store, theme.name), thread=True, group="theme")

    for theme in (DARK, LIGHT, HIGH_CONTRAST):
        app.register_theme(theme)
    app.theme = DARK.name
    chosen = settings.get(THEME)
    if chosen in app.available_themes:
        app.theme = chosen
    elif chosen:
        notify(app, f"{settings.path}: unknown theme {chosen!r}. Press Ctrl-P and choose Theme.", "warning")
    current = app.theme
    use_code_theme(code_theme(app.current_theme))
    app.theme_changed_signal.subscribe(app, changed)
