"""The model picker: local bundles, endpoints used before, and ways to add more."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar

from textual import events, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Input, OptionList, Static
from textual.widgets.option_list import Option
from textual.worker import get_current_worker

from llm_edge.chat import bundles
from llm_edge.chat.bundles import Broken, Offer
from llm_edge.chat.choice import BundleChoice, Choice, is_of
from llm_edge.chat.endpoint import client as endpoint
from llm_edge.chat.endpoint.client import Endpoint
from llm_edge.chat.export_process import SMOLLM2_UNVALIDATED, SMOLLM2_VALIDATED, SUFFIXES
from llm_edge.chat.responder import Responder
from llm_edge.chat.settings import Settings
from llm_edge.chat.text import one_line, printable
from llm_edge.runtime.load_options import LoadOptions
from llm_edge.tui.export_manager import ExportJob, ExportManager
from llm_edge.tui.screens.endpoint import EndpointScreen
from llm_edge.tui.screens.export import ExportScreen
from llm_edge.tui.widgets.footer import KeyFooter

_NAME_WIDTH, _PRECISION_WIDTH, _SIZE_WIDTH, _SOURCE_WIDTH = 22, 11, 8, 34  # columns
_POLL_INTERVAL = 0.5  # seconds
_QUICK_SMOLLM2, _SMOLLM2, _FILE, _HUB, _ENDPOINT, _EXPORT = "smollm2-quick", "smollm2", "file", "hub", "endpoint", "job"
# Ways to add a model, with title and hint.
_SOURCES = {
    _QUICK_SMOLLM2: ("Make SmolLM2-135M now", "int8, ready in 1 to 2 minutes"),
    _SMOLLM2: ("Make SmolLM2-135M and validate it", "int8, compared with PyTorch"),
    _FILE: ("Export a file or folder …", ".pt .safetensors .gguf and folders"),
    _HUB: ("Export from Hugging Face …", "By its id, as owner/name"),
    _ENDPOINT: ("Connect to an endpoint …", "OpenAI-compatible, local or remote"),
}


@dataclass(frozen=True, slots=True)
class Entry:
    """An entry of the list."""

    label: Content
    searched: str  # the text that the filter searches
    choice: Choice | str | None  # a model, a key of `_SOURCES`, or `_EXPORT`; None if it cannot be chosen
    rank: int = 0  # the entry with the highest rank is highlighted first


class ModelsScreen(ModalScreen[Choice | None]):
    """The model picker; dismissed with the chosen model. `reason` says why a model has to be chosen."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "choose", "Choose", key_display="⏎"),
        Binding("down", "move(1)", "Down", show=False),
        Binding("up", "move(-1)", "Up", show=False),
        Binding("pagedown", "move(10)", "Down", show=False),
        Binding("pageup", "move(-10)", "Up", show=False),
        Binding("escape,f4", "close", "Close", key_display="esc"),
    ]

    def __init__(self, settings: Settings, exports: ExportManager, current: Responder | None, reason: str = "") -> None:
        super().__init__()
        self._settings, self._exports, self._current, self._reason = settings, exports, current, reason
        self._entries: list[Entry] = []
        self._shown: list[Entry] = []
        self._smollm2_precisions: tuple[str, ...] = ()  # that the default bundle has, and that an export keeps
        self._job: tuple[ExportJob, bool] | None = None  # the export that is shown, and whether it failed

    def compose(self) -> ComposeResult:
        with Vertical() as box:
            box.border_title = "Choose a model"
            box.border_subtitle = "↑ ↓ ⏎ to choose"
            yield Static(printable(self._reason), id="reason", markup=False)
            yield Input(id="filter", placeholder="Type to filter", compact=True)
            yield OptionList(Option("Searching for bundles …", disabled=True), id="models", markup=False)
            yield KeyFooter()

    def on_mount(self) -> None:
        self.query_one("#reason").display = bool(self._reason)
        self.query_one("#models").can_focus = False
        self.query_one("#filter").focus()
        self._job = self._current_job()
        self._search()
        self.set_interval(_POLL_INTERVAL, self._poll_export)

    def _current_job(self) -> tuple[ExportJob, bool] | None:
        """The running or failed export, and whether it failed."""
        job = self._exports.job
        return (job, job.failed) if job is not None and job.bundle is None else None

    def _poll_export(self) -> None:
        """Show the progress of an export; once it has ended, search for its bundle."""
        job, self._job = self._job, self._current_job()
        if job != self._job:
            self._search()
        elif self._job is not None and self._entries and self._entries[0].choice == _EXPORT:
            self._entries[0] = _export_entry(*self._job)
            self.query_one("#models", OptionList).replace_option_prompt_at_index(0, self._entries[0].label)

    @work(thread=True, exclusive=True)
    def _search(self) -> None:
        found = bundles.offers(bundles.recent(self._settings))
        endpoints = endpoint.endpoints(self._settings)
        if not get_current_worker().is_cancelled:
            self.app.call_from_thread(self._show_found, found, endpoints)

    def _show_found(self, found: list[Offer | Broken], endpoints: list[Endpoint]) -> None:
        entries = [_export_entry(*self._job)] if self._job is not None else []
        entries += [_broken_entry(each) if isinstance(each, Broken) else self._bundle_entry(each) for each in found]
        if (job := self._exports.job) is not None and job.bundle is not None:
            self._exports.dismiss(job)  # its bundle is in the list now
        entries += [self._endpoint_entry(each) for each in endpoints]
        present = [each.precision for each in found if isinstance(each, Offer) and each.path == bundles.DEFAULT]
        self._smollm2_precisions = tuple(present)
        unneeded = {*([_QUICK_SMOLLM2] if present else []), *([_SMOLLM2] if "int8" in present else [])}
        for source, (title, hint) in _SOURCES.items():
            if source not in unneeded:
                label = Content.assemble(
                    ("  + ", "$text-accent"), (title.ljust(_SOURCE_WIDTH), "$text-accent"), (hint, "$text-muted")
                )
                entries.append(Entry(label, f"{title} {hint}", source))
        self._entries = entries
        self._filter(self.query_one("#filter", Input).value)

    def _bundle_entry(self, offer: Offer) -> Entry:
        choice = BundleChoice(offer.path, LoadOptions(offer.precision))
        in_use = is_of(choice, self._current)
        name = printable(_name_of(offer.path))
        label = Content.assemble(
            ("● " if in_use else "  ", "$success"),
            (_cell(name, _NAME_WIDTH), "bold" if offer.preferred else ""),
            "  ",
            _cell(printable(offer.precision), _PRECISION_WIDTH),
            offer.megabytes.rjust(_SIZE_WIDTH),
            ("  " + printable(offer.fidelity), "$text-muted"),
        )
        searched = f"{name} {printable(offer.name)} {offer.precision} {offer.path}"
        job = self._exports.job
        new = job is not None and job.bundle is not None and job.bundle.absolute() == offer.path.absolute()
        return Entry(label, searched, choice, 3 if new and offer.preferred else 2 if in_use else int(offer.preferred))

    def _endpoint_entry(self, place: Endpoint) -> Entry:
        in_use = is_of(place, self._current)
        model, host = printable(place.model), printable(place.host)
        label = Content.assemble(
            ("● " if in_use else "  ", "$success"), _cell(model, _NAME_WIDTH), ("  at " + host, "$text-muted")
        )
        return Entry(label, f"{model} {place.url}", place, 2 * in_use)

    def _filter(self, typed: str) -> None:
        """Show the entries that contain all typed words, and the ways to add a model."""
        words = typed.lower().split()
        matches = [all(word in entry.searched.lower() for word in words) for entry in self._entries]
        if not any(matches):
            matches = [entry.choice == _source_for(typed.strip()) for entry in self._entries]
        both = zip(self._entries, matches, strict=True)
        shown = [(entry, match) for entry, match in both if match or isinstance(entry.choice, str)]
        self._shown = [entry for entry, _ in shown]
        models = self.query_one("#models", OptionList)
        models.set_options([Option(entry.label, disabled=entry.choice is None) for entry in self._shown])
        best = sorted((-each.rank, i) for i, (each, match) in enumerate(shown) if match and each.choice is not None)
        models.highlighted = best[0][-1] if best else None

    def on_input_changed(self, event: Input.Changed) -> None:
        event.stop()
        if self._entries:
            self._filter(event.value)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        event.stop()
        self.action_choose()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self._choose(event.option_index)

    def action_choose(self) -> None:
        index = self.query_one("#models", OptionList).highlighted
        if index is not None:
            self._choose(index)

    def action_move(self, steps: int) -> None:
        models = self.query_one("#models", OptionList)
        for _ in range(abs(steps)):
            if steps > 0:
                models.action_cursor_down()
            else:
                models.action_cursor_up()

    def action_close(self) -> None:
        self.dismiss(None)

    def on_click(self, event: events.Click) -> None:
        """Close by clicking outside."""
        if event.widget is self:
            self.dismiss(None)

    def _choose(self, index: int) -> None:
        choice = self._shown[index].choice if index < len(self._shown) else None
        typed = self.query_one("#filter", Input).value.strip()
        typed = typed if choice == _source_for(typed) else ""
        if choice == _ENDPOINT:
            self.app.push_screen(EndpointScreen(typed), self._connected)
        elif isinstance(choice, str):
            self._open_export(choice, typed)
        elif choice is not None:
            self.dismiss(choice)

    def _open_export(self, source: str, typed: str) -> None:
        """Show the running export, or a failed one unless another source was typed; otherwise a new one."""
        current = self._current_job()
        if current is not None and (not typed or not current[0].ended):
            self.app.push_screen(ExportScreen(self._exports, job=current[0]), self._exported)
        elif source in _SOURCES:
            precisions = dict.fromkeys([*SMOLLM2_VALIDATED.precisions, *self._smollm2_precisions])
            options = replace(SMOLLM2_VALIDATED.options, precision=",".join(precisions))
            validated = replace(SMOLLM2_VALIDATED, options=options)
            request = {_QUICK_SMOLLM2: SMOLLM2_UNVALIDATED, _SMOLLM2: validated}.get(source)
            screen = ExportScreen(self._exports, typed, browse=source == _FILE, request=request)
            self.app.push_screen(screen, self._exported)

    def _connected(self, choice: Choice | None) -> None:
        if choice is not None:
            self.dismiss(choice)

    def _exported(self, choice: BundleChoice | None) -> None:
        if choice is not None or self._exports.running is not None:  # continues in the background: back to the chat
            self.dismiss(choice)


def _export_entry(job: ExportJob, failed: bool) -> Entry:
    """The entry of a running or failed export."""
    if failed:
        sign, style, text = "✗ ", "$error", f"Export of {job.name} failed: {printable(job.export.error())}"
    else:
        sign, style, text = "▸ ", "$accent", f"Exporting {job.name}: {job.progress}"
    return Entry(Content.assemble((sign, style), (text, style)), text, _EXPORT, 3)


def _broken_entry(broken: Broken) -> Entry:
    name = printable(_name_of(broken.path))
    reason = printable(broken.reason.replace(f"{broken.path}/", ""))
    label = Content.assemble(("✗ ", "$error"), _cell(name, _NAME_WIDTH), (f"  {reason}", "$error"))
    return Entry(label, f"{name} {broken.path}", None)


def _source_for(typed: str) -> str:
    """The way to add a model that fits a typed text, which may be a URL, a path or an id; "" for none."""
    if "://" in typed:
        return _ENDPOINT
    if typed.startswith(("/", "~", ".")) or typed.lower().endswith(SUFFIXES):
        return _FILE
    return _HUB if typed.count("/") == 1 and len(typed.split("/")[1]) > 0 else ""


def _name_of(path: Path) -> str:
    """A bundle's name: its folder, with the parent folder unless that is the default one."""
    if path.parent == bundles.ARTIFACTS:
        return path.name
    parent = path.parent.name
    return f"{parent}/{path.name}" if parent else str(path)


def _cell(text: str, width: int) -> str:
    return one_line(text, width).ljust(width) if text.strip() else "?".ljust(width)
