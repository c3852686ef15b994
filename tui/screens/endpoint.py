"""The form that connects to an OpenAI-compatible endpoint; it never shows the API key."""

from __future__ import annotations

from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Button, Input, OptionList, Select, Static
from textual.widgets.option_list import Option
from textual.worker import get_current_worker

from llm_edge.chat.endpoint import key as endpoint_key
from llm_edge.chat.endpoint.client import Endpoint, base_url, environment_keys, list_models, warning
from llm_edge.chat.text import printable
from llm_edge.runtime.errors import InputError, LlmEdgeError
from llm_edge.tui.widgets.footer import KeyFooter

_NONE, _ENVIRONMENT, _KEYRING = "none", "environment", "keyring"


class EndpointScreen(ModalScreen[Endpoint | None]):
    """The endpoint form; dismissed with the endpoint."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f10", "connect", "Connect"),
        Binding("escape", "cancel", "Cancel", key_display="esc"),
    ]

    def __init__(self, url: str = "") -> None:
        super().__init__()
        self._url = url
        self._models: list[str] = []

    def compose(self) -> ComposeResult:
        found = environment_keys()
        with VerticalScroll(can_focus=False) as box:
            box.border_title = "Connect to an endpoint"
            with Horizontal(classes="field"):
                yield Static("Base URL", markup=False)
                yield Input(printable(self._url), id="url", placeholder="http://127.0.0.1:8000/v1", compact=True)
            with Horizontal(classes="field"):
                yield Static("API key", markup=False)
                locations = [
                    ("None", _NONE),
                    ("Environment variable", _ENVIRONMENT),
                    ("System keyring", _KEYRING),
                ]
                yield Select(locations, value=_NONE, allow_blank=False, id="key-location", compact=True)
            with Horizontal(classes="field", id="variable-field"):
                yield Static("Variable", markup=False)
                first = printable(found[0]) if found else ""
                yield Input(first, id="variable", placeholder="OPENAI_API_KEY", compact=True)
            with Horizontal(classes="field", id="key-field"):
                yield Static("New key", markup=False)
                yield Input(id="key", password=True, placeholder="Leave empty to use the stored key", compact=True)
            with Horizontal(classes="field"):
                yield Static("Model", markup=False)
                yield Input(id="model", placeholder="Press ⏎ in the URL to list models", compact=True)
            yield OptionList(id="models", markup=False)
            yield Static("", id="note", markup=False)
            with Horizontal(id="buttons"):
                yield Button("Connect", id="connect", variant="primary", compact=True)
                yield Button("Cancel", id="cancel", compact=True)
            yield KeyFooter()

    def on_mount(self) -> None:
        self._show_models([])
        self._show_key_fields()
        self.query_one("#url").focus()

    def on_select_changed(self, event: Select.Changed) -> None:
        """Show the fields for the key's location."""
        event.stop()
        self._show_key_fields()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Warn about the URL; filter the models."""
        event.stop()
        if event.input.id == "url":
            self._warn()
        elif event.input.id == "model":
            self._show_models(self._models)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """List the models; in the model field, connect."""
        event.stop()
        if event.input.id == "model" and event.value.strip():
            self.action_connect()
        else:
            self._request_models("")

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        if event.option.id is not None:
            self.query_one("#model", Input).value = printable(self._models[int(event.option.id)])
            self._request_models(self._models[int(event.option.id)])

    def on_button_pressed(self, event: Button.Pressed) -> None:
        event.stop()
        if event.button.id == "connect":
            self.action_connect()
        else:
            self.action_cancel()

    def action_connect(self) -> None:
        self._request_models(self.query_one("#model", Input).value.strip())

    def action_cancel(self) -> None:
        """Clear the typed key and close the form."""
        self.query_one("#key", Input).value = ""
        self.dismiss(None)

    def _request_models(self, model: str) -> None:
        """List the endpoint's models, then connect to `model` unless it is empty."""
        try:
            url, location = base_url(self.query_one("#url", Input).value), self._key_location()
        except InputError as error:
            self._note(str(error), "error")
            return
        field = self.query_one("#key", Input)
        key, field.value = field.value if location == endpoint_key.KEYRING else "", ""
        self._note("Connecting …")
        self._list_models(url, location, key, model)

    @work(thread=True, exclusive=True)
    def _list_models(self, url: str, location: str, key: str, model: str) -> None:
        worker, call = get_current_worker(), self.app.call_from_thread
        try:
            if key:
                endpoint_key.store(url, key)
            models = list_models(url, location)
        except LlmEdgeError as error:
            if not worker.is_cancelled:
                call(self._note, str(error), "error")
        else:
            if not worker.is_cancelled:
                call(self._models_listed, Endpoint(url, model, location), models)

    def _models_listed(self, endpoint: Endpoint, models: list[str]) -> None:
        if endpoint.model and (endpoint.model in models or not models):
            self.dismiss(endpoint)
            return
        if not models:
            self._note("This endpoint does not list its models. Type a model name.")
        elif endpoint.model:
            self._note(f"Model {endpoint.model!r} not found. Choose one of these.", "error")
            self.query_one("#model", Input).value = ""
        else:
            self._warn()
        self._show_models(models)
        self.query_one("#models" if models else "#model").focus()

    def _key_location(self) -> str:
        location = self.query_one("#key-location", Select).value
        if location == _KEYRING:
            return endpoint_key.KEYRING
        if location == _NONE:
            return ""
        name = self.query_one("#variable", Input).value.strip()
        if not name:
            raise InputError("API key: enter the name of the environment variable")
        return endpoint_key.ENVIRONMENT + name

    def _show_key_fields(self) -> None:
        location = self.query_one("#key-location", Select).value
        self.query_one("#variable-field").display = location == _ENVIRONMENT
        self.query_one("#key-field").display = location == _KEYRING
        self._warn()

    def _show_models(self, models: list[str]) -> None:
        self._models = models
        typed = self.query_one("#model", Input).value.strip().lower()
        matching = [(index, name) for index, name in enumerate(models) if typed in name.lower()]
        shown = self.query_one("#models", OptionList)
        shown.set_options([Option(Content(printable(name)), id=str(index)) for index, name in matching])
        shown.display = bool(matching)
        shown.highlighted = 0 if matching else None

    def _warn(self) -> None:
        try:
            url = base_url(self.query_one("#url", Input).value)
        except InputError:
            self._note("")
            return
        self._note(warning(url, with_key=self.query_one("#key-location", Select).value != _NONE), "warning")

    def _note(self, text: str, kind: str = "") -> None:
        note = self.query_one("#note", Static)
        note.update(printable(text))
        note.set_classes(kind)
        note.display = bool(text)
