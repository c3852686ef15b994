"""Small questions in front of everything else: one line of text, or yes and no. Know nothing of what follows."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from textual import events, on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, Vertical
from textual.screen import ModalScreen
from textual.widgets import Button, Input, Static

from llm_edge.chat.text import printable

_CSS = """
{name} {{ align: center middle; }}
{name} > Vertical {{
    width: 72; max-width: 96%; height: auto; max-height: 96%;
    padding: 1 2; background: $surface; border: round $accent;
}}
{name} .question {{ text-style: bold; width: 1fr; height: auto; }}
{name} .help {{ color: $text-muted; width: 1fr; height: auto; }}
{name} .refusal {{ color: $text-error; width: 1fr; height: auto; }}
{name} Input {{ margin: 1 0 0 0; }}
{name} Horizontal {{ height: auto; margin: 1 0 0 0; }}
{name} Button {{ margin: 0 2 0 0; }}
"""


class Line(Input):
    """One line of text, into which nothing can be pasted that a terminal would obey."""

    def _on_paste(self, event: events.Paste) -> None:
        event.text = printable(event.text)  # Textual calls the one of Input behind this one


class AskText(ModalScreen[str | None]):
    """Asks for a line; dismissed with it, or with None.

    Args:
        question: what is asked.
        text: what stands there to begin with.
        accept: what the button says.
        help_text: a line below the question.
        placeholder: what stands there while nothing does.
        refusal: why the text that stands there could not be.
        check: says why a text cannot be, or nothing where it can. It must be quick.
    """

    DEFAULT_CSS = _CSS.format(name="AskText")
    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "leave", "Cancel")]

    def __init__(
        self,
        question: str,
        text: str = "",
        *,
        accept: str = "OK",
        help_text: str = "",
        placeholder: str = "",
        refusal: str = "",
        check: Callable[[str], str | None] | None = None,
    ) -> None:
        super().__init__()
        self._question, self._text = printable(question), printable(text)
        self._accept, self._help_text, self._placeholder = accept, printable(help_text), printable(placeholder)
        self._refusal = refusal
        self._check = check or (lambda text: None if text else "Write something, or press Esc.")

    def compose(self) -> ComposeResult:
        """Question, line and buttons."""
        with Vertical():
            yield Static(self._question, classes="question", markup=False)
            if self._help_text:
                yield Static(self._help_text, classes="help", markup=False)
            yield Line(self._text, placeholder=self._placeholder, select_on_focus=False)
            yield Static("", classes="refusal", markup=False)
            with Horizontal():
                yield Button(self._accept, variant="primary", id="accept", compact=True)
                yield Button("Cancel", id="cancel", compact=True)

    def on_mount(self) -> None:
        """Write at once."""
        line = self.query_one(Line)
        line.focus()
        line.cursor_position = len(line.value)
        self._refuse(self._refusal)

    def on_input_changed(self, event: Input.Changed) -> None:
        """What was wrong may be right now."""
        if event.value != self._text:
            self._refuse("")

    @on(Input.Submitted)
    @on(Button.Pressed, "#accept")
    def take(self) -> None:
        """The line is meant so."""
        text = self.query_one(Line).value.strip()
        refusal = self._check(text)
        if refusal:
            self._refuse(refusal)
            self.query_one(Line).focus()
        else:
            self.dismiss(text)

    @on(Button.Pressed, "#cancel")
    def action_leave(self) -> None:
        """No answer."""
        self.dismiss(None)

    def _refuse(self, why: str) -> None:
        refusal = self.query_one(".refusal", Static)
        refusal.update(printable(why))
        refusal.display = bool(why)


class AskYesNo(ModalScreen[bool]):
    """Asks whether something is to be done; dismissed with the answer. Nothing is done by leaving.

    Args:
        question: what is asked.
        yes: what the button says that does it.
        help_text: a line below the question.
    """

    DEFAULT_CSS = _CSS.format(name="AskYesNo")
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("escape,n", "answer(False)", "No"),
        Binding("y", "answer(True)", "Yes"),
        Binding("left,right", "app.focus_next", "Other", show=False),
    ]

    def __init__(self, question: str, yes: str = "Yes", *, help_text: str = "") -> None:
        super().__init__()
        self._question, self._yes, self._help_text = printable(question), yes, printable(help_text)

    def compose(self) -> ComposeResult:
        """Question and buttons."""
        with Vertical():
            yield Static(self._question, classes="question", markup=False)
            if self._help_text:
                yield Static(self._help_text, classes="help", markup=False)
            with Horizontal():
                yield Button("Cancel", id="cancel", compact=True)
                yield Button(self._yes, variant="error", id="accept", compact=True)

    def on_mount(self) -> None:
        """The harmless answer is the one at hand."""
        self.query_one("#cancel").focus()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """Either of them."""
        self.dismiss(event.button.id == "accept")

    def action_answer(self, answer: bool) -> None:
        """By a key."""
        self.dismiss(answer)
