"""The conversation on the screen: a scroll of messages that follows what is written, unless somebody scrolls up.

Of a long conversation the last messages have a view at first. Those before get theirs when one scrolls up to them, so
that opening it, and every layout of the screen, costs what a short one costs.
"""

from __future__ import annotations

import asyncio
from typing import Final

from textual import work
from textual.containers import VerticalScroll
from textual.widgets import Static

from llm_edge.chat.history.conversation import Conversation, Message
from llm_edge.tui.widgets.message_view import MessageView

EMPTY = "A new conversation.\n\nF5 has questions to begin with, F3 the model's parameters, F1 all keys."
AT_ONCE: Final = 40  # messages that get a view together
_LAYOUTS, _MOMENT = 100, 0.01  # looks at whether they are laid out, and seconds between two


class ChatView(VerticalScroll, can_focus=False):
    """Views of the messages of a conversation's path, at least of the last ones."""

    def __init__(self) -> None:
        super().__init__(id="chat")
        self._code_theme = "monokai"
        self._conversation = Conversation()
        self._earlier: list[Message] = []  # that have no view yet
        self._growing = False  # some of them are getting theirs
        self._homeward = False  # all of them shall get theirs

    @property
    def views(self) -> list[MessageView]:
        """Those on the screen, in order."""
        return [child for child in self.children if isinstance(child, MessageView)]

    @property
    def earlier(self) -> int:
        """How many messages before those on the screen have no view yet."""
        return len(self._earlier)

    def view(self, message: Message) -> MessageView | None:
        """The view of a message."""
        return next((view for view in self.views if view.message.id == message.id), None)

    async def show(self, conversation: Conversation) -> None:
        """Show the path of a conversation; views of messages that stay, stay."""
        path = conversation.path()
        views = self.views
        first = _place(path, views[0].message) if views else None
        if first is None:
            first = max(len(path) - AT_ONCE, 0)
        same = 0
        while same < min(len(path) - first, len(views)) and views[same].message is path[first + same]:
            same += 1
        self._conversation, self._earlier = conversation, path[:first]
        with self.app.batch_update():
            if views[same:]:
                await self.remove_children(views[same:])
            await self.remove_children(Static)
            new = self._made(path[first + same :])
            if new:
                await self.mount_all(new)
            elif not path:
                await self.mount(Static(EMPTY, id="empty", markup=False))
            self._show_branches(self.views)
        self.anchor()

    def action_scroll_home(self) -> None:
        """To the first message, which may have no view yet."""
        self._homeward = True
        super().action_scroll_home()

    def action_scroll_end(self) -> None:
        """To the last message."""
        self._homeward = False
        super().action_scroll_end()

    def watch_scroll_y(self, old_value: float, new_value: float) -> None:
        """Whoever comes near the first view will want those before it."""
        super().watch_scroll_y(old_value, new_value)
        if self._earlier and not self._growing and new_value < self.size.height:
            self._growing = True
            self._show_earlier()

    @work
    async def _show_earlier(self) -> None:
        """Give more of the earlier messages their views; what is seen stays where it is."""
        await self.stop_animation("scroll_y")
        views = self.views
        if not self._earlier or not views:
            self._growing = self._homeward = False
            return
        earlier, self._earlier = self._earlier[-AT_ONCE:], self._earlier[:-AT_ONCE]
        new = self._made(earlier)
        self._show_branches(new)
        before, seen = self.virtual_size.height, self.scroll_y
        await self.mount_all(new, before=views[0])
        for _ in range(_LAYOUTS):  # until they have their places
            if self.virtual_size.height != before:
                break
            await asyncio.sleep(_MOMENT)
        await self.stop_animation("scroll_y", complete=False)  # it was on its way to what stands elsewhere now
        if self._homeward and self._earlier:
            self._show_earlier()
            return
        self._growing = False
        at = 0 if self._homeward else seen + self.virtual_size.height - before
        self._homeward = False
        self.scroll_to(y=at, animate=False, immediate=True)

    def _made(self, messages: list[Message]) -> list[MessageView]:
        return [MessageView(message, code_theme=self._code_theme) for message in messages]

    def _show_branches(self, views: list[MessageView]) -> None:
        for view in views:
            siblings = self._conversation.siblings(view.message.id)
            view.branch = siblings.index(view.message.id) + 1, len(siblings)

    def use_code_theme(self, name: str) -> None:
        """A style of Pygments, for code in all messages."""
        self._code_theme = name
        for view in self.views:
            view.use_code_theme(name)


def _place(path: list[Message], message: Message) -> int | None:
    return next((place for place, each in enumerate(path) if each is message), None)
