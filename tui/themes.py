"""A theme of high contrast, and the colours of code that suit a theme."""

from __future__ import annotations

from textual.theme import Theme

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

_CODE = {"gruvbox": "gruvbox-dark", "nord": "nord", "dracula": "dracula", "solarized-light": "solarized-light"}


def code_theme(theme: Theme) -> str:
    """A style of Pygments."""
    if theme.name == HIGH_CONTRAST.name:
        return "github-dark"
    return _CODE.get(theme.name, "monokai" if theme.dark else "tango")
