"""What waits to be sent: the files of the next question, and questions asked while an answer is being generated."""

from __future__ import annotations

from collections import deque

from textual.content import Content
from textual.widgets import Static

from llm_edge.chat.attachments import Attachment
from llm_edge.chat.text import one_line, printable

_MAX_SHOWN = 3  # of the questions
_MAX_LINE = 120  # characters


class Pending(Static):
    """Lines above the composer; hidden while nothing waits.

    Attributes:
        attachments: files of the next question.
        questions: questions to ask when the current answer has ended, the next one first.
    """

    def __init__(self) -> None:
        super().__init__("", id="pending", markup=False)
        self.display = False
        self.attachments: list[Attachment] = []
        self.questions: deque[str] = deque()

    def attach(self, *attachments: Attachment) -> None:
        """Add files to the next question."""
        self.attachments += [each for each in attachments if each not in self.attachments]
        self._show()

    def take_attachments(self) -> list[Attachment]:
        """Remove and return the files of the next question."""
        taken, self.attachments = self.attachments, []
        self._show()
        return taken

    def queue(self, question: str) -> None:
        """Add a question."""
        self.questions.append(question)
        self._show()

    def next_question(self) -> str | None:
        """Remove and return the next question; None if there is none."""
        question = self.questions.popleft() if self.questions else None
        self._show()
        return question

    def last_question(self) -> str:
        """Remove and return the question that was added last; there must be one."""
        question = self.questions.pop()
        self._show()
        return question

    def take_questions(self) -> list[str]:
        """Remove and return all questions."""
        taken = list(self.questions)
        self.questions.clear()
        self._show()
        return taken

    def _show(self) -> None:
        lines = [f"File {printable(each.label)} · Esc removes it" for each in self.attachments]
        shown = list(self.questions)[:_MAX_SHOWN]
        lines += [f"Next: {one_line(printable(question), _MAX_LINE)}" for question in shown]
        if len(self.questions) > len(shown):
            lines.append(f"… and {len(self.questions) - len(shown)} more")
        if shown:
            lines[-1] += "  ↑ takes it back"
        self.update(Content("\n".join(lines)))
        self.display = bool(lines)
