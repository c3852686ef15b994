"""The entries of the command palette."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from textual.app import App, SystemCommand
from textual.screen import Screen

from llm_edge.chat.history.conversation import ASSISTANT, USER
from llm_edge.tui.screens.chat import ChatScreen

# Title, help and the action of `ChatScreen`.
_CHAT_COMMANDS = (
    ("New conversation", "Ctrl-N · Ctrl-Z returns to the previous one", "new"),
    ("Conversations", "F2 · search, open, rename, pin, delete, export, import", "history"),
    ("Parameters", "F3 · temperature, system prompt, presets …", "parameters"),
    ("Models", "F4 · choose a model, export one, or connect to an endpoint", "models"),
    ("Questions", "F5 · sample questions", "questions"),
    ("Token view", "F6 · the probability of each token, and the alternatives", "tokens"),
    ("Compare", "F7 · ask two models, or one with two settings", "compare"),
    ("Regenerate", "Ctrl-R · answer the last question again", "regenerate"),
    ("Continue", "Ctrl-G · continue the last answer", "continue"),
    ("Stop", "Esc · stop the answer", "stop"),
)
# Title, help, the message's role and the action of `MessageView`.
_MESSAGE_COMMANDS = (
    ("Copy answer", "Copy the last answer as Markdown", ASSISTANT, "copy"),
    ("Copy code", "Copy a code block of the last answer; again for the next block", ASSISTANT, "copy_code"),
    ("Quote answer", "Quote the last answer in your question", ASSISTANT, "request('quote')"),
    ("Edit question", "Edit the last question; its answer stays as another version", USER, "request('edit')"),
)


def system_commands(app: App[Any], screen: Screen[Any]) -> Iterable[SystemCommand]:
    """The commands that are available on a screen."""
    if isinstance(screen, ChatScreen):
        for title, help_text, action in _CHAT_COMMANDS:
            yield SystemCommand(title, help_text, lambda action=action: screen.call_later(screen.run_action, action))
        for title, help_text, role, action in _MESSAGE_COMMANDS:
            view = next((each for each in reversed(screen.conversation_view.views) if each.message.role == role), None)
            if view is not None:
                yield SystemCommand(
                    title, help_text, lambda view=view, action=action: view.call_later(view.run_action, action)
                )
    yield SystemCommand("Theme", "Choose a color theme, such as high-contrast", app.action_change_theme)
    yield SystemCommand(
        "Help", "F1 · all keys, and where files are stored", lambda: app.call_later(app.run_action, "help")
    )
    yield SystemCommand("Screenshot", "Save the screen as SVG", lambda: app.set_timer(0.1, app.deliver_screenshot))
    yield SystemCommand("Quit", "Ctrl-Q · everything is saved", app.action_quit)
