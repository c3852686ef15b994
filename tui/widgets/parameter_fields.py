"""Editors for single parameters, by keys, mouse and typing; each change is requested with `ParameterChanged`."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from textual import events, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.message import Message as Event
from textual.widgets import Input, Static, TextArea

from llm_edge.chat.parameters import ChatParameters
from llm_edge.chat.text import printable
from llm_edge.runtime.errors import LlmEdgeError
from llm_edge.runtime.sampling.constraint import Constraint
from llm_edge.runtime.sampling.parameter_spec import ParameterSpec
from llm_edge.tui.widgets.inputs import SafeInput, SafeTextArea

_TEXT_KINDS = ("strings", "text")  # edited on several lines
_SCHEMA = "json_schema"


class ParameterChanged(Event):
    """The user asked for a change; the handler applies it.

    Attributes:
        change: makes the change; raises ParameterError if a value is not allowed.
        spec: the parameter that changes; None for several.
    """

    def __init__(self, change: Callable[[ChatParameters], None], spec: ParameterSpec | None = None) -> None:
        super().__init__()
        self.change, self.spec = change, spec


def step_change(spec: ParameterSpec, steps: int) -> ParameterChanged:
    """A change by a number of steps."""
    return ParameterChanged(lambda parameters: parameters.step(spec.name, steps), spec)


def text_change(spec: ParameterSpec, text: str) -> ParameterChanged:
    """A change to what was typed."""
    return ParameterChanged(lambda parameters: parameters.set_text(spec.name, text), spec)


class ValueField(SafeInput):
    """A value on one line: a number, or on and off."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "step(1)", "Raise", key_display="↑"),
        Binding("down", "step(-1)", "Lower", key_display="↓"),
        Binding("pageup", "step(5)", "Raise by 5 steps", show=False),
        Binding("pagedown", "step(-5)", "Lower by 5 steps", show=False),
    ]

    def __init__(self, spec: ParameterSpec, text: str) -> None:
        super().__init__(text, id=f"value-{spec.name}", compact=True, select_on_focus=True)
        self._spec = spec
        self._current = text

    def show(self, text: str) -> bool:
        """Show the current value; returns whether the field held another text."""
        differs, self._current = self.value != text, text
        if differs:
            self.value = text
        return differs

    def action_step(self, steps: int) -> None:
        self.post_message(step_change(self._spec, steps))

    def on_input_submitted(self, event: Input.Submitted) -> None:
        event.stop()
        self.post_message(text_change(self._spec, self.value))

    def on_blur(self) -> None:
        """Apply what was typed without Enter."""
        if self.value != self._current:
            self.post_message(text_change(self._spec, self.value))

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        """Increase the value of the focused field; otherwise scroll."""
        if self.has_focus:
            event.stop()
            self.action_step(1)

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        """Decrease the value of the focused field; otherwise scroll."""
        if self.has_focus:
            event.stop()
            self.action_step(-1)


class TextField(SafeTextArea):
    """A value of several lines, applied as it is typed; a JSON schema is applied once it is valid."""

    class Refused(Event):
        """The text is not a valid value."""

        def __init__(self, spec: ParameterSpec, error: LlmEdgeError) -> None:
            super().__init__()
            self.spec, self.error = spec, error

    class _SchemaChecked(Event):
        def __init__(self, text: str, error: LlmEdgeError | None) -> None:
            super().__init__()
            self.text, self.error = text, error

    def __init__(self, spec: ParameterSpec, text: str) -> None:
        super().__init__(text, id=f"value-{spec.name}", compact=True, tab_behavior="focus", highlight_cursor_line=False)
        self._spec = spec
        self._checking = False

    def show(self, text: str) -> bool:
        """Show the current value unless the user is typing; returns whether the field held another text."""
        if self.has_focus or self.text == text:
            return False
        with self.prevent(TextArea.Changed):
            self.load_text(text)
        return True

    def on_text_area_changed(self, event: TextArea.Changed) -> None:
        event.stop()
        if self._spec.name != _SCHEMA or self.text.strip() in ("", "{}"):
            self.post_message(text_change(self._spec, self.text))
        elif not self._checking:
            self._checking = True
            self._check_schema(self.text)

    @work(thread=True)
    def _check_schema(self, text: str) -> None:
        """Check a schema on a thread, since compiling it may take seconds."""
        error: LlmEdgeError | None = None
        try:
            Constraint.json_schema(text).check()
        except LlmEdgeError as found:
            error = found
        self.post_message(self._SchemaChecked(text, error))

    def on_text_field__schema_checked(self, event: TextField._SchemaChecked) -> None:
        """Apply a valid schema; check again if the text has changed meanwhile."""
        event.stop()
        self._checking = False
        if event.text != self.text:
            self.on_text_area_changed(TextArea.Changed(self))
        elif event.error:
            self.post_message(self.Refused(self._spec, event.error))
        else:
            self.post_message(text_change(self._spec, event.text))


class StepButton(Static):
    """An arrow that changes a value when clicked."""

    def __init__(self, spec: ParameterSpec, steps: int) -> None:
        super().__init__("▸" if steps > 0 else "◂", classes="step", markup=False)
        self._spec, self._steps = spec, steps

    def on_click(self) -> None:
        self.post_message(step_change(self._spec, self._steps))


class ParameterEditor(Vertical):
    """A parameter: its title, and the field below it."""

    def __init__(self, spec: ParameterSpec, field: ValueField | TextField) -> None:
        super().__init__(classes="parameter")
        self.spec = spec
        self._title, self._field = _title(spec), field

    def compose(self) -> ComposeResult:
        yield self._title
        yield self._field

    def show(self, parameters: ChatParameters) -> bool:
        """Show the current value; returns whether the field held another text."""
        self._title.set_class(self.spec.name in parameters.changed, "changed")
        return self._field.show(printable(parameters.text(self.spec.name)))


class ParameterLine(ParameterEditor):
    """A parameter on one line: title, arrows and value."""

    def compose(self) -> ComposeResult:
        yield self._title
        yield StepButton(self.spec, -1)
        yield self._field
        yield StepButton(self.spec, 1)


def editor_of(spec: ParameterSpec, text: str) -> ParameterEditor:
    """The editor for a parameter."""
    if spec.kind in _TEXT_KINDS:
        return ParameterEditor(spec, TextField(spec, text))
    return ParameterLine(spec, ValueField(spec, text))


def _title(spec: ParameterSpec) -> Static:
    title = Static(spec.title, id=f"title-{spec.name}", classes="parameter-title", markup=False)
    title.tooltip = spec.help
    return title
