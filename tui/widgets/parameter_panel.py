"""The side panel of parameters, with the presets above them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container, Horizontal, Vertical, VerticalScroll
from textual.content import Content
from textual.message import Message as Event
from textual.widgets import Button, Input, Select, Static

from llm_edge.chat.parameters import EDITABLE, ChatParameters
from llm_edge.chat.presets import MODEL_DEFAULTS, Presets
from llm_edge.chat.text import printable
from llm_edge.runtime.errors import LlmEdgeError, ParameterError
from llm_edge.runtime.sampling.parameter_spec import ParameterSpec
from llm_edge.tui.notifications import notify
from llm_edge.tui.widgets.inputs import SafeInput
from llm_edge.tui.widgets.parameter_fields import (
    FieldLeft,
    ParameterChanged,
    ParameterEditor,
    ParameterFocused,
    TextField,
    ValueField,
    editor_of,
)

_MORE_FROM = 100  # the `order` from which parameters are listed under "More"


class PresetNameInput(SafeInput):
    """The name of a preset to save."""

    BINDINGS: ClassVar[list[BindingType]] = [Binding("escape", "screen.focus_previous", "Cancel")]


class ParameterPanel(Vertical):
    """Presets and parameters; each change is requested with `ParameterChanged`, whose handler calls `apply`.

    `presets` = None offers none.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+z", "undo", "Undo"),
        Binding("ctrl+s", "save", "Save preset", show=False),
        Binding("escape", "close", "Close"),
    ]

    class CloseRequested(Event):
        """Esc was pressed in the panel."""

    def __init__(self, parameters: ChatParameters, presets: Presets | None = None, model: str = "") -> None:
        super().__init__(id="parameters")
        self._parameters, self._presets, self._model = parameters, presets, model
        self._offered: list[str] = []
        self._unsupported: frozenset[str] = frozenset()
        self._editors: list[ParameterEditor] = []  # created when the panel is opened, to start quickly
        self._undo: list[dict[str, Any]] = []  # values before each change

    def compose(self) -> ComposeResult:
        yield Static("Parameters", classes="panel-title", markup=False)
        with Container(id="preset-line"):
            yield Select[str]([], prompt="Custom", id="presets", compact=True)
            with Horizontal(id="preset-buttons"):
                yield Button("Reset", id="reset", compact=True, tooltip="Reset all to the model's defaults")
                yield Button("Save as", id="save-preset", compact=True, tooltip="Save as a preset (Ctrl-S)")
                yield Button("Delete", id="delete-preset", compact=True, tooltip="Delete this preset")
        yield PresetNameInput(placeholder="Preset name, then ⏎", id="preset-name", compact=True)
        yield Static("", id="error-presets", classes="parameter-error", markup=False)
        yield VerticalScroll(id="parameter-list", can_focus=False)
        yield Static("", id="parameter-help", markup=False)

    def on_mount(self) -> None:
        """Hide what is not needed yet, and show the values."""
        self.query_one("#error-presets").display = False
        self.query_one(PresetNameInput).display = False
        self.show()

    def use(self, parameters: ChatParameters, model: str, unsupported: frozenset[str] = frozenset()) -> None:
        """Show the parameters and presets of a model, without the parameters that it does not take."""
        self._parameters, self._model, self._unsupported = parameters, model, unsupported
        self._undo.clear()
        self.show()

    async def open(self) -> None:
        """Show the panel and focus the first parameter."""
        self.add_class("open")
        if not self._editors:
            self._editors = [editor_of(spec, printable(self._parameters.text(spec.name))) for spec in EDITABLE.values()]
            common = [editor for editor in self._editors if editor.spec.order < _MORE_FROM]
            more = [editor for editor in self._editors if editor.spec.order >= _MORE_FROM]
            more_title = Static("More", classes="panel-title", markup=False)
            await self.query_one("#parameter-list").mount_all([*common, more_title, *more])
            self.show()
        self.query(ValueField).first().focus()

    def show(self) -> None:
        """Show the current values, and mark those that differ from the model's defaults."""
        for editor in self._editors:
            editor.display = editor.spec.name not in self._unsupported
            if editor.show(self._parameters):
                self.show_error(editor.spec, None)
        self._show_presets()

    def apply(self, event: ParameterChanged, apply_change: Callable[[Callable[[ChatParameters], None]], None]) -> None:
        """Make a requested change with `apply_change`, and show the new values or the error."""
        before = dict(self._parameters.changed)
        try:
            apply_change(event.change)
        except ParameterError as error:
            self.show_error(event.spec, error)
            if event.spec is None:
                self.show()  # deselects the preset that could not be used
        else:
            if before != self._parameters.changed and not event.undoes:
                self._undo.append(before)
            self.show_error(event.spec, None)
            self.show()

    def show_error(self, spec: ParameterSpec | None, error: LlmEdgeError | None) -> None:
        """Show an error under a parameter, or under the presets for None; no error hides the line."""
        id_ = f"error-{spec.name if spec is not None else 'presets'}"
        lines = self.query(f"#{id_}").results(Static)
        line = next(iter(lines), None)
        if line is None:
            editor = next((each for each in self._editors if each.spec is spec), None)
            if error is None or editor is None:
                return
            line = Static("", id=id_, classes="parameter-error", markup=False)
            self.query_one("#parameter-list").mount(line, after=editor)
        line.update(printable(str(error)) if error is not None else "")
        line.display = error is not None

    def action_close(self) -> None:
        self.post_message(self.CloseRequested())

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
                select.set_options([(_label(name, help_text), name) for name, help_text in offered.items()])
            matching = self._presets.matching(self._model, self._parameters)
            if matching is None:
                select.clear()
            else:
                select.value = matching
        self.query_one("#delete-preset", Button).disabled = matching not in self._presets.own(self._model)

    def on_select_changed(self, event: Select.Changed) -> None:
        event.stop()
        name, presets, model = event.value, self._presets, self._model
        if isinstance(name, str) and presets is not None:
            self.post_message(ParameterChanged(lambda parameters: presets.apply(model, name, parameters)))
        else:
            self._show_presets()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        event.stop()
        if event.button.id == "reset":
            self.action_reset()
        elif event.button.id == "save-preset":
            self.action_save()
        else:
            self._delete()

    def on_parameter_focused(self, event: ParameterFocused) -> None:
        """Show what the focused parameter does."""
        event.stop()
        self.query_one("#parameter-help", Static).update(
            f"{event.spec.help[0].upper()}{event.spec.help[1:]}.", layout=False
        )

    def on_field_left(self, event: FieldLeft) -> None:
        """Focus the parameter before or after a field."""
        event.stop()
        fields = [editor.field for editor in self._editors if editor.display]
        place = fields.index(event.field) + event.step if event.field in fields else 0
        if 0 <= place < len(fields):
            fields[place].focus()
        elif place < 0:
            self.query_one("#presets").focus()

    def action_undo(self) -> None:
        """Undo the latest change."""
        if not self._undo:
            notify(self, "Nothing to undo.")
            return
        values = self._undo.pop()
        self.post_message(ParameterChanged(lambda parameters: parameters.load(values), undoes=True))

    def action_reset(self) -> None:
        self.post_message(ParameterChanged(lambda parameters: parameters.load({})))

    def action_save(self) -> None:
        """Ask for the name of a new preset."""
        if self._presets is None:
            return
        name = self.query_one(PresetNameInput)
        chosen = self.query_one("#presets", Select).value
        name.value = chosen if isinstance(chosen, str) and chosen in self._presets.own(self._model) else ""
        name.display = True
        name.focus()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        if not isinstance(event.input, PresetNameInput) or self._presets is None:
            return
        event.stop()
        try:
            saved = self._presets.save(self._model, event.value, self._parameters)
        except LlmEdgeError as error:
            self.show_error(None, error)
            return
        self.show_error(None, None)
        self.query_one("#presets").focus()
        self._show_presets()
        notify(self, f"Saved preset {saved} for {self._model}.")

    def on_descendant_blur(self, event: events.DescendantBlur) -> None:
        """Leaving the name cancels saving."""
        if isinstance(event.widget, PresetNameInput):
            event.widget.display = False
            self.show_error(None, None)

    def _delete(self) -> None:
        chosen = self.query_one("#presets", Select).value
        if self._presets is None or not isinstance(chosen, str):
            return
        try:
            self._presets.delete(self._model, chosen)
        except LlmEdgeError as error:
            self.show_error(None, error)
            return
        self._show_presets()
        notify(self, f"Deleted preset {chosen}. Its values stay in use.")

    def on_text_field_refused(self, event: TextField.Refused) -> None:
        event.stop()
        self.show_error(event.spec, event.error)


def _label(name: str, help_text: str) -> Content:
    content = Content(printable(name))
    return content if name == MODEL_DEFAULTS or not help_text else content + Content(f"  {help_text}").stylize("dim")
