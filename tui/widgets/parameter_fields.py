"""Editors for single parameters, by keys, mouse and typing; each change is requested with `ParameterChanged`."""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from textual import events, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.message import Message as Event
from textual.widget import Widget
from textual.widgets import Input, Static, TextArea

from llm_edge.chat.parameters import ChatParameters
from llm_edge.chat.text import printable
from llm_edge.runtime.errors import LlmEdgeError
from llm_edge.runtime.sampling.constraint import Constraint
from llm_edge.runtime.sampling.parameter_spec import ParameterSpec
from llm_edge.tui.widgets.inputs import SafeInput, SafeTextArea

_TEXT_KINDS = ("strings", "text")  # edited on several lines
_SCHEMA = "json_schema"
# What can be typed into a field, as regular expressions; values that are off are cleared or stepped to.
_TYPED = {"float": r"-?\d*\.?\d*(e-?\d*)?", "int": r"-?\d*", "bool": "o|on|of|off"}


class ParameterChanged(Event):
    """The user asked for a change; the handler applies it.

    Attributes:
        change: makes the change; raises ParameterError if a value is not allowed.
        spec: the parameter that changes; None for several.
        undoes: whether it undoes another change.
    """

    def __init__(
        self, change: Callable[[ChatParameters], None], spec: ParameterSpec | None = None, *, undoes: bool = False
    ) -> None:
        super().__init__()
        self.change, self.spec, self.undoes = change, spec, undoes


def step_change(spec: ParameterSpec, steps: int) -> ParameterChanged:
    """A change by a number of steps."""
    return ParameterChanged(lambda parameters: parameters.step(spec.name, steps), spec)


def text_change(spec: ParameterSpec, text: str) -> ParameterChanged:
    """A change to what was typed."""
    return ParameterChanged(lambda parameters: parameters.set_text(spec.name, text), spec)


class ParameterFocused(Event):
    """A field was focused."""

    def __init__(self, spec: ParameterSpec) -> None:
        super().__init__()
        self.spec = spec


class FieldLeft(Event):
    """Up (-1) or Down (1) was pressed: the field before or after this one is to be focused."""

    def __init__(self, field: Widget, step: int) -> None:
        super().__init__()
        self.field, self.step = field, step


class ValueField(SafeInput):
    """A value on one line: a number, or on and off. Only what can be part of a value can be typed."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("left", "step(-1)", "Lower", key_display="←"),
        Binding("right", "step(1)", "Raise", key_display="→"),
        Binding("shift+left,ctrl+left", "step(-5)", "Lower by 5 steps", show=False),
        Binding("shift+right,ctrl+right", "step(5)", "Raise by 5 steps", show=False),
        Binding("up", "leave(-1)", "Previous parameter", show=False),
        Binding("down", "leave(1)", "Next parameter", show=False),
        Binding("space", "flip", "On/off", show=False),
    ]

    def __init__(self, spec: ParameterSpec, text: str) -> None:
        restrict = _TYPED.get(spec.kind)
        super().__init__(text, id=f"value-{spec.name}", compact=True, select_on_focus=True, restrict=restrict)
        self._spec = spec
        self._current = text

    def on_focus(self) -> None:
        self.post_message(ParameterFocused(self._spec))

    def action_leave(self, step: int) -> None:
        self.post_message(FieldLeft(self, step))

    def action_flip(self) -> None:
        """Turn a value that is on or off into the other one."""
        if self._spec.kind == "bool":
            self.action_step(-1 if self._current == "on" else 1)

    def show(self, text: str) -> bool:
        """Show the current value; returns whether the field held another text."""
        differs, self._current = self.value != text, text
        if differs:
            self.value = text
            if self.has_focus:
                self.select_all()  # so that a typed number replaces it
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

    def on_focus(self) -> None:
        self.post_message(ParameterFocused(self._spec))

    def action_cursor_up(self, select: bool = False) -> None:
        """Move up; from the first line, to the parameter before."""
        if self.cursor_location[0] == 0 and not select:
            self.post_message(FieldLeft(self, -1))
        else:
            super().action_cursor_up(select)

    def action_cursor_down(self, select: bool = False) -> None:
        """Move down; from the last line, to the parameter after it."""
        if self.cursor_location[0] == self.document.line_count - 1 and not select:
            self.post_message(FieldLeft(self, 1))
        else:
            super().action_cursor_down(select)

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
        self.spec, self.field = spec, field
        self._title = _title(spec)

    def compose(self) -> ComposeResult:
        yield self._title
        yield self.field

    def show(self, parameters: ChatParameters) -> bool:
        """Show the current value; returns whether the field held another text."""
        self._title.set_class(self.spec.name in parameters.changed, "changed")
        return self.field.show(printable(parameters.text(self.spec.name)))


class ParameterLine(ParameterEditor):
    """A parameter on one line: title, arrows and value."""

    def compose(self) -> ComposeResult:
        yield self._title
        yield StepButton(self.spec, -1)
        yield self.field
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
