"""The panel of parameters: each a line that keys, the mouse and typing can turn, also while an answer comes.

It requests changes by posting `ParameterChanged`, whose handler calls `show`, or `refuse` with the reason.
Presets are read, saved and deleted here.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import ClassVar

from textual import events, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.content import Content
from textual.message import Message as Event
from textual.widgets import Button, Input, Select, Static, TextArea

from llm_edge.chat.parameters import EDITABLE, ChatParameters
from llm_edge.chat.presets import MODEL_DEFAULTS, Presets
from llm_edge.chat.text import printable
from llm_edge.runtime.errors import LlmEdgeError, ParameterError
from llm_edge.runtime.sampling.constraint import Constraint
from llm_edge.runtime.sampling.parameter_spec import ParameterSpec

_LONG = ("strings", "text")
_SCHEMA = "json_schema"


class ParameterChanged(Event):
    """Something is to be turned.

    Attributes:
        change: what turns it; raises ParameterError where that cannot be.
        parameter: which parameter, if it is one alone.
    """

    def __init__(self, change: Callable[[ChatParameters], None], parameter: ParameterSpec | None = None) -> None:
        super().__init__()
        self.change, self.parameter = change, parameter


def by_steps(parameter: ParameterSpec, steps: int) -> ParameterChanged:
    """A parameter is to be turned by so many steps."""
    return ParameterChanged(lambda parameters: parameters.step(parameter.name, steps), parameter)


def typed(parameter: ParameterSpec, text: str) -> ParameterChanged:
    """A parameter is to be turned to what was typed."""
    return ParameterChanged(lambda parameters: parameters.set_text(parameter.name, text), parameter)


class NumberField(Input):
    """A value on one line; up and down turn it."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("up", "turn(1)", "More", key_display="↑"),
        Binding("down", "turn(-1)", "Less", key_display="↓"),
        Binding("pageup", "turn(5)", "Much more", show=False),
        Binding("pagedown", "turn(-5)", "Much less", show=False),
    ]

    def __init__(self, parameter: ParameterSpec, text: str) -> None:
        super().__init__(text, id=f"value-{parameter.name}", compact=True, select_on_focus=True)
        self._knob = parameter
        self._shown = text

    def put(self, text: str) -> bool:
        """Show a value; says whether another one stood here."""
        differs, self._shown = self.value != text, text
        if differs:
            self.value = text
        return differs

    def action_turn(self, steps: int) -> None:
        """By so many steps."""
        self.post_message(by_steps(self._knob, steps))

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """What was typed counts from now on."""
        event.stop()
        self.post_message(typed(self._knob, self.value))

    def on_blur(self) -> None:
        """Also where one just leaves."""
        if self.value != self._shown:
            self.post_message(typed(self._knob, self.value))

    def on_mouse_scroll_up(self, event: events.MouseScrollUp) -> None:
        """The wheel turns what has the focus."""
        if self.has_focus:
            event.stop()
            self.action_turn(1)

    def on_mouse_scroll_down(self, event: events.MouseScrollDown) -> None:
        """As above."""
        if self.has_focus:
            event.stop()
            self.action_turn(-1)

    def _on_paste(self, event: events.Paste) -> None:
        event.text = printable(event.text)  # Textual calls the one of Input behind this one


class Text(TextArea):
    """A value of several lines, which counts as soon as it can be used; a schema once it can be followed."""

    class Refused(Event):
        """What stands here cannot be used."""

        def __init__(self, parameter: ParameterSpec, error: LlmEdgeError) -> None:
            super().__init__()
            self.parameter, self.error = parameter, error

    class _Checked(Event):
        def __init__(self, text: str, error: LlmEdgeError | None) -> None:
            super().__init__()
            self.text, self.error = text, error

    def __init__(self, parameter: ParameterSpec, text: str) -> None:
        super().__init__(
            text, id=f"value-{parameter.name}", compact=True, tab_behavior="focus", highlight_cursor_line=False
        )
        self._knob = parameter
        self._checking = False

    def put(self, text: str) -> bool:
        """Show a value, unless somebody writes here; says whether another one stood here."""
        if self.has_focus or self.text == text:
            return False
        with self.prevent(TextArea.Changed):
            self.load_text(text)
        return True

    def on_text_area_changed(self, event: TextArea.Changed) -> None:
        """What was typed counts from now on."""
        event.stop()
        if self._knob.name != _SCHEMA or self.text.strip() in ("", "{}"):
            self.post_message(typed(self._knob, self.text))
        elif not self._checking:
            self._checking = True
            self._check(self.text)

    @work(thread=True)
    def _check(self, text: str) -> None:
        """A schema takes its time, up to some seconds."""
        error: LlmEdgeError | None = None
        try:
            Constraint.json_schema(text).check()
        except LlmEdgeError as found:
            error = found
        self.post_message(self._Checked(text, error))

    def on_text__checked(self, event: Text._Checked) -> None:
        """One that can be followed counts; where more was typed meanwhile, that is looked at next."""
        event.stop()
        self._checking = False
        if event.text != self.text:
            self.on_text_area_changed(TextArea.Changed(self))
        else:
            self.post_message(self.Refused(self._knob, event.error) if event.error else typed(self._knob, event.text))

    async def _on_paste(self, event: events.Paste) -> None:
        event.text = printable(event.text.replace("\r\n", "\n").replace("\r", "\n"))  # Textual goes on from there


class StepButton(Static):
    """An arrow for the mouse."""

    def __init__(self, parameter: ParameterSpec, steps: int) -> None:
        super().__init__("▸" if steps > 0 else "◂", classes="turn", markup=False)
        self._knob, self._steps = parameter, steps

    def on_click(self) -> None:
        """Turn."""
        self.post_message(by_steps(self._knob, self._steps))


class ParameterLine(Horizontal):
    """A parameter with one value: title, arrows, value."""

    def __init__(self, parameter: ParameterSpec, text: str) -> None:
        super().__init__(classes="parameter")
        self._knob, self._text = parameter, text

    def compose(self) -> ComposeResult:
        """The parts."""
        yield _title(self._knob)
        yield StepButton(self._knob, -1)
        yield NumberField(self._knob, self._text)
        yield StepButton(self._knob, 1)

    def show(self, parameters: ChatParameters) -> bool:
        """The value of now; says whether another one stood here."""
        self.query_one(".parameter-title").set_class(self._knob.name in parameters.changed, "turned")
        return self.query_one(NumberField).put(printable(parameters.text(self._knob.name)))


class Name(Input):
    """The name for a preset that is about to be saved."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "screen.focus_previous", "Cancel")]

    def _on_paste(self, event: events.Paste) -> None:
        event.text = printable(event.text)  # Textual calls the one of Input behind this one


class ParameterPanel(VerticalScroll, can_focus=False):
    """All parameters, presets above them.

    Args:
        parameters: whose values show.
        presets: a person's own are among them; None = there are none to choose.
        model: whose presets.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+z", "reset", "Model's own", show=False),
        Binding("ctrl+s", "save", "Save preset", show=False),
        Binding("escape", "app.controls", "Close"),
    ]

    def __init__(self, parameters: ChatParameters, presets: Presets | None = None, model: str = "") -> None:
        super().__init__(id="controls")
        self._parameters, self._presets, self._model = parameters, presets, model
        self._offered: list[str] = []

    def compose(self) -> ComposeResult:
        """A line a parameter."""
        yield Static("Parameters", classes="panel-title", markup=False)
        yield Select[str]([], prompt="your own mixture", id="presets", compact=True)
        with Horizontal(id="control-buttons"):
            yield Button("Reset", id="reset", compact=True, tooltip="All to the model's own values (Ctrl-Z)")
            yield Button("Save as", id="save-preset", compact=True, tooltip="Keep these values under a name (Ctrl-S)")
            yield Button("Delete", id="delete-preset", compact=True, tooltip="Forget this preset of yours")
        yield Name(placeholder="name of the preset, ⏎", id="preset-name", compact=True)
        yield Static("", id="error-presets", classes="parameter-error", markup=False)
        for parameter in EDITABLE.values():
            text = printable(self._parameters.text(parameter.name))
            if parameter.kind in _LONG:
                yield _title(parameter)
                yield Text(parameter, text)
            else:
                yield ParameterLine(parameter, text)
            yield Static("", id=f"error-{parameter.name}", classes="parameter-error", markup=False)

    def on_mount(self) -> None:
        """No errors so far."""
        for line in self.query(".parameter-error"):
            line.display = False
        self.query_one(Name).display = False
        self.show()

    def use(self, parameters: ChatParameters, model: str | None = None) -> None:
        """Show these, of this model or the one before."""
        self._parameters = parameters
        self._model = self._model if model is None else model
        self.show()

    def show(self) -> None:
        """The values of now; what is not the model's own value is marked."""
        for line, parameter in zip(
            self.query(ParameterLine), (each for each in EDITABLE.values() if each.kind not in _LONG), strict=True
        ):
            if line.show(self._parameters):
                self.refuse(parameter, None)
        for parameter in EDITABLE.values():
            if parameter.kind in _LONG:
                self.query_one(f"#title-{parameter.name}").set_class(
                    parameter.name in self._parameters.changed, "turned"
                )
                if self.query_one(f"#value-{parameter.name}", Text).put(
                    printable(self._parameters.text(parameter.name))
                ):
                    self.refuse(parameter, None)
        self._show_presets()

    def refuse(self, parameter: ParameterSpec | None, error: LlmEdgeError | None) -> None:
        """Why a value cannot be, under its parameter; of None, why a preset cannot. Without an error, nothing."""
        line = self.query_one(f"#error-{parameter.name if parameter is not None else 'presets'}", Static)
        line.update(printable(str(error)) if error is not None else "")
        line.display = error is not None

    # ---- presets

    def _show_presets(self) -> None:
        select = self.query_one("#presets", Select)
        select.display = self._presets is not None
        for button in ("#save-preset", "#delete-preset"):
            self.query_one(button).display = self._presets is not None
        if self._presets is None:
            return
        offered = self._presets.offered(self._model)
        with select.prevent(Select.Changed):
            if list(offered) != self._offered:
                self._offered = list(offered)
                select.set_options([(_offer(name, help_), name) for name, help_ in offered.items()])
            matching = self._presets.matching(self._model, self._parameters)
            if matching is None:
                select.clear()
            else:
                select.value = matching
        self.query_one("#delete-preset", Button).disabled = matching not in self._presets.own(self._model)

    def on_select_changed(self, event: Select.Changed) -> None:
        """A preset was chosen."""
        event.stop()
        name, presets, model = event.value, self._presets, self._model
        if isinstance(name, str) and presets is not None:
            self.post_message(ParameterChanged(lambda parameters: presets.apply(model, name, parameters)))
        else:
            self._show_presets()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """The buttons."""
        event.stop()
        if event.button.id == "reset":
            self.action_reset()
        elif event.button.id == "save-preset":
            self.action_save()
        else:
            self._delete()

    def action_reset(self) -> None:
        """All is to be the model's own."""
        self.post_message(ParameterChanged(lambda parameters: parameters.load({})))

    def action_save(self) -> None:
        """Ask for a name."""
        if self._presets is None:
            return
        name = self.query_one(Name)
        chosen = self.query_one("#presets", Select).value
        name.value = chosen if isinstance(chosen, str) and chosen in self._presets.own(self._model) else ""
        name.display = True
        name.focus()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """The name."""
        if not isinstance(event.input, Name) or self._presets is None:
            return
        event.stop()
        try:
            saved = self._presets.save(self._model, event.value, self._parameters)
        except LlmEdgeError as error:
            self.refuse(None, error)
            return
        self.refuse(None, None)
        self.query_one("#presets").focus()
        self._show_presets()
        self.notify(printable(f"Saved as {saved}, for {self._model}."), markup=False)

    def on_descendant_blur(self, event: events.DescendantBlur) -> None:
        """Who leaves the name saves nothing."""
        if isinstance(event.widget, Name):
            event.widget.display = False
            self.refuse(None, None)

    def _delete(self) -> None:
        chosen = self.query_one("#presets", Select).value
        if self._presets is None or not isinstance(chosen, str):
            return
        try:
            self._presets.delete(self._model, chosen)
        except LlmEdgeError as error:
            self.refuse(None, error)
            return
        self._show_presets()
        self.notify(printable(f"Deleted {chosen}. Its values are in force still: Save as keeps them."), markup=False)

    def on_text_refused(self, event: Text.Refused) -> None:
        """A schema that cannot be followed."""
        event.stop()
        self.refuse(event.parameter, event.error)


def apply_change(
    event: ParameterChanged, controls: ParameterPanel, session_turn: Callable[[Callable[[ChatParameters], None]], None]
) -> None:
    """Do what a `ParameterChanged` asks for, and show what came of it."""
    try:
        session_turn(event.change)
    except ParameterError as error:
        controls.refuse(event.parameter, error)
        if event.parameter is None:
            controls.show()  # the preset that was chosen is not in force
    else:
        controls.refuse(event.parameter, None)
        controls.show()


def _title(parameter: ParameterSpec) -> Static:
    title = Static(parameter.title, id=f"title-{parameter.name}", classes="parameter-title", markup=False)
    title.tooltip = parameter.help
    return title


def _offer(name: str, help_: str) -> Content:
    content = Content(printable(name))
    return content if name == MODEL_DEFAULTS or not help_ else content + Content(f"  {help_}").stylize("dim")
