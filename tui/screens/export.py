"""Makes a bundle out of a file, a folder or a Hugging Face id, with the export's progress. Knows no conversation.

An export that is left at work goes on in the application, see `background.py`; another screen shows it again.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, cast

from rich.text import Text, TextType
from textual import on
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Horizontal, ItemGrid, Vertical, VerticalScroll
from textual.content import Content
from textual.screen import ModalScreen
from textual.widgets import Button, Checkbox, DirectoryTree, Footer, Input, Static

from llm_edge.chat.choice import BundleChoice
from llm_edge.chat.export_process import OPTIONS, PRECISIONS, SUFFIXES, Export, ExportRequest, named_options
from llm_edge.chat.text import one_line, printable
from llm_edge.runtime.errors import LlmEdgeError
from llm_edge.tui.background_export import Exports, Job

if TYPE_CHECKING:
    from llm_edge.tui.app import ChatApp

_LOOK = 0.1  # seconds between two looks at the progress
_BAR = 24  # columns
_USUAL = "int8"


class Checkpoints(DirectoryTree):
    """Folders, and files that may be checkpoints."""

    ICON_NODE_EXPANDED, ICON_NODE, ICON_FILE = "▾ ", "▸ ", "  "  # emoji are of another width in each terminal

    def filter_paths(self, paths: Iterable[Path]) -> Iterable[Path]:
        """Leave out what cannot be exported."""
        return [
            path
            for path in paths
            if not path.name.startswith(".") and (path.suffix.lower() in SUFFIXES or self._safe_is_dir(path))
        ]

    def process_label(self, label: TextType) -> Text:
        """A name that cannot steer the terminal."""
        return Text(one_line(printable(str(label))) or "?")


class Tick(Checkbox):
    """A checkbox that can be told from one that is not ticked without colours."""

    @property
    def BUTTON_INNER(self) -> str:  # type: ignore[override]  # noqa: N802 (Textual's)
        """What stands in it."""
        return "X" if self.value else " "


class ExportScreen(ModalScreen[BundleChoice | None]):
    """See the module; dismissed with the bundle that was made.

    Args:
        source: what to export, as far as it is known.
        browse: let a file or folder be looked for.
        wish: what to export, and how; begins at once.
        command: runs `llm-export`, where that is not this Python's.
        job: an export to show in place of all that: at work, or with its error.
    """

    DEFAULT_CSS = """
    ExportScreen { align: center middle; background: $background 40%; }
    ExportScreen > Vertical { width: 1fr; max-width: 100; height: auto; max-height: 100%; background: $surface;
        border: round $accent; margin: 0 1; padding: 0 1; }
    ExportScreen #form { height: auto; max-height: 72vh; scrollbar-size-vertical: 1; }
    ExportScreen Input { border: none; height: 1; padding: 0 1; background: $boost; }
    ExportScreen Checkpoints { height: 9; background: $surface; margin: 1 0 0 0; scrollbar-size-vertical: 1; }
    ExportScreen .label { color: $text-muted; margin: 1 0 0 0; }
    ExportScreen ItemGrid { height: auto; grid-gutter: 0 1; }
    ExportScreen Checkbox { border: none; padding: 0; background: $surface; width: 1fr; }
    ExportScreen .option { height: 1; }
    ExportScreen .option Static { width: 14; }
    ExportScreen .option Input { width: 1fr; }
    ExportScreen #failure { color: $error; margin: 0 0 1 0; height: auto; max-height: 6; }
    ExportScreen #buttons { height: 1; margin: 1 0 0 0; }
    ExportScreen Button { margin: 0 2 0 0; }
    ExportScreen #progress { height: auto; min-height: 8; padding: 1 0; }
    ExportScreen Footer { dock: none; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("f10,ctrl+e", "export", "Export", key_display="F10"),
        Binding("ctrl+b,b", "leave", "In the background", key_display="^b, b"),  # tmux keeps the first for itself
        Binding("escape", "close", "Cancel", key_display="esc"),
    ]

    def __init__(
        self,
        source: str = "",
        *,
        browse: bool = False,
        wish: ExportRequest | None = None,
        command: Iterable[str] = (),
        job: Job | None = None,
    ) -> None:
        super().__init__()
        self._at_once = wish if job is None else None
        self._filled = job.wish if job is not None else wish
        self._source = self._filled.source if self._filled is not None else source
        self._browse = job.browse if job is not None else browse
        self._command = tuple(command)
        self._job = job

    @property
    def _exports(self) -> Exports:
        return cast("ChatApp", self.app).exports

    @property
    def _at_work(self) -> Export | None:
        return self._job.export if self._job is not None and not self._job.ended else None

    def compose(self) -> ComposeResult:
        """A form, and in its place, once it is sent, the progress."""
        with Vertical(id="box"):
            yield Static("", id="failure", markup=False)
            with VerticalScroll(id="form", can_focus=False):
                hint = (
                    "path of a file or folder" if self._browse else "owner/name, as HuggingFaceTB/SmolLM2-135M-Instruct"
                )
                yield Input(self._source, id="source", placeholder=hint, compact=True)
                if self._browse:
                    yield Checkpoints(Path.cwd())
                yield Static("Precisions (int8 is fast and close; the export measures how close)", classes="label")
                with ItemGrid(min_column_width=16, regular=True):
                    for name in PRECISIONS:
                        yield Tick(name, name == _USUAL, id=f"precision-{name}", compact=True)
                for name, hint in OPTIONS.items():
                    with Horizontal(classes="option", id=f"option-{name}"):
                        yield Static(name, markup=False)
                        yield Input(placeholder=hint, compact=True)
                yield Tick("replace the bundle that is there", id="force", compact=True)
                with Horizontal(id="buttons"):
                    yield Button("Export", id="export", variant="primary", compact=True)
                    yield Button("Cancel", id="cancel", compact=True)
            yield Static("", id="progress", markup=False)
            yield Footer(compact=True, show_command_palette=False)

    def on_mount(self) -> None:
        """Only what is usually needed shows."""
        self._fail("")
        self.query_one("#force").display = False
        for name in OPTIONS:
            self.query_one(f"#option-{name}").display = False
        self.query_one("#source").focus()
        self.set_interval(_LOOK, self._look)
        if self._filled is not None:
            self._fill(self._filled)
        self._turn()
        if self._at_once is not None:
            self._begin(self._at_once)
        elif self._job is not None and self._job.ended:
            self._ended(self._job)
        elif self._job is not None:
            self._watch(self._job)

    def on_screen_resume(self) -> None:
        """What lay over this screen is gone: an export that ended meanwhile is taken now."""
        self._take()

    @on(Checkpoints.FileSelected)
    @on(Checkpoints.DirectorySelected)
    def _selected(self, event: DirectoryTree.FileSelected | DirectoryTree.DirectorySelected) -> None:
        """A file is meant; a folder may be."""
        event.stop()
        source = self.query_one("#source", Input)
        source.value = str(event.path)
        source.cursor_position = len(source.value)
        if isinstance(event, DirectoryTree.FileSelected):
            source.focus()

    def on_input_submitted(self, event: Input.Submitted) -> None:
        """Enter begins."""
        event.stop()
        self.action_export()

    def on_button_pressed(self, event: Button.Pressed) -> None:
        """The two buttons."""
        event.stop()
        if event.button.id == "export":
            self.action_export()
        else:
            self.action_close()

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:
        """One export at a time; what is being ended is not left."""
        at_work = self._at_work
        if action == "export" and at_work is not None:
            return False
        if action == "leave" and (at_work is None or at_work.cancelled):
            return False
        return super().check_action(action, parameters)

    def action_export(self) -> None:
        """Begin."""
        if self._at_work is not None:
            return
        wish = self._wish()
        if not wish.source:
            self._fail(
                "what is to be exported? Give " + ("a file or a folder" if self._browse else "an id, as owner/name")
            )
            self.query_one("#source").focus()
            return
        self._begin(wish)

    def _begin(self, wish: ExportRequest) -> None:
        try:
            job = self._exports.begin(wish, browse=self._browse, command=self._command)
        except LlmEdgeError as error:
            self._fail(str(error))
            return
        self._watch(job)

    def _watch(self, job: Job) -> None:
        self._job = job
        self._exports.watcher = self._ended
        self._fail("")
        self.set_focus(None)
        self._turn()
        self._look()

    def _turn(self) -> None:
        """Show the progress, or the form."""
        job, at_work = self._job, self._at_work is not None
        self.query_one("#form").display = not at_work
        self.query_one("#progress").display = at_work
        form = "Export a file or folder" if self._browse else "Export from Hugging Face"
        self.query_one("#box").border_title = Content(f"Export of {job.name}" if job is not None and at_work else form)
        self.refresh_bindings()

    def action_leave(self) -> None:
        """Leave it at work."""
        if self._job is None:
            return
        self._exports.watcher = None
        self.notify(f"The export of {self._job.name} goes on. F4 shows it.", markup=False)
        self.dismiss(None)

    def action_close(self) -> None:
        """End the export, if one is at work; else leave."""
        if self._at_work is not None:
            self._at_work.cancel()
            self.refresh_bindings()
            return
        if self._job is not None:
            self._exports.forget(self._job)
        self.dismiss(None)

    def _fill(self, wish: ExportRequest) -> None:
        """Fill in the form."""
        for name in PRECISIONS:
            self.query_one(f"#precision-{name}", Checkbox).value = name in wish.precisions
        for name, typed in wish.options.items():
            self.query_one(f"#option-{name}").display = True
            self.query_one(f"#option-{name} Input", Input).value = typed
        force = self.query_one("#force", Checkbox)
        force.value = force.display = wish.force

    def _wish(self) -> ExportRequest:
        options = {
            name: self.query_one(f"#option-{name} Input", Input).value
            for name in OPTIONS
            if self.query_one(f"#option-{name}").display
        }
        chosen = tuple(name for name in PRECISIONS if self.query_one(f"#precision-{name}", Checkbox).value)
        source = self.query_one("#source", Input).value.strip()
        before = self._filled
        again = before is not None and before.source == source and {*before.precisions} == {*chosen}
        validate = before is None or before.validate or not again  # what was to be quick is, the second time too
        return ExportRequest(source, chosen, options, self.query_one("#force", Checkbox).value, validate)

    def _ended(self, job: Job) -> None:
        if job.bundle is not None:
            self._take()
            return
        self._turn()
        error = job.export.error()
        self._fail(error)
        wanted = named_options(error)
        for name in wanted:
            self.query_one("#force" if name == "force" else f"#option-{name}").display = True
        self.query(Checkpoints).set(display=not wanted)  # the file is known by now
        first = next((name for name in wanted if name != "force"), None)
        self.query_one(f"#option-{first} Input" if first else "#source").focus()

    def _take(self) -> None:
        """Give the bundle, unless another screen lies over this one."""
        job = self._job
        if job is not None and job.bundle is not None and self.app.screen is self:
            self._job = None
            self._exports.forget(job)
            self.dismiss(BundleChoice(job.bundle))

    def _fail(self, error: str) -> None:
        line = self.query_one("#failure", Static)
        line.update(printable(error))
        line.display = bool(error)

    def _look(self) -> None:
        if self._at_work is not None:
            self.query_one("#progress", Static).update(_picture(self._at_work))


def _picture(export: Export) -> Content:
    """A line for each stage, those before the last one being done, and one for all of it."""
    stages, lines = export.stages(), list[Content]()
    for place, stage in enumerate(stages):
        last = place == len(stages) - 1
        share = stage.share if last else 1.0
        done = round(_BAR * (share or 0.0))
        percent = "    " if share is None else f"{share:4.0%}"
        lines.append(
            Content.assemble(
                ("▸ " if last else "✓ ", "$accent" if last else "$success"),
                printable(stage.name).ljust(13),
                ("━" * done, "$success"),
                ("━" * (_BAR - done), "$panel"),
                f" {percent} ",
                (printable(stage.detail) if last else "", "$text-muted"),
            )
        )
    word = "ending it …" if export.cancelled else "Esc cancels" if lines else "starting llm-export …"
    return Content("\n").join([*lines, Content(f"\n{export.seconds:.0f} s · {word}")])
