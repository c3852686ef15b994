"""A theme of high contrast, what is drawn in a theme's colours, and the colours of code that suit it."""

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

_CODE = {"gruvbox": "gruvbox-dark", "nord": "nord", "dracula": "dracula"}


def code_theme(theme: Theme) -> str:
    """A style of Pygments."""
    if theme.name == HIGH_CONTRAST.name:
        return "github-dark"
    return _CODE.get(theme.name, "monokai" if theme.dark else "tango")


def coloured(variables: Mapping[str, str], name: str) -> Style:
    """A style of one of a theme's colours, which may be one of the terminal's own as `ansi_blue`."""
    return Style(color=Color.parse(variables[name]).rich_color)


def begin_theme(
    app: App[Any], settings: Settings, use_code_theme: Callable[[str], None], warn: Callable[[str], None]
) -> None:
    """Use the theme that was chosen the last time, if one was, and keep what is chosen from now on.

    Args:
        app: whose theme it is.
        settings: where it is kept.
        use_code_theme: told the style of Pygments that suits a theme.
        warn: told what is wrong.
    """

    def keep(name: str) -> None:
        try:
            settings.change(THEME, lambda _: name)
        except LlmEdgeError as error:
            app.call_from_thread(warn, str(error))

    def use(theme: Theme) -> None:
        use_code_theme(code_theme(theme))
        app.run_worker(functools.partial(keep, theme.name), thread=True, group="theme")

    app.register_theme(HIGH_CONTRAST)
    chosen = settings.get(THEME)
    if chosen in app.available_themes:
        app.theme = chosen
    elif chosen:
        warn(f"{settings.path}: there is no theme {chosen!r}: choose one (Ctrl-P, Theme)")
    use_code_theme(code_theme(app.current_theme))
    app.theme_changed_signal.subscribe(app, use)
