"""What can be done with one message of the conversation: copy, quote, edit, make again, walk between versions."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from textual.screen import Screen
from textual.widgets import TextArea

from llm_edge.runtime.errors import LlmEdgeError
from llm_edge.tui.screens.tokens import show_tokens
from llm_edge.tui.widgets.markdown import code_blocks
from llm_edge.tui.widgets.message_view import MessageView

if TYPE_CHECKING:
    from llm_edge.tui.app import ChatApp


async def do(app: ChatApp, view: MessageView, what: str) -> None:
    """Do one of the things that a `MessageView` asks for."""
    message = view.message
    if what == "copy":
        app.copy_to_clipboard(message.content)
        app.say("Copied.")
    elif what == "copy_code":
        _copy_code(app, view)
    elif what == "quote":
        quoted = "\n".join(f"> {line}" for line in message.content.splitlines())
        composer = app.composer
        composer.write("\n\n".join(filter(None, [composer.text.rstrip(), quoted])) + "\n\n")
    elif what == "edit":
        question = message if message.role == "user" else app.session.conversation.messages.get(message.parent or 0)
        if question is not None:
            app.edit(question)
    elif what == "regenerate":
        await app.answering(lambda session: session.regenerate(message))
    elif what == "tokens":
        show_tokens(app, message)
    elif what in ("previous", "next"):
        await _walk(app, view, 1 if what == "next" else -1)


def _copy_code(app: ChatApp, view: MessageView) -> None:
    """A code block, and the next one when asked again."""
    blocks = code_blocks(view.message.content)
    if not blocks:
        app.say("There is no code in this message.")
        return
    number = view.copied_block % len(blocks)
    view.copied_block = number + 1
    app.copy_to_clipboard(blocks[number])
    which = f" block {number + 1} of {len(blocks)}" if len(blocks) > 1 else ""
    app.say(f"Copied the code{which}.")


async def _walk(app: ChatApp, view: MessageView, step: int) -> None:
    """To another version of a message, and what followed there."""
    session = app.session
    siblings = session.conversation.siblings(view.message.id)
    place = siblings.index(view.message.id) + step
    if not 0 <= place < len(siblings):
        return
    try:
        session.select(siblings[place])
    except LlmEdgeError as error:
        app.say(str(error), "warning")
        return
    await app.show()
    shown = app.chat.view(session.conversation.messages[siblings[place]])
    if shown is not None:
        shown.focus()


def marked(screen: Screen[Any]) -> str | None:
    """What is marked on a screen, with the mouse or where one writes."""
    text = screen.get_selected_text()
    if not text and isinstance(screen.focused, TextArea):
        text = screen.focused.selected_text
    return text
