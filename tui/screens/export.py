"""The export form: exports a file, a folder or a Hugging Face model, and shows the progress."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterable
from pathlib import Path
from typing import ClassVar

from rich.text import Text, TextType
from textual import on, work
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, ItemGrid, Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Button, Checkbox, DirectoryTree, Input, Static

from llm_edge.chat.choice import BundleChoice
from llm_edge.chat.export_process import OPTIONS, SUFFIXES, Export, ExportRequest, named_options, parse_options
from llm_edge.chat.text import one_line, printable
from llm_edge.exporter.options import PRECISIONS, ExportOptions
from llm_edge.runtime.errors import LlmEdgeError, ParameterError
from llm_edge.tui.export_manager import ExportJob, ExportManager
from llm_edge.tui.notifications import notify
from llm_edge.tui.widgets.footer import KeyFooter

_POLL_INTERVAL = 0.1  # seconds
_PATH_DELAY = 0.3  # seconds without a key press before a path is checked
_BAR_WIDTH = 24  # columns
_DEFAULT_PRECISION = "int8"


class CheckpointTree(DirectoryTree):
    """Folders and checkpoint files."""

    ICON_NODE_EXPANDED, ICON_NODE, ICON_FILE = "▾ ", "▸ ", "  "  # terminals disagree on the width of emoji

    def filter_paths(self, paths: Iterable[Path]) -> Iterable[Path]:
        return [
            path
            for path in paths
            if not path.name.startswith(".") and (path.suffix.lower() in SUFFIXES or self._safe_is_dir(path))
        ]

    def process_label(self, label: TextType) -> Text:
        """The label without control characters."""
        return Text(one_line(printable(str(label))) or "?")


class CrossCheckbox(Checkbox):
    """A checkbox whose state is visible without colors."""

    @property
    def BUTTON_INNER(self) -> str:  # type: ignore[override]  # noqa: N802 (Textual's name)
        """The character between the brackets."""
        return "X" if self.value else " "


class ExportScreen(ModalScreen[BundleChoice | None]):
    """The export form; dismissed with the new bundle.

    Args:
        exports: runs the export.
        source: what to export, if it is known.
        browse: let the user choose a file or folder.
        request: an export to start at once.
        command: runs `llm-export`; by default, that of this Python environment.
        job: an export to show instead, running or failed.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f10,ctrl+e", "export", "Export", key_display="F10"),
        Binding("ctrl+b,b", "background", "Run in background", key_display="^b, b"),  # tmux's prefix is Ctrl-B
        Binding("escape", "cancel", "Cancel", key_display="esc"),
    ]

    def __init__(
        self,
        exports: ExportManager,
        source: str = "",
        *,
        browse: bool = False,
        request: ExportRequest | None = None,
        command: Iterable[str] = (),
        job: ExportJob | None = None,
    ) -> None:
        super().__init__()
        self._exports = exports
        self._start_at_once = request if job is None else None
        self._initial = job.request if job is not None else request
        self._source = self._initial.source if self._initial is not None else source
        self._browse = job.browse if job is not None else browse
        self._command = tuple(command)
        self._job = job
        self._path_missing = False  # whether the error is about the typed path

    @property
    def _running_export(self) -> Export | None:
        return self._job.export if self._job is not None and not self._job.ended else None

    def compose(self) -> ComposeResult:
        """A form, replaced by the progress while an export is running."""
        with Vertical(id="box"):
            yield Static("", id="error", markup=False)
            with VerticalScroll(id="form", can_focus=False):
                hint = (
                    "Path of a file or folder" if self._browse else "owner/name, as HuggingFaceTB/SmolLM2-135M-Instruct"
                )
                yield Input(self._source, id="source", placeholder=hint, compact=True)
                if self._browse:
                    yield CheckpointTree(Path.cwd())
                yield Static(
                    "Precisions (int8 is fast and accurate; the export measures how accurate)", classes="label"
                )
                with ItemGrid(min_column_width=16, regular=True):
                    for name in PRECISIONS:
                        yield CrossCheckbox(name, name == _DEFAULT_PRECISION, id=f"precision-{name}", compact=True)
                for name, hint in OPTIONS.items():
                    with Horizontal(classes="option", id=f"option-{name}"):
                        yield Static(name, markup=False)
                        yield Input(placeholder=hint, compact=True)
                yield CrossCheckbox("Replace the existing bundle", id="force", compact=True)
                with Horizontal(id="buttons"):
                    yield Button("Export", id="export", variant="primary", compact=True)
                    yield Button("Cancel", id="cancel", compact=True)
            yield Static("", id="progress", markup=False)
            yield KeyFooter()

    def on_mount(self) -> None:
        """Hide the options that are rarely needed, and start or show an export."""
        self._show_error("")
        self.query_one("#force").display = False
        for name in OPTIONS:
            self.query_one(f"#option-{name}").display = False
        self.query_one("#source").focus()
        self.set_interval(_POLL_INTERVAL, self._update_progress)
        if self._initial is not None:
            self._fill(self._initial)
        self._show_form_or_progress()
        if self._start_at_once is not None:
            self._start(self._start_at_once)
        elif self._job is not None and self._job.ended:
            self._ended(self._job)
        elif self._job is not None:
            self._watch(self._job)

    def on_screen_resume(self) -> None:
        """Close with the bundle if the export ended while another screen was on top."""
        self._finish()

    @on(CheckpointTree.FileSelected)
    @on(CheckpointTree.DirectorySelected)
    def _selected(self, event: DirectoryTree.FileSelected | DirectoryTree.DirectorySelected) -> None:
        """Use the selected path as the source."""
        event.stop()
        source = self.query_one("#source", Input)
        source.value = str(event.path)
        source.cursor_position = len(source.value)
        if isinstance(event, DirectoryTree.FileSelected):
            source.focus()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        event.stop()
        self.action_export()

    @on(Input.Changed, "#source")
    def _source_changed(self, event: Input.Changed) -> None:
        """Check a typed path, once the user pauses."""
        event.stop()
        if self._browse:
            self._check_path(event.value.strip())

    @work(exclusive=True, group="path")
    async def _check_path(self, path: str) -> None:
        """Report a path that does not exist; checking may take long on a network disk."""
        await asyncio.sleep(_PATH_DELAY if path else 0.0)
        missing = bool(path) and not await asyncio.to_thread(_exists, path)
        if self._running_export is None and (missing or self._path_missing):
            self._show_error(f"{path}: not found" if missing else "")
            self._path_missing = missing

    def on_button_pressed(self, event: Button.Pressed) -> None:
        event.stop()
        if event.button.id == "export":
            self.action_export()
        else:
            self.action_cancel()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """Allow one export at a time, and only a running one to continue in the background."""
        running = self._running_export
        if action == "export" and running is not None:
            return False
        if action == "background" and (running is None or running.cancelled):
            return False
        return super().check_action(action, parameters)

    def action_export(self) -> None:
        if self._running_export is not None:
            return
        try:
            request = self._request()
        except ParameterError as error:
            self._show_error(str(error))
            return
        if not request.source:
            self._show_error("Enter the path of a file or folder." if self._browse else "Enter an id, as owner/name.")
            self.query_one("#source").focus()
            return
        self._start(request)

    def _start(self, request: ExportRequest) -> None:
        try:
            job = self._exports.start(request, browse=self._browse, command=self._command)
        except LlmEdgeError as error:
            self._show_error(str(error))
            return
        self._watch(job)

    def _watch(self, job: ExportJob) -> None:
        self._job = job
        self._exports.watcher = self._ended
        self._show_error("")
        self.set_focus(None)
        self._show_form_or_progress()
        self._update_progress()

    def _show_form_or_progress(self) -> None:
        job, running = self._job, self._running_export is not None
        self.query_one("#form").display = not running
        self.query_one("#progress").display = running
        title = "Export a file or folder" if self._browse else "Export from Hugging Face"
        self.query_one("#box").border_title = Content(f"Exporting {job.name}" if job is not None and running else title)
        self.refresh_bindings()

    def action_background(self) -> None:
        """Close the screen while the export continues."""
        if self._job is None:
            return
        self._exports.watcher = None
        notify(self, f"Exporting {self._job.name} in the background. Press F4 to see the progress.")
        self.dismiss(None)

    def action_cancel(self) -> None:
        """Cancel the running export; without one, close the screen."""
        if self._running_export is not None:
            self._running_export.cancel()
            self.refresh_bindings()
            return
        if self._job is not None:
            self._exports.dismiss(self._job)
        self.dismiss(None)

    def _fill(self, request: ExportRequest) -> None:
        """Fill in the form."""
        for name in PRECISIONS:
            self.query_one(f"#precision-{name}", Checkbox).value = name in request.precisions
        for name in OPTIONS:
            value = getattr(request.options, name.replace("-", "_"))
            if value is not None:
                self.query_one(f"#option-{name}").display = True
                self.query_one(f"#option-{name} Input", Input).value = str(value)
        force = self.query_one("#force", Checkbox)
        force.value = force.display = request.options.force

    def _request(self) -> ExportRequest:
        """The request that the form describes.

        Raises:
            ParameterError: an option is not a number.
        """
        typed = {
            name: self.query_one(f"#option-{name} Input", Input).value
            for name in OPTIONS
            if self.query_one(f"#option-{name}").display
        }
        chosen = [name for name in PRECISIONS if self.query_one(f"#precision-{name}", Checkbox).value]
        source = self.query_one("#source", Input).value.strip()
        initial = self._initial
        same = initial is not None and initial.source == source and {*initial.precisions} == {*chosen}
        options = ExportOptions(
            **parse_options(typed),
            precision=",".join(chosen) or None,
            force=self.query_one("#force", Checkbox).value,
            # a second attempt at a quick export is quick too
            validate=initial is None or initial.options.validate or not same,
        )
        return ExportRequest(source, options)

    def _ended(self, job: ExportJob) -> None:
        """Finish, or show the error and the options that it names."""
        if job.bundle is not None:
            self._finish()
            return
        self._show_form_or_progress()
        error = job.export.error()
        self._show_error(error)
        named = named_options(error)
        for name in named:
            self.query_one("#force" if name == "force" else f"#option-{name}").display = True
        self.query(CheckpointTree).set(display=not named)  # the file has been chosen
        first = next((name for name in named if name != "force"), None)
        self.query_one(f"#option-{first} Input" if first else "#source").focus()

    def _finish(self) -> None:
        """Close with the bundle, unless another screen is on top."""
        job = self._job
        if job is not None and job.bundle is not None and self.app.screen is self:
            self._job = None
            self._exports.dismiss(job)
            self.dismiss(BundleChoice(job.bundle))

    def _show_error(self, error: str) -> None:
        line = self.query_one("#error", Static)
        line.update(printable(error))
        line.display = bool(error)

    def _update_progress(self) -> None:
        if self._running_export is not None:
            self.query_one("#progress", Static).update(_progress(self._running_export))


def _exists(path: str) -> bool:
    try:
        return Path(os.path.expanduser(path)).exists()  # noqa: PTH111 (Path.expanduser raises for unknown users)
    except (OSError, ValueError):
        return False


def _progress(export: Export) -> Content:
    """A line for each stage, with a bar for the current one, and a line for the whole export."""
    stages, lines = export.stages(), list[Content]()
    for index, stage in enumerate(stages):
        current = index == len(stages) - 1
        share = stage.share if current else 1.0
        done = round(_BAR_WIDTH * (share or 0.0))
        percent = "    " if share is None else f"{share:4.0%}"
        lines.append(
            Content.assemble(
                ("▸ " if current else "✓ ", "$accent" if current else "$success"),
                printable(stage.name).ljust(13),
                ("━" * done, "$success"),
                ("━" * (_BAR_WIDTH - done), "$panel"),
                f" {percent} ",
                (printable(stage.detail) if current else "", "$text-muted"),
            )
        )
    state = "Cancelling …" if export.cancelled else "Esc to cancel" if lines else "Starting llm-export …"
    return Content("\n").join([*lines, Content(f"\n{export.seconds:.0f} s · {state}")])
