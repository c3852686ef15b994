"""Connects to an OpenAI-compatible endpoint: its URL, where its key is, which of its models. Shows no key."""

from __future__ import annotations

from typing import ClassVar

from textual import work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Button, Footer, Input, OptionList, Select, Static
from textual.widgets.option_list import Option
from textual.worker import get_current_worker

from llm_edge.chat.endpoint import key as endpoint_key
from llm_edge.chat.endpoint.client import Endpoint, base_url, environment_keys, list_models, warning
from llm_edge.chat.text import printable
from llm_edge.runtime.errors import InputError, LlmEdgeError

_NONE, _ENVIRONMENT, _KEYRING = "none", "environment", "keyring"


class EndpointScreen(ModalScreen[Endpoint | None]):
    """See the module; dismissed with the endpoint.

    Args:
        url: what is known of it.
    """

    DEFAULT_CSS = """
    EndpointScreen { align: center middle; background: $background 40%; }
    EndpointScreen > VerticalScroll { width: 1fr; max-width: 90; height: auto; max-height: 100%; background: $surface;
        border: round $accent; margin: 0 1; padding: 0 1; }
    EndpointScreen .field { height: 1; margin: 0 0 1 0; }
    EndpointScreen .field Static { width: 12; }
    EndpointScreen Input, EndpointScreen Select { width: 1fr; }
    EndpointScreen Input { border: none; height: 1; padding: 0 1; background: $boost; }
    EndpointScreen #models { height: auto; max-height: 7; border: none; margin: 0 0 1 12; background: $surface; }
    EndpointScreen #note { height: auto; margin: 0 0 1 0; color: $text-muted; }
    EndpointScreen #note.warning { color: $warning; }
    EndpointScreen #note.error { color: $error; }
    EndpointScreen #buttons { height: 1; }
    EndpointScreen Button { margin: 0 2 0 0; }
    EndpointScreen Footer { dock: none; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f10", "connect", "Connect"),
        Binding("escape", "close", "Cancel", key_display="esc"),
    ]

    def __init__(self, url: str = "") -> None:
        super().__init__()
        self._url = url
        self._models: list[str] = []

    def compose(self) -> ComposeResult:
        """A form."""
        found = environment_keys()
        with VerticalScroll(can_focus=False) as box:
            box.border_title = "Connect to an endpoint"
            with Horizontal(classes="field"):
                yield Static("Base URL", markup=False)
                yield Input(printable(self._url), id="url", placeholder="http://127.0.0.1:8000/v1", compact=True)
            with Horizontal(classes="field"):
                yield Static("Key", markup=False)
                places = [
                    ("no key", _NONE),
                    ("in an environment variable", _ENVIRONMENT),
                    ("in the system's keyring", _KEYRING),
                ]
                yield Select(places, value=_NONE, allow_blank=False, id="place", compact=True)
            with Horizontal(classes="field", id="variable-field"):
                yield Static("Variable", markup=False)
                first = printable(found[0]) if found else ""
                yield Input(first, id="variable", placeholder="OPENAI_API_KEY", compact=True)
            with Horizontal(classes="field", id="key-field"):
                yield Static("New key", markup=False)
                yield Input(id="key", password=True, placeholder="empty: the one that is there", compact=True)
            with Horizontal(classes="field"):
                yield Static("Model", markup=False)
                yield Input(id="model", placeholder="⏎ at the URL lists them, where the endpoint does", compact=True)
            yield OptionList(id="models", markup=False)
            yield Static("", id="note", markup=False)
            with Horizontal(id="buttons"):
                yield Button("Connect", id="connect", variant="primary", compact=True)
                yield Button("Cancel", id="cancel", compact=True)
            yield Footer(compact=True, show_command_palette=False)

    def on_mount(self) -> None:
        """Begin with the URL."""
        self._show_models([])
        self._show_place()
        self.query_one("#url").focus()

    def on_select_changed(self, event: Select.Changed) -> None:
        """Another place for the key."""
        event.stop()
        self._show_place()

    def on_input_changed(self, event: Input.Changed) -> None:
        """Warn while there is time; shorten the list of models to what fits."""
        event.stop()
        if event.input.id == "url":
            self._warn()
        elif event.input.id == "model":
            self._show_models(self._models)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Enter looks at what models there are, or, with a model, connects."""
        event.stop()
        if event.input.id == "model" and event.value.strip():
            self.action_connect()
        else:
            self._begin("")

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """A model of the list."""
        event.stop()
        if event.option.id is not None:
            self.query_one("#model", Input).value = printable(self._models[int(event.option.id)])
            self._begin(self._models[int(event.option.id)])

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """The two buttons."""
        event.stop()
        if event.button.id == "connect":
            self.action_connect()
        else:
            self.action_close()

    def action_connect(self) -> None:
        """Try it, and be done."""
        self._begin(self.query_one("#model", Input).value.strip())

    def action_close(self) -> None:
        """Leave all as it is."""
        self.query_one("#key", Input).value = ""
        self.dismiss(None)

    def _begin(self, model: str) -> None:
        """List the models, and, where one is named, connect to it."""
        try:
            url, place = base_url(self.query_one("#url", Input).value), self._place()
        except InputError as error:
            self._note(str(error), "error")
            return
        field = self.query_one("#key", Input)
        key, field.value = field.value if place == endpoint_key.KEYRING else "", ""
        self._note("asking …")
        self._ask(url, place, key, model)

    @work(thread=True, exclusive=True)
    def _ask(self, url: str, place: str, key: str, model: str) -> None:
        worker, tell = get_current_worker(), self.app.call_from_thread
        try:
            if key:
                endpoint_key.store(url, key)
            models = list_models(url, place)
        except LlmEdgeError as error:
            if not worker.is_cancelled:
                tell(self._note, str(error), "error")
        else:
            if not worker.is_cancelled:
                tell(self._listed, Endpoint(url, model, place), models)

    def _listed(self, endpoint: Endpoint, models: list[str]) -> None:
        if endpoint.model and (endpoint.model in models or not models):
            self.dismiss(endpoint)
            return
        if not models:
            self._note("this endpoint does not list its models: type the name of one")
        elif endpoint.model:
            self._note(f"there is no model {endpoint.model!r}: choose one of these", "error")
            self.query_one("#model", Input).value = ""
        else:
            self._warn()
        self._show_models(models)
        self.query_one("#models" if models else "#model").focus()

    def _place(self) -> str:
        place = self.query_one("#place", Select).value
        if place == _KEYRING:
            return endpoint_key.KEYRING
        if place == _NONE:
            return ""
        name = self.query_one("#variable", Input).value.strip()
        if not name:
            raise InputError("the environment variable that holds the key: give its name")
        return endpoint_key.ENVIRONMENT + name

    def _show_place(self) -> None:
        place = self.query_one("#place", Select).value
        self.query_one("#variable-field").display = place == _ENVIRONMENT
        self.query_one("#key-field").display = place == _KEYRING
        self._warn()

    def _show_models(self, models: list[str]) -> None:
        self._models = models
        typed = self.query_one("#model", Input).value.strip().lower()
        fitting = [(place, name) for place, name in enumerate(models) if typed in name.lower()]
        shown = self.query_one("#models", OptionList)
        shown.set_options([Option(Content(printable(name)), id=str(place)) for place, name in fitting])
        shown.display = bool(fitting)
        shown.highlighted = 0 if fitting else None

    def _warn(self) -> None:
        try:
            url = base_url(self.query_one("#url", Input).value)
        except InputError:
            self._note("")
            return
        self._note(warning(url, with_key=self.query_one("#place", Select).value != _NONE), "warning")

    def _note(self, text: str, kind: str = "") -> None:
        note = self.query_one("#note", Static)
        note.update(printable(text))
        note.set_classes(kind)
        note.display = bool(text)
