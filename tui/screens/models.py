"""The picker of who answers: bundles, endpoints used before, and the ways to more. Loads nothing itself."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

from textual import events, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Footer, Input, OptionList, Static
from textual.widgets.option_list import Option
from textual.worker import get_current_worker

from llm_edge.chat import bundles
from llm_edge.chat.bundles import Broken, Offer
from llm_edge.chat.choice import BundleChoice, Choice, called, is_of, open_responder, remember
from llm_edge.chat.endpoint import client as endpoint
from llm_edge.chat.endpoint.client import Endpoint
from llm_edge.chat.export_process import SMOLLM2_UNVALIDATED, SMOLLM2_VALIDATED, SUFFIXES
from llm_edge.chat.responder import Responder
from llm_edge.chat.settings import Settings
from llm_edge.chat.text import one_line, printable
from llm_edge.runtime.errors import MachineError
from llm_edge.runtime.load_options import LoadOptions
from llm_edge.tui.background_export import Exports, Job
from llm_edge.tui.screens.endpoint import EndpointScreen
from llm_edge.tui.screens.export import ExportScreen

if TYPE_CHECKING:
    from llm_edge.tui.app import ChatApp

_NAME, _PRECISION, _SIZE = 22, 11, 8  # columns
_WAY = 29  # columns
_TELL = 20.0  # seconds that a notification of an end stays: it comes when one is not waiting for it
_LOOK = 0.5  # seconds between two looks at an export at work
_SOON, _INT8, _FILE, _HUB, _ENDPOINT, _JOB = "soon", "int8", "file", "hub", "endpoint", "job"
_WAYS = {
    _SOON: ("Make SmolLM2-135M now", "int8, a minute or two; a first small model"),
    _INT8: ("Make SmolLM2-135M, measured", "int8 with its proof against PyTorch; minutes"),
    _FILE: ("Export a file or folder …", ".pt .pth .bin .safetensors .gguf, folders"),
    _HUB: ("Export from Hugging Face …", "by its id, as owner/name"),
    _ENDPOINT: ("Connect to an endpoint …", "OpenAI-compatible, here or elsewhere"),
}


@dataclass(frozen=True, slots=True)
class Row:
    """A line of the list.

    Attributes:
        shown: how it reads.
        searched: where typed words are looked for.
        choice: what it stands for: a choice, one of `_WAYS`, or `_JOB`; None for what cannot be chosen.
        rank: of all that can be, the one of the highest is highlighted at first.
    """

    shown: Content
    searched: str
    choice: Choice | str | None
    rank: int = 0


class ModelsScreen(ModalScreen[Choice | None]):
    """See the module; dismissed with what was chosen.

    Args:
        settings: hold what was used before.
        current: who answers now.
        reason: why there is nobody, where that is why one is here.
    """

    DEFAULT_CSS = """
    ModelsScreen { align: center middle; background: $background 40%; }
    ModelsScreen > Vertical { width: 1fr; max-width: 100; height: auto; max-height: 100%; background: $surface;
        border: round $accent; margin: 0 1; }
    ModelsScreen #reason { color: $warning; padding: 0 1 1 1; display: none; }
    ModelsScreen #filter { border: none; height: 1; padding: 0 1; background: $boost; }
    ModelsScreen #offers { height: auto; max-height: 20; border: none; background: $surface;
        text-wrap: nowrap; text-overflow: ellipsis; }
    ModelsScreen Footer { dock: none; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "choose", "Choose", key_display="⏎"),
        Binding("down", "move(1)", "Down", show=False),
        Binding("up", "move(-1)", "Up", show=False),
        Binding("pagedown", "move(10)", "Down", show=False),
        Binding("pageup", "move(-10)", "Up", show=False),
        Binding("escape,f4", "close", "Close", key_display="esc"),
    ]

    def __init__(self, settings: Settings, current: Responder | None, reason: str = "") -> None:
        super().__init__()
        self._settings = settings
        self._current = current
        self._reason = reason
        self._rows: list[Row] = []
        self._shown: list[Row] = []
        self._beside: tuple[str, ...] = ()  # precisions of SmolLM2 that are there, and stay
        self._job: tuple[Job, bool] | None = None  # that is shown, and whether it failed

    @property
    def _exports(self) -> Exports:
        return cast("ChatApp", self.app).exports

    def compose(self) -> ComposeResult:
        """The list, with what is typed to shorten it above."""
        with Vertical() as box:
            box.border_title = "Who answers"
            box.border_subtitle = "↑ ↓ ⏎ choose"
            yield Static(printable(self._reason), id="reason", markup=False)
            yield Input(id="filter", placeholder="type to find one", compact=True)
            yield OptionList(Option("looking for bundles …", disabled=True), id="offers", markup=False)
            yield Footer(compact=True, show_command_palette=False)

    def on_mount(self) -> None:
        """Look for what there is."""
        self.query_one("#reason").display = bool(self._reason)
        self.query_one("#offers").can_focus = False
        self.query_one("#filter").focus()
        self._job = self._work()
        self._look()
        self.set_interval(_LOOK, self._watch)

    def _work(self) -> tuple[Job, bool] | None:
        """The export to be shown, and whether it failed."""
        job = self._exports.job
        return (job, job.failed) if job is not None and job.bundle is None else None

    def _watch(self) -> None:
        """Show how far an export is; once it has ended, what there is then."""
        job, self._job = self._job, self._work()
        if job != self._job:
            self._look()
        elif self._job is not None and self._rows and self._rows[0].choice == _JOB:
            self._rows[0] = _at_work(*self._job)
            self.query_one("#offers", OptionList).replace_option_prompt_at_index(0, self._rows[0].shown)

    @work(thread=True, exclusive=True)
    def _look(self) -> None:
        found = bundles.offers(bundles.recent(self._settings))
        places = endpoint.endpoints(self._settings)
        if not get_current_worker().is_cancelled:
            self.app.call_from_thread(self._found, found, places)

    def _found(self, found: list[Offer | Broken], places: list[Endpoint]) -> None:
        rows = [_at_work(*self._job)] if self._job is not None else []
        rows += [self._broken(each) if isinstance(each, Broken) else self._offer(each) for each in found]
        if (job := self._exports.job) is not None and job.bundle is not None:
            self._exports.forget(job)  # it stands in the list now
        rows += [self._place(each) for each in places]
        own = [each.precision for each in found if isinstance(each, Offer) and each.path == bundles.DEFAULT]
        self._beside = tuple(own)
        have = {*([_SOON] if own else []), *([_INT8] if "int8" in own else [])}
        for way, (title, note) in _WAYS.items():
            if way not in have:
                shown = Content.assemble(
                    ("  + ", "$text-accent"), (title.ljust(_WAY), "$text-accent"), (note, "$text-muted")
                )
                rows.append(Row(shown, f"{title} {note}", way))
        self._rows = rows
        self._show(self.query_one("#filter", Input).value)

    def _offer(self, offer: Offer) -> Row:
        choice = BundleChoice(offer.path, LoadOptions(offer.precision))
        now = is_of(choice, self._current)
        name = printable(_called(offer.path))
        fidelity = printable(offer.fidelity)
        shown = Content.assemble(
            ("● " if now else "  ", "$success"),
            (_cut(name, _NAME), "bold" if offer.preferred else ""),
            "  ",
            _cut(printable(offer.precision), _PRECISION),
            offer.megabytes.rjust(_SIZE),
            ("  " + fidelity, "$text-muted"),
        )
        searched = f"{name} {printable(offer.name)} {offer.precision} {offer.path}"
        job = self._exports.job
        made = job is not None and job.bundle is not None and job.bundle.absolute() == offer.path.absolute()
        return Row(shown, searched, choice, 3 if made and offer.preferred else 2 if now else int(offer.preferred))

    def _broken(self, broken: Broken) -> Row:
        name = printable(_called(broken.path))
        reason = printable(broken.reason.replace(f"{broken.path}/", ""))
        shown = Content.assemble(("✗ ", "$error"), _cut(name, _NAME), (f"  {reason}", "$error"))
        return Row(shown, f"{name} {broken.path}", None)

    def _place(self, place: Endpoint) -> Row:
        now = is_of(place, self._current)
        model, host = printable(place.model), printable(place.host)
        shown = Content.assemble(
            ("● " if now else "  ", "$success"), _cut(model, _NAME), ("  at " + host, "$text-muted")
        )
        return Row(shown, f"{model} {place.url}", place, 2 * now)

    def _show(self, typed: str) -> None:
        """The rows with all words of what was typed; the ways to more stay."""
        words = typed.lower().split()
        fitting = [all(word in row.searched.lower() for word in words) for row in self._rows]
        if not any(fitting):
            fitting = [row.choice == _way_to(typed.strip()) for row in self._rows]
        both = zip(self._rows, fitting, strict=True)
        shown = [(row, fits) for row, fits in both if fits or isinstance(row.choice, str)]
        self._shown = [row for row, _ in shown]
        offers = self.query_one("#offers", OptionList)
        offers.set_options([Option(row.shown, disabled=row.choice is None) for row in self._shown])
        best = sorted((-row.rank, place) for place, (row, fits) in enumerate(shown) if fits and row.choice is not None)
        offers.highlighted = best[0][-1] if best else None

    def on_input_changed(self, event: Input.Changed) -> None:
        """Show what fits."""
        event.stop()
        if self._rows:
            self._show(event.value)

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Enter chooses."""
        event.stop()
        self.action_choose()

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """So does the mouse."""
        event.stop()
        self._choose(event.option_index)

    def action_choose(self) -> None:
        """What is highlighted."""
        place = self.query_one("#offers", OptionList).highlighted
        if place is not None:
            self._choose(place)

    def action_move(self, steps: int) -> None:
        """Highlight another one."""
        offers = self.query_one("#offers", OptionList)
        for _ in range(abs(steps)):
            if steps > 0:
                offers.action_cursor_down()
            else:
                offers.action_cursor_up()

    def action_close(self) -> None:
        """Stay with who answers now."""
        self.dismiss(None)

    def on_click(self, event: events.Click) -> None:
        """A click beside the list closes it."""
        if event.widget is self:
            self.dismiss(None)

    def _choose(self, place: int) -> None:
        choice = self._shown[place].choice if place < len(self._shown) else None
        typed = self.query_one("#filter", Input).value.strip()
        typed = typed if choice == _way_to(typed) else ""
        if choice == _ENDPOINT:
            self.app.push_screen(EndpointScreen(typed), self._made)
        elif isinstance(choice, str):
            self._export(choice, typed)
        elif choice is not None:
            self.dismiss(choice)

    def _export(self, way: str, typed: str) -> None:
        """Show the export at work, or one that failed unless another source was typed; else begin a new one."""
        work = self._work()
        if work is not None and (not typed or not work[0].ended):
            self.app.push_screen(ExportScreen(job=work[0]), self._exported)
        elif way in _WAYS:
            better = replace(SMOLLM2_VALIDATED, precisions=(*SMOLLM2_VALIDATED.precisions, *self._beside))
            wish = {_SOON: SMOLLM2_UNVALIDATED, _INT8: better}.get(way)
            self.app.push_screen(ExportScreen(typed, browse=way == _FILE, wish=wish), self._exported)

    def _made(self, choice: Choice | None) -> None:
        if choice is not None:
            self.dismiss(choice)

    def _exported(self, choice: BundleChoice | None) -> None:
        if choice is not None or self._exports.at_work is not None:  # it was left: back to the conversation
            self.dismiss(choice)


def show_models(app: ChatApp, reason: str = "") -> None:
    """Let somebody be chosen, who then answers; until they are there, it is who it was."""

    def chosen(choice: Choice | None) -> None:
        if choice is not None:
            _load(app, choice)

    app.push_screen(ModelsScreen(app.settings, app.session.responder, reason), chosen)


def export_ended(app: ChatApp, job: Job) -> None:
    """Tell of the end of an export that nobody looks at; its bundle answers only where there is nobody else to."""
    if job.bundle is None:
        error = f"The export of {job.name} failed: {printable(job.export.error())}\nF4 shows it."
        app.notify(error, severity="error", timeout=_TELL, markup=False)
    elif app.session.responder is None and not app.loading:
        app.exports.forget(job)
        _load(app, BundleChoice(job.bundle))
    else:
        made = f"{printable(job.bundle.name)} is made. F4 chooses it."
        app.notify(made, timeout=_TELL, markup=False)


def _load(app: ChatApp, choice: Choice) -> None:
    before = app.session.responder
    until = f"; until it is there, {before.name} answers" if before is not None else ""
    app.say(f"Loading {called(choice)}{until}.")
    app.load_responder(loading(app, choice))


def loading(app: ChatApp, choice: Choice) -> Callable[[], Responder]:
    """Loads a choice; for a worker's thread. An answer that is on its way may come to its end before."""

    def load() -> Responder:
        worker = get_current_worker()
        responder = open_responder(choice)
        while app.session.answering is not None and not worker.is_cancelled:
            time.sleep(0.05)
        if not worker.is_cancelled:
            try:
                remember(choice, app.settings)
            except MachineError as error:
                app.call_from_thread(app.say, str(error), "warning")
        return responder

    return load


def _at_work(job: Job, failed: bool) -> Row:
    """The row of an export that is at work, or failed unseen."""
    if failed:
        sign, style, said = "✗ ", "$error", f"the export of {job.name} failed: {printable(job.export.error())}"
    else:
        sign, style, said = "▸ ", "$accent", f"an export is at work: {job.doing}  ({job.name})"
    return Row(Content.assemble((sign, style), (said, style)), said, _JOB, 3)


def _way_to(typed: str) -> str:
    """Which way to more a text looks like: a URL, a path, an id; "" for none of them."""
    if "://" in typed:
        return _ENDPOINT
    if typed.startswith(("/", "~", ".")) or typed.lower().endswith(SUFFIXES):
        return _FILE
    return _HUB if typed.count("/") == 1 and len(typed.split("/")[1]) > 0 else ""


def _called(path: Path) -> str:
    """What a bundle is called in the list: its folder, and where that is unless it is the usual place."""
    if path.parent == bundles.ARTIFACTS:
        return path.name
    parent = path.parent.name
    return f"{parent}/{path.name}" if parent else str(path)


def _cut(text: str, width: int) -> str:
    return one_line(text, width).ljust(width) if text.strip() else "?".ljust(width)
