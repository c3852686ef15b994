"""Makes a bundle out of a file, a folder or a Hugging Face id, with the export's progress. Knows no conversation."""

from __future__ import annotations

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
from textual.widgets import Button, Checkbox, DirectoryTree, Footer, Input, Static
from textual.worker import get_current_worker

from llm_edge.runtime.errors import LlmEdgeError
from llm_edge.tui.choice import BundleChoice
from llm_edge.tui.conversation import one_line
from llm_edge.tui.exporting import OPTIONS, PRECISIONS, SUFFIXES, Export, Wish, named_options
from llm_edge.tui.terminal import printable

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
        Binding("escape", "close", "Cancel", key_display="esc"),
    ]

    def __init__(
        self, source: str = "", *, browse: bool = False, wish: Wish | None = None, command: Iterable[str] = ()
    ) -> None:
        super().__init__()
        self._source = wish.source if wish is not None else source
        self._at_once = wish
        self._browse = browse
        self._command = tuple(command)
        self._export: Export | None = None

    def compose(self) -> ComposeResult:
        """A form, and in its place, once it is sent, the progress."""
        with Vertical() as box:
            box.border_title = "Export a file or folder" if self._browse else "Export from Hugging Face"
            if self._at_once is not None:
                box.border_title = f"Make {self._source}"
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
        self.query_one("#progress").display = False
        self.query_one("#source").focus()
        self.set_interval(_LOOK, self._look)
        if self._at_once is not None:
            for name in PRECISIONS:
                self.query_one(f"#precision-{name}", Checkbox).value = name in self._at_once.precisions
            self._begin(self._at_once)

    def on_unmount(self) -> None:
        """Whoever leaves, leaves no export behind."""
        if self._export is not None:
            self._export.cancel()

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
        """One export at a time."""
        return False if action == "export" and self._export is not None else super().check_action(action, parameters)

    def action_export(self) -> None:
        """Begin."""
        if self._export is not None:
            return
        wish = self._wish()
        if not wish.source:
            self._fail(
                "what is to be exported? Give " + ("a file or a folder" if self._browse else "an id, as owner/name")
            )
            self.query_one("#source").focus()
            return
        self._begin(wish)

    def _begin(self, wish: Wish) -> None:
        try:
            self._export = Export(wish, self._command)
        except LlmEdgeError as error:
            self._fail(str(error))
            return
        self.query_one("#form").display = False
        self.query_one("#progress").display = True
        self.set_focus(None)
        self.refresh_bindings()
        self._look()
        self._wait(self._export)

    def action_close(self) -> None:
        """End the export, if one is at work; else leave."""
        if self._export is not None:
            self._export.cancel()
        else:
            self.dismiss(None)

    def _wish(self) -> Wish:
        options = {
            name: self.query_one(f"#option-{name} Input", Input).value
            for name in OPTIONS
            if self.query_one(f"#option-{name}").display
        }
        chosen = tuple(name for name in PRECISIONS if self.query_one(f"#precision-{name}", Checkbox).value)
        source = self.query_one("#source", Input).value.strip()
        return Wish(source, chosen, options, self.query_one("#force", Checkbox).value)

    @work(thread=True)
    def _wait(self, export: Export) -> None:
        path = export.result()
        if not get_current_worker().is_cancelled:
            self.app.call_from_thread(self._ended, export, path)

    def _ended(self, export: Export, path: Path | None) -> None:
        self._export = None
        if path is not None:
            self.dismiss(BundleChoice(path))
            return
        error = export.error()
        self.query_one("#form").display = True
        self.query_one("#progress").display = False
        self._fail(error)
        self.refresh_bindings()
        wanted = named_options(error)
        for name in wanted:
            self.query_one("#force" if name == "force" else f"#option-{name}").display = True
        self.query(Checkpoints).set(display=not wanted)  # the file is known by now
        first = next((name for name in wanted if name != "force"), None)
        self.query_one(f"#option-{first} Input" if first else "#source").focus()

    def _fail(self, error: str) -> None:
        line = self.query_one("#failure", Static)
        line.update(printable(error))
        line.display = bool(error)

    def _look(self) -> None:
        if self._export is not None:
            self.query_one("#progress", Static).update(_picture(self._export))


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
