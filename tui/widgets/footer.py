"""The footer: as many key hints as fit the width, each of them whole."""

from __future__ import annotations

from rich.cells import cell_len
from textual import events
from textual.app import ComposeResult
from textual.widgets import Footer
from textual.widgets._footer import FooterKey

_PALETTE_CLASS = "-command-palette"


class KeyFooter(Footer):
    """Textual's footer in its compact style, without the hints that would be cut off at the right edge."""

    def __init__(self, *, show_command_palette: bool = False) -> None:
        super().__init__(compact=True, show_command_palette=show_command_palette)

    def compose(self) -> ComposeResult:
        keys = [key for key in super().compose() if isinstance(key, FooterKey)]
        palette = [key for key in keys if key.has_class(_PALETTE_CLASS)]
        free = (self.size.width or self.app.size.width) - sum(map(_width, palette))
        for key in keys:
            if key not in palette:
                free -= _width(key)
                if free < -1:  # the gap after the last one may be missing
                    break
                yield key
        yield from palette

    def on_resize(self, event: events.Resize) -> None:  # noqa: ARG002 (Textual's)
        self.call_after_refresh(self.recompose)


def _width(key: FooterKey) -> int:
    """Columns of a hint and the gap after it."""
    return cell_len(key.key_display) + 1 + cell_len(key.description) + 1
