"""The sample questions: asked at once, edited before asking, or changed in the list."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar

from textual import events
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Vertical
from textual.content import Content
from textual.message import Message as Event
from textual.screen import ModalScreen
from textual.widgets import OptionList, Static
from textual.widgets.option_list import Option

from llm_edge.chat.questions import Questions
from llm_edge.chat.text import one_line, printable
from llm_edge.runtime.errors import LlmEdgeError
from llm_edge.tui.notifications import notify
from llm_edge.tui.widgets.footer import KeyFooter
from llm_edge.tui.widgets.inputs import NEWLINE_KEYS, SafeTextArea

_MAX_LABEL = 160  # characters of a question in the list


@dataclass(frozen=True, slots=True)
class ChosenQuestion:
    """A question, to ask now or to edit first."""

    text: str
    ask_now: bool


class QuestionEditor(SafeTextArea):
    """A text area for a question: Enter saves, Ctrl-J inserts a line break, Esc cancels."""

    class Saved(Event):
        """The question is to be saved."""

    class Cancelled(Event):
        """The question is to stay as it was."""

    def __init__(self) -> None:
        super().__init__(id="question-editor", tab_behavior="focus", highlight_cursor_line=False)

    async def _on_key(self, event: events.Key) -> None:
        if event.key == "enter":
            self.post_message(self.Saved())
        elif event.key == "escape":
            self.post_message(self.Cancelled())
        elif event.key in NEWLINE_KEYS:
            self.insert("\n")
        else:
            await super()._on_key(event)
            return
        event.stop()
        event.prevent_default()


class QuestionsScreen(ModalScreen[ChosenQuestion | None]):
    """The list of sample questions; which it edits in place; dismissed with the chosen one."""

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("enter", "ask", "Ask", key_display="⏎"),
        Binding("space,tab,right", "write", "Edit before asking", key_display="space"),
        Binding("a", "add", "Add"),
        Binding("e", "edit", "Edit"),
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
        self._edited: int | None = None  # index of the question in the editor; None for a new one

    def compose(self) -> ComposeResult:
        with Vertical() as box:
            box.border_title = "Sample questions"
            box.border_subtitle = "⏎ to ask"
            yield OptionList(id="questions", markup=False)
            yield Static(
                "No questions. Press r to restore the built-in ones, or a to add your own.",
                id="questions-none",
                markup=False,
            )
            yield QuestionEditor()
            yield Static("", classes="error", markup=False)
            yield KeyFooter()

    def on_mount(self) -> None:
        self._close_editor()
        self._show(0)
        self._show_error(self._questions.trouble)

    @property
    def _list(self) -> OptionList:
        return self.query_one("#questions", OptionList)

    @property
    def _editing(self) -> bool:
        return bool(self.query_one(QuestionEditor).display)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:  # noqa: ARG002 (Textual's)
        """Disable the list's keys while a question is typed, and what does not apply."""
        if not self.is_mounted:
            return True
        if self._editing and action in ("ask", "write", "add", "edit", "delete", "undo", "move", "restore", "close"):
            return False
        if action == "undo":
            return bool(self._deleted)
        if action in ("ask", "write", "edit", "delete", "move"):
            return bool(self._shown)
        return True

    def _show(self, index: int) -> None:
        """Show the list, with a question highlighted."""
        self._shown = self._questions.all()
        self._list.set_options([Option(Content(printable(one_line(each, _MAX_LABEL)))) for each in self._shown])
        self._list.display = bool(self._shown)
        self.query_one("#questions-none").display = not self._shown
        if self._shown:
            self._list.highlighted = min(max(index, 0), len(self._shown) - 1)
            self._list.focus()
        self.refresh_bindings()

    def _change(self, change: Callable[[], int]) -> bool:
        """Change the list, and highlight the index that `change` returns; on failure, show the error."""
        try:
            index = change()
        except LlmEdgeError as error:
            self._show_error(str(error))
            return False
        self._show_error("")
        self._show(index)
        return True

    def _show_error(self, error: str) -> None:
        line = self.query_one(".error", Static)
        line.update(printable(error))
        line.display = bool(error)

    @property
    def _index(self) -> int | None:
        """The highlighted question."""
        return self._list.highlighted if self._shown else None

    # ---- choosing

    def on_option_list_option_selected(self, event: OptionList.OptionSelected) -> None:
        event.stop()
        self.dismiss(ChosenQuestion(self._shown[event.option_index], ask_now=True))

    def action_ask(self) -> None:
        if self._index is not None:
            self.dismiss(ChosenQuestion(self._shown[self._index], ask_now=True))

    def action_write(self) -> None:
        """Write the highlighted question into the composer."""
        if self._index is not None:
            self.dismiss(ChosenQuestion(self._shown[self._index], ask_now=False))

    def action_close(self) -> None:
        self.dismiss(None)

    # ---- changing the list

    def action_add(self) -> None:
        self._open_editor(None, "", "New question · ⏎ saves, Ctrl-J new line, Esc cancels")

    def action_edit(self) -> None:
        if self._index is not None:
            self._open_editor(self._index, self._shown[self._index], "Editing question · ⏎ saves, Esc cancels")

    def action_delete(self) -> None:
        index = self._index
        if index is None:
            return

        def delete() -> int:
            self._deleted.append((index, self._questions.delete(index)))
            return index

        self._change(delete)

    def action_undo(self) -> None:
        if not self._deleted:
            return
        index, text = self._deleted[-1]

        def put_back() -> int:
            self._questions.put_back(index, text)
            self._deleted.pop()
            return index

        self._change(put_back)

    def action_move(self, by: int) -> None:
        index = self._index
        if index is not None:
            self._change(lambda: self._questions.move(index, by))

    def action_restore(self) -> None:

        def restore() -> int:
            missing = self._questions.restore()
            notify(self, f"Restored {missing} questions." if missing else "All built-in questions are in the list.")
            return 0

        self._change(restore)

    def _open_editor(self, index: int | None, text: str, title: str) -> None:
        self._edited = index
        editor = self.query_one(QuestionEditor)
        editor.display = True
        editor.border_title = title
        editor.load_text(printable(text))
        editor.move_cursor(editor.document.end)
        editor.focus()
        self.query_one(KeyFooter).display = False
        self.refresh_bindings()

    def _close_editor(self) -> None:
        self.query_one(QuestionEditor).display = False
        self.query_one(KeyFooter).display = True
        self._show_error("")
        if self._shown:
            self._list.focus()
        self.refresh_bindings()

    def on_question_editor_saved(self) -> None:
        text, edited = self.query_one(QuestionEditor).text, self._edited

        def save() -> int:
            if edited is None:
                return self._questions.add(text)
            self._questions.edit(edited, text)
            return edited

        if self._change(save):
            self._close_editor()

    def on_question_editor_cancelled(self) -> None:
        self._close_editor()
