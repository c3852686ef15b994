"""The conversation on the screen: a scroll of messages that follows what is written, unless somebody scrolls up."""

from __future__ import annotations

from textual.containers import VerticalScroll
from textual.widgets import Static

from llm_edge.tui.conversation import Conversation, Message
from llm_edge.tui.message_view import MessageView

EMPTY = "A new conversation.\n\nF5 has questions to begin with, F3 the model's parameters, F1 all keys."


class ChatView(VerticalScroll, can_focus=False):
    """Views of the messages of a conversation's path."""

    def __init__(self) -> None:
        super().__init__(id="chat")
        self._code_theme = "monokai"

    @property
    def views(self) -> list[MessageView]:
        """Those on the screen, in order."""
        return [child for child in self.children if isinstance(child, MessageView)]

    def view(self, message: Message) -> MessageView | None:
        """The view of a message."""
        return next((view for view in self.views if view.message.id == message.id), None)

    async def show(self, conversation: Conversation) -> None:
        """Show the path of a conversation; views of messages that stay, stay."""
        path = conversation.path()
        views = self.views
        same = 0
        while same < min(len(path), len(views)) and views[same].message is path[same]:
            same += 1
        with self.app.batch_update():
            if views[same:]:
                await self.remove_children(views[same:])
            await self.remove_children(Static)
            new = [MessageView(message, code_theme=self._code_theme) for message in path[same:]]
            if new:
                await self.mount_all(new)
            elif not path:
                await self.mount(Static(EMPTY, id="empty", markup=False))
            for view in self.views:
                siblings = conversation.siblings(view.message.id)
                view.branch = siblings.index(view.message.id) + 1, len(siblings)
        self.anchor()

    def use_code_theme(self, name: str) -> None:
        """A style of Pygments, for code in all messages."""
        self._code_theme = name
        for view in self.views:
            view.use_code_theme(name)
