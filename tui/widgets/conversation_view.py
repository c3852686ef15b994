"""The messages of the conversation, scrolled to the end of a growing answer unless the user scrolls up.

Only the last messages of a long conversation are mounted at first; earlier ones follow when the user scrolls up.
Opening and laying out a long conversation therefore cost no more than for a short one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from typing import Any, Final

from textual import work
from textual.app import ComposeResult
from textual.containers import VerticalScroll
from textual.message import Message as Event
from textual.timer import Timer
from textual.widget import Widget
from textual.widgets import Static

from llm_edge.chat.history.conversation import ASSISTANT, Message
from llm_edge.chat.session import ChatSession
from llm_edge.runtime.errors import LlmEdgeError
from llm_edge.tui.notifications import notify
from llm_edge.tui.widgets.message_view import MessageView

EMPTY = "New conversation\n\nF5: sample questions · F3: parameters · F1: all keys"
BATCH_SIZE: Final = 40  # messages that are mounted together
_SHORTEST_INTERVAL, _LONGEST_INTERVAL = 1 / 20, 1 / 4  # seconds between polls of a growing answer
_MAX_SHARE = 0.03  # of the time may be spent polling and drawing, so that most of it is left to generation
_LAYOUT_CHECKS, _LAYOUT_INTERVAL = 100, 0.01  # how often, and after how many seconds, a finished layout is checked for


class _Floor(Widget):
    """An empty layer as high as the view.

    Textual scrolls an anchored container to the end of its content even if that is shorter than the container, which
    would put a short conversation at the bottom.
    """

    def render(self) -> str:
        return ""


class ConversationView(VerticalScroll, can_focus=False):
    """Views of the messages on the conversation's current path, at least of the last ones."""

    class AnswerEnded(Event):
        """The answer is complete, was stopped, or failed."""

        def __init__(self, message: Message) -> None:
            super().__init__()
            self.message = message

    def __init__(self, session: ChatSession) -> None:
        super().__init__(id="conversation")
        self._session = session
        self._code_theme = "monokai"
        self._unmounted: list[Message] = []  # messages before the first view
        self._mounting = False
        self._to_start = False  # mount all of them, and scroll to the first
        self._poll_timer: Timer | None = None
        self._throttle = _RefreshThrottle()

    def compose(self) -> ComposeResult:
        yield _Floor()

    @property
    def views(self) -> list[MessageView]:
        """The mounted views, in order."""
        return [child for child in self.children if isinstance(child, MessageView)]

    @property
    def unmounted(self) -> int:
        """How many messages before the first view are not mounted yet."""
        return len(self._unmounted)

    def view(self, message: Message) -> MessageView | None:
        """The view of a message, if it is mounted."""
        return next((view for view in self.views if view.message.id == message.id), None)

    def on_mount(self) -> None:
        self._poll_timer = self.set_interval(_SHORTEST_INTERVAL, self._poll, pause=True)

    async def show(self) -> None:
        """Show the session's conversation; views of messages that are still part of it are reused."""
        path, views = self._session.conversation.path(), self.views
        first = _index_of(path, views[0].message) if views else None
        if first is None:
            first = max(len(path) - BATCH_SIZE, 0)
        same = 0
        while same < min(len(path) - first, len(views)) and views[same].message is path[first + same]:
            same += 1
        self._unmounted = path[:first]
        with self.app.batch_update():
            if views[same:]:
                await self.remove_children(views[same:])
            await self.remove_children(Static)
            new = self._new_views(path[first + same :])
            if new:
                await self.mount_all(new)
            elif not path:
                await self.mount(Static(EMPTY, id="empty", markup=False))
            self._show_versions(self.views)
            for view in self.views:
                view.set_live(view.message is self._session.answering)
        self.anchor()

    async def show_version(self, view: MessageView, step: int) -> bool:
        """Show the next (1) or previous (-1) version of a message and what follows it; returns whether there is one."""
        conversation = self._session.conversation
        siblings = conversation.siblings(view.message.id)
        index = siblings.index(view.message.id) + step
        if not 0 <= index < len(siblings):
            return False
        try:
            self._session.select(siblings[index])
        except LlmEdgeError as error:
            notify(self, str(error), "warning")
            return False
        await self.show()
        shown = self.view(conversation.messages[siblings[index]])
        if shown is not None:
            shown.focus()
        return True

    # ---- the growing answer

    def follow_answer(self) -> None:
        """Poll the session until its answer has ended."""
        self._throttle = _RefreshThrottle()
        if self._poll_timer is not None:
            self._poll_timer.resume()

    def _poll(self) -> None:
        if not self._throttle.due or not self.is_attached or (update := self._session.poll()) is None:
            return
        self._throttle.polled()
        view = self.view(update.message)
        if view is not None:
            view.live = not update.ended
            view.changed()
        if update.ended:
            if self._poll_timer is not None:
                self._poll_timer.pause()
            self.post_message(self.AnswerEnded(update.message))

    # ---- scrolling

    def action_scroll_home(self) -> None:
        """Scroll to the first message, mounting all of them."""
        self._to_start = True
        super().action_scroll_home()

    def action_scroll_end(self) -> None:
        self._to_start = False
        super().action_scroll_end()

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        """Mount earlier messages when the first view comes near."""
        super().watch_scroll_y(old_value, new_value)
        if self._unmounted and not self._mounting and new_value < self.size.height:
            self._mounting = True
            self._mount_earlier()

    @work
    async def _mount_earlier(self) -> None:
        """Mount more of the earlier messages; what is visible stays in place."""
        await self.stop_animation("scroll_y")
        views = self.views
        if not self._unmounted or not views:
            self._mounting = self._to_start = False
            return
        earlier, self._unmounted = self._unmounted[-BATCH_SIZE:], self._unmounted[:-BATCH_SIZE]
        new = self._new_views(earlier)
        self._show_versions(new)
        height, scroll_y = self.virtual_size.height, self.scroll_y
        await self.mount_all(new, before=views[0])
        for _ in range(_LAYOUT_CHECKS):
            if self.virtual_size.height != height:
                break
            await asyncio.sleep(_LAYOUT_INTERVAL)
        await self.stop_animation("scroll_y", complete=False)  # its target has moved
        if self._to_start and self._unmounted:
            self._mount_earlier()
            return
        self._mounting = False
        target = 0 if self._to_start else scroll_y + self.virtual_size.height - height
        self._to_start = False
        self.scroll_to(y=target, animate=False, immediate=True)

    def _new_views(self, messages: list[Message]) -> list[MessageView]:
        return [MessageView(message, code_theme=self._code_theme) for message in messages]

    def _show_versions(self, views: list[MessageView]) -> None:
        """Set what views show of their place in the conversation: versions, and parameters that have changed."""
        known: dict[int, Mapping[str, Any] | None] = {}
        before: Mapping[str, Any] | None = None
        for message in self._session.conversation.path():
            if message.role == ASSISTANT:
                known[message.id], before = before, message.params
        for view in views:
            if view.known_params != (params := known.get(view.message.id)):
                view.known_params = params
                view.changed()
            siblings = self._session.conversation.siblings(view.message.id)
            view.version = siblings.index(view.message.id) + 1, len(siblings)

    def use_code_theme(self, name: str) -> None:
        """Use a Pygments style for the code in all messages."""
        self._code_theme = name
        for view in self.views:
            view.use_code_theme(name)


class _RefreshThrottle:
    """Adapts the interval between polls to the CPU time that the UI thread spends on each."""

    def __init__(self) -> None:
        self._next = 0.0
        self._spent = time.thread_time()

    @property
    def due(self) -> bool:
        """Whether it is time to poll."""
        return time.perf_counter() >= self._next

    def polled(self) -> None:
        """Schedule the next poll, later the more CPU time this thread has used since the last one."""
        spent = time.thread_time()
        cost, self._spent = spent - self._spent, spent
        self._next = time.perf_counter() + min(max(cost / _MAX_SHARE, _SHORTEST_INTERVAL), _LONGEST_INTERVAL)


def _index_of(path: list[Message], message: Message) -> int | None:
    return next((index for index, each in enumerate(path) if each is message), None)
