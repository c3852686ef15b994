"""What the command palette offers, each with a line on what it does. Knows what the application can do by name."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from textual.app import SystemCommand
from textual.screen import Screen

from llm_edge.chat.history.conversation import ASSISTANT, USER
from llm_edge.tui import message_actions

if TYPE_CHECKING:
    from llm_edge.tui.app import ChatApp

_ACTIONS = (
    ("New conversation", "Ctrl-N · Ctrl-Z brings the one before back", "new"),
    ("Conversations", "F2 · search, open, rename, pin, delete, export, import", "history"),
    ("Parameters", "F3 · temperature, system prompt, presets …", "controls"),
    ("Models", "F4 · choose one, make one of a file or of Hugging Face, connect to an endpoint", "models"),
    ("Questions", "F5 · ready-made ones", "questions"),
    ("Token view", "F6 · how probable each token was, and what else could have come", "tokens"),
    ("Compare", "F7 · one question to two models, or with two settings", "compare"),
    ("Regenerate", "Ctrl-R · another answer to the last question", "regenerate"),
    ("Go on", "Ctrl-G · more of the last answer", "go_on"),
    ("Stop", "Esc · end the answer that is on its way", "stop"),
)
_MESSAGES = (
    ("Copy answer", "the last one, as it was written", ASSISTANT, "copy"),
    ("Copy code", "the last answer's, the next block each time", ASSISTANT, "copy_code"),
    ("Quote answer", "the last one, in what you write", ASSISTANT, "quote"),
    ("Edit question", "the last one; its answer becomes another version", USER, "edit"),
)


def commands(app: ChatApp, screen: Screen[Any]) -> Iterable[SystemCommand]:
    """Those that can be used on a screen."""
    if screen is app.home:
        for title, what, action in _ACTIONS:
            yield SystemCommand(title, what, lambda action=action: app.call_later(app.run_action, action))
        for title, what, role, wish in _MESSAGES:
            view = next((each for each in reversed(app.chat.views) if each.message.role == role), None)
            if view is not None:
                yield SystemCommand(
                    title, what, lambda view=view, wish=wish: app.call_later(message_actions.do, app, view, wish)
                )
    yield SystemCommand("Theme", "colours of all, high contrast among them", app.action_change_theme)
    yield SystemCommand("Help", "F1 · all keys, and where things are kept", app.action_help)
    yield SystemCommand(
        "Screenshot", "a picture of the screen, as SVG", lambda: app.set_timer(0.1, app.deliver_screenshot)
    )
    yield SystemCommand("Quit", "Ctrl-Q · all is kept", app.action_quit)
