"""The text area where questions are typed, with a history of earlier ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar

from textual import events
from textual.binding import Binding, BindingType
from textual.message import Message as Event

from llm_edge.chat.attachments import dropped_files, mention_of, mentions_file
from llm_edge.chat.history.conversation import Message
from llm_edge.tui.widgets.inputs import NEWLINE_KEYS, SafeTextArea
from llm_edge.tui.widgets.pasted import PastedTexts

_PAGES = {"pageup": -1, "pagedown": 1}


class Composer(SafeTextArea):
    """A text area that submits its text on Enter; Ctrl-J, and in some terminals Shift-Enter, inserts a line break.

    Up on the first line and Down on the last one go through earlier questions. A long text is shown as a label; `text`
    contains it whole. `has_queue` returns whether a question waits, which Up in an empty composer asks for.

    Attributes:
        editing: the question that the text will replace; None for a new question.
    """

    BINDINGS: ClassVar[list[BindingType]] = [Binding("enter", "submit", "Send", priority=False, key_display="⏎")]

    class Submitted(Event):
        """A text, possibly empty, was submitted. In `typed`, labels stand for long pasted texts."""

        def __init__(self, text: str, typed: str | None = None) -> None:
            super().__init__()
            self.text = text
            self.typed = text if typed is None else typed

    class UndoRequested(Event):
        """Undo was pressed in an empty composer."""

    class QueuedWanted(Event):
        """Up was pressed in an empty composer while a question waits in the queue."""

    class ScrollRequested(Event):
        """The conversation is to be scrolled by this many pages, since all of the composer's text is visible."""

        def __init__(self, pages: int) -> None:
            super().__init__()
            self.pages = pages

    def __init__(
        self,
        placeholder: str = "Ask a question. ⏎ to send, Ctrl-J for a new line, F1 for help.",
        has_queue: Callable[[], bool] = lambda: False,
    ) -> None:
        self._pasted = PastedTexts()
        super().__init__(
            id="composer",
            soft_wrap=True,
            show_line_numbers=False,
            highlight_cursor_line=False,
            tab_behavior="focus",
            placeholder=placeholder,
        )
        self.editing: Message | None = None
        self._has_queue = has_queue
        self._draft = ""  # the text before a question was edited
        self._history: list[str] = []
        self._index = 0  # in the history; len(history) means the unsent text
        self._unsent = ""

    @property
    def text(self) -> str:
        """The text, with long pasted texts whole."""
        return self._pasted.whole(self.document.text)

    @text.setter
    def text(self, text: str) -> None:
        self.load_text(text)

    def load_text(self, text: str) -> None:
        """Replace the text; a long one is shown as a label."""
        super().load_text(self._pasted.shortened(text))

    def whole(self, typed: str) -> str:
        """A typed text with long pasted texts in place of their labels."""
        return self._pasted.whole(typed)

    def set_history(self, questions: Sequence[str]) -> None:
        """Offer earlier questions, the latest one last."""
        self._history = [*dict.fromkeys(reversed(questions))][::-1]
        self._index = len(self._history)

    def write(self, text: str) -> None:
        """Replace the text and focus its end."""
        self.load_text(text)
        self.move_cursor(self.document.end)
        self.focus()

    def edit_question(self, question: Message, text: str) -> None:
        """Edit the text of a question that was asked; what was typed so far returns after `stop_editing`."""
        if self.editing is None:
            self._draft = self.text
        self.editing = question
        self.border_title = "Editing question · Esc cancels"
        self.write(text)

    def stop_editing(self, *, keep_text: bool = False) -> None:
        """Stop editing a question, if one is edited; `keep_text` leaves its text in the composer."""
        if self.editing is None:
            return
        self.editing = None
        self.border_title = ""
        if not keep_text:
            self.write(self._draft)

    def action_submit(self) -> None:
        text, typed = self.text, self.document.text
        if text.strip():
            self.set_history([*self._history, text])
        self._index, self._unsent = len(self._history), ""
        self.load_text("")
        self.post_message(self.Submitted(text, typed))

    def action_undo(self) -> None:
        """Undo the last edit; with no text and nothing to undo, post `UndoRequested`."""
        before = self.text
        super().action_undo()
        if not before and not self.text:
            self.post_message(self.UndoRequested())

    def action_delete_left(self) -> None:
        """Delete the character before the cursor, or the whole label of a long text."""
        if not self._delete_label(before=True):
            super().action_delete_left()

    def action_delete_right(self) -> None:
        """Delete the character at the cursor, or the whole label of a long text."""
        if not self._delete_label(before=False):
            super().action_delete_right()

    def _delete_label(self, *, before: bool) -> bool:
        row, column = self.cursor_location
        label = self._pasted.label_at(self.document.get_line(row), column, before=before)
        if label is None or not self.selection.is_empty:
            return False
        self.delete((row, label[0]), (row, label[1]))
        return True

    async def _on_paste(self, event: events.Paste) -> None:
        await super()._on_paste(event)
        if paths := dropped_files(event.text):
            event.text = "".join(f"{mention_of(path)} " for path in paths)
        else:  # a label also keeps a pasted text from attaching files that it mentions
            always = mentions_file(event.text)
            event.text = self._pasted.shortened(event.text, len(self.document.text), always=always)
        # TextArea's handler runs next.

    async def _on_key(self, event: events.Key) -> None:
        row, _ = self.cursor_location
        if event.key == "enter":
            self.action_submit()
        elif event.key in NEWLINE_KEYS:
            self.insert("\n")
        elif event.key == "up" and self._has_queue() and not self.document.text:
            self.post_message(self.QueuedWanted())
        elif event.key == "up" and row == 0 and self._index > 0:
            self._recall(-1)
        elif event.key == "down" and row == self.document.line_count - 1 and self._index < len(self._history):
            self._recall(1)
        elif event.key in _PAGES and self.wrapped_document.height <= self.size.height:
            self.post_message(self.ScrollRequested(_PAGES[event.key]))
        else:
            return  # Textual calls the base class's handler next
        event.stop()
        event.prevent_default()

    def _recall(self, step: int) -> None:
        """Show an earlier or a later question."""
        if self._index == len(self._history):
            self._unsent = self.text
        self._index += step
        recalled = self._history[self._index] if self._index < len(self._history) else self._unsent
        self.load_text(recalled)
        self.move_cursor(self.document.end)
