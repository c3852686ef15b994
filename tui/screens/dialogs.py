"""Modal dialogs: a prompt for one line of text, and a confirmation."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import ModalScreen
from textual.widgets import Button, Input, Static

from llm_edge.chat.text import printable
from llm_edge.tui.widgets.inputs import SafeInput


class TextPrompt(ModalScreen[str | None]):
    """Asks for a line of text; dismissed with it, or with None if cancelled.

    Args:
        error: what is wrong with the initial text.
        check: returns what is wrong with a text, or None; by default, the text must not be empty.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "cancel", "Cancel")]

    def __init__(
        self,
        question: str,
        text: str = "",
        *,
        accept: str = "OK",
        help_text: str = "",
        placeholder: str = "",
        error: str = "",
        check: Callable[[str], str | None] | None = None,
    ) -> None:
        super().__init__()
        self._question, self._text = printable(question), printable(text)
        self._accept, self._help_text, self._placeholder = accept, printable(help_text), printable(placeholder)
        self._error = error
        self._check = check or (lambda text: None if text else "Enter a text, or press Esc.")

    def compose(self) -> ComposeResult:
        with Vertical():
            yield Static(self._question, classes="question", markup=False)
            if self._help_text:
                yield Static(self._help_text, classes="help", markup=False)
            yield SafeInput(self._text, placeholder=self._placeholder, select_on_focus=False)
            yield Static("", classes="error", markup=False)
            with Horizontal():
                yield Button(self._accept, variant="primary", id="accept", compact=True)
                yield Button("Cancel", id="cancel", compact=True)

    def on_mount(self) -> None:
        field = self.query_one(SafeInput)
        field.focus()
        field.cursor_position = len(field.value)
        self._show_error(self._error)

    def on_input_changed(self, event: Input.Changed) -> None:
        """Hide the error, which may not apply to the new text."""
        if event.value != self._text:
            self._show_error("")

    @on(Input.Submitted)
    @on(Button.Pressed, "#accept")
    def accept(self) -> None:
        """Check the text and close the dialog."""
        text = self.query_one(SafeInput).value.strip()
        error = self._check(text)
        if error:
            self._show_error(error)
            self.query_one(SafeInput).focus()
        else:
            self.dismiss(text)

    @on(Button.Pressed, "#cancel")
    def action_cancel(self) -> None:
        self.dismiss(None)

    def _show_error(self, error: str) -> None:
        line = self.query_one(".error", Static)
        line.update(printable(error))
        line.display = bool(error)


class ConfirmDialog(ModalScreen[bool]):
    """Asks for a confirmation; dismissed with whether it was given."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,n", "dismiss(False)", "No"),
        Binding("y", "dismiss(True)", "Yes"),
        Binding("left,right", "app.focus_next", "Other button", show=False),
    ]

    def __init__(self, question: str, accept: str = "Yes") -> None:
        super().__init__()
        self._question, self._accept = printable(question), accept

    def compose(self) -> ComposeResult:
        with Vertical():
            yield Static(self._question, classes="question", markup=False)
            with Horizontal():
                yield Button("Cancel", id="cancel", compact=True)
                yield Button(self._accept, variant="error", id="accept", compact=True)

    def on_mount(self) -> None:
        """Focus the safe answer."""
        self.query_one("#cancel").focus()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        self.dismiss(event.button.id == "accept")
