"""The drop-down of ready-made questions: asked at once, put into the composer, or changed. Knows no model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.message import Message as Event
from textual.screen import ModalScreen
from textual.widgets import Footer, OptionList, Static, TextArea
from textual.widgets.option_list import Option

from llm_edge.chat.questions import Questions
from llm_edge.chat.text import one_line, printable
from llm_edge.runtime.errors import LlmEdgeError
from llm_edge.tui.widgets.composer import Composer

if TYPE_CHECKING:
    from llm_edge.tui.app import ChatApp

_WIDTH = 160  # characters of a question that show in the list


@dataclass(frozen=True, slots=True)
class Chosen:
    """A question, to be asked at once or to be edited first."""

    text: str
    at_once: bool


class Wording(TextArea):
    """Where a question is written; Enter keeps it, Ctrl-J begins a new line, Esc leaves it as it was."""

    class Kept(Event):
        """It is meant so."""

    class Left(Event):
        """It is not."""

    def __init__(self) -> None:
        super().__init__(id="wording", tab_behavior="focus", highlight_cursor_line=False)

    async def _on_key(self, event: events.Key) -> None:
        if event.key == "enter":
            self.post_message(self.Kept())
        elif event.key == "escape":
            self.post_message(self.Left())
        elif event.key in ("ctrl+j", "shift+enter", "alt+enter"):
            self.insert("\n")
        else:
            await super()._on_key(event)
            return
        event.stop()
        event.prevent_default()

    async def _on_paste(self, event: events.Paste) -> None:
        event.text = printable(event.text.replace("\r\n", "\n").replace("\r", "\n"))  # Textual goes on from there


class QuestionsScreen(ModalScreen[Chosen | None]):
    """See the module; dismissed with what was chosen."""

    DEFAULT_CSS = """
    QuestionsScreen { align: center bottom; background: $background 40%; }
    QuestionsScreen > Vertical { width: 1fr; max-width: 100; height: auto; max-height: 100%; background: $surface;
        border: round $accent; margin: 0 2; }
    QuestionsScreen #questions { height: auto; max-height: 12; border: none; background: $surface; }
    QuestionsScreen #questions-none { padding: 1 2; color: $text-muted; }
    QuestionsScreen #wording { height: 6; }
    QuestionsScreen .error { color: $error; padding: 0 1; }
    QuestionsScreen Footer { dock: none; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "ask", "Ask", key_display="⏎"),
        Binding("space,tab,right", "write", "Edit before asking", key_display="space"),
        Binding("a", "add", "Add"),
        Binding("e", "edit", "Change"),
        Binding("d,delete", "delete", "Delete", key_display="d"),
        Binding("u,ctrl+z", "undo", "Undo", key_display="u"),
        Binding("shift+up", "move(-1)", "Move up", show=False),
        Binding("shift+down", "move(1)", "Move down", show=False),
        Binding("r", "restore", "Restore"),
        Binding("escape,f5", "close", "Close", key_display="esc"),
    ]

    def __init__(self, questions: Questions) -> None:
        super().__init__()
        self._questions = questions
        self._shown: list[str] = []
        self._deleted: list[tuple[int, str]] = []
        self._editing: int | None = None  # the place of what is written; None = it is a new one

    def compose(self) -> ComposeResult:
        """The list, and where a question is written."""
        with Vertical() as box:
            box.border_title = "Quick questions"
            box.border_subtitle = "⏎ asks at once"
            yield OptionList(id="questions", markup=False)
            yield Static(
                "None are left: r brings back those that were here, a adds one of yours.",
                id="questions-none",
                markup=False,
            )
            yield Wording()
            yield Static("", classes="error", markup=False)
            yield Footer(compact=True, show_command_palette=False)

    def on_mount(self) -> None:
        """Choose at once."""
        self._close_wording()
        self._show(0)
        self._say(self._questions.trouble)

    @property
    def _list(self) -> OptionList:
        return self.query_one("#questions", OptionList)

    @property
    def _writing(self) -> bool:
        return bool(self.query_one(Wording).display)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:  # noqa: ARG002 (Textual's)
        """While a question is written, keys are letters."""
        if not self.is_mounted:
            return True
        if self._writing and action in ("ask", "write", "add", "edit", "delete", "undo", "move", "restore", "close"):
            return False
        if action == "undo":
            return bool(self._deleted)
        if action in ("ask", "write", "edit", "delete", "move"):
            return bool(self._shown)
        return True

    def _show(self, place: int) -> None:
        self._shown = self._questions.all()
        self._list.set_options([Option(Content(printable(one_line(each, _WIDTH)))) for each in self._shown])
        self._list.display = bool(self._shown)
        self.query_one("#questions-none").display = not self._shown
        if self._shown:
            self._list.highlighted = min(max(place, 0), len(self._shown) - 1)
            self._list.focus()
        self.refresh_bindings()

    def _do(self, change: Callable[[], int]) -> bool:
        """Change the list; says whether that could be, and if not, tells why."""
        try:
            place = change()
        except LlmEdgeError as error:
            self._say(str(error))
            return False
        self._say("")
        self._show(place)
        return True

    def _say(self, why: str) -> None:
        line = self.query_one(".error", Static)
        line.update(printable(why))
        line.display = bool(why)

    @property
    def _place(self) -> int | None:
        return self._list.highlighted if self._shown else None

    # ---- choose

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        """Enter on a question, or a click."""
        event.stop()
        self.dismiss(Chosen(self._shown[event.option_index], at_once=True))

    def action_ask(self) -> None:
        """Where the list does not have the focus."""
        if self._place is not None:
            self.dismiss(Chosen(self._shown[self._place], at_once=True))

    def action_write(self) -> None:
        """To the composer."""
        if self._place is not None:
            self.dismiss(Chosen(self._shown[self._place], at_once=False))

    def action_close(self) -> None:
        """None of them."""
        self.dismiss(None)

    # ---- change

    def action_add(self) -> None:
        """Write a new one."""
        self._open_wording(None, "", "A new question: ⏎ keeps it, Ctrl-J begins a new line, Esc leaves")

    def action_edit(self) -> None:
        """Write another wording."""
        if self._place is not None:
            self._open_wording(self._place, self._shown[self._place], "Another wording: ⏎ keeps it, Esc leaves")

    def action_delete(self) -> None:
        """Take it out."""
        place = self._place
        if place is None:
            return

        def delete() -> int:
            self._deleted.append((place, self._questions.delete(place)))
            return place

        self._do(delete)

    def action_undo(self) -> None:
        """What was deleted last comes back."""
        if not self._deleted:
            return
        place, text = self._deleted[-1]

        def put_back() -> int:
            self._questions.put_back(place, text)
            self._deleted.pop()
            return place

        self._do(put_back)

    def action_move(self, by: int) -> None:
        """Up or down in the list."""
        place = self._place
        if place is not None:
            self._do(lambda: self._questions.move(place, by))

    def action_restore(self) -> None:
        """Those of the program come back."""

        def restore() -> int:
            missing = self._questions.restore()
            self.notify(f"{missing} brought back." if missing else "They are all there.", markup=False)
            return 0

        self._do(restore)

    def _open_wording(self, place: int | None, text: str, title: str) -> None:
        self._editing = place
        wording = self.query_one(Wording)
        wording.display = True
        wording.border_title = title
        wording.load_text(printable(text))
        wording.move_cursor(wording.document.end)
        wording.focus()
        self.query_one(Footer).display = False
        self.refresh_bindings()

    def _close_wording(self) -> None:
        self.query_one(Wording).display = False
        self.query_one(Footer).display = True
        self._say("")
        if self._shown:
            self._list.focus()
        self.refresh_bindings()

    def on_wording_kept(self) -> None:
        """What was written joins the list."""
        text, editing = self.query_one(Wording).text, self._editing

        def keep() -> int:
            if editing is None:
                return self._questions.add(text)
            self._questions.edit(editing, text)
            return editing

        if self._do(keep):
            self._close_wording()

    def on_wording_left(self) -> None:
        """It does not."""
        self._close_wording()


def show_questions(app: ChatApp) -> None:
    """Open the drop-down over the chat, and do what was chosen there."""

    async def done(chosen: Chosen | None) -> None:
        composer = app.composer
        if chosen is None:
            return
        if chosen.at_once and app.editing is None:
            composer.post_message(Composer.Sent(chosen.text))
        else:
            composer.write("\n\n".join(filter(None, [composer.text.rstrip(), chosen.text])))

    app.push_screen(QuestionsScreen(Questions(app.settings)), done)
