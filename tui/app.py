"""`ChatApp`: the full-screen chat, with what belongs to no single screen: settings, theme, clipboard, exports."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
from collections.abc import Callable, Iterable, Mapping
from typing import Any, ClassVar

from textual.app import App, SystemCommand
from textual.binding import Binding, BindingType
from textual.screen import Screen
from textual.widgets import TextArea

from llm_edge.chat.choice import BundleChoice
from llm_edge.chat.history.conversation import ASSISTANT, USER
from llm_edge.chat.history.store import Store
from llm_edge.chat.parameters import ChatParameters
from llm_edge.chat.responder import Responder
from llm_edge.chat.session import ChatSession
from llm_edge.chat.settings import Settings
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.tui.export_manager import ExportJob, ExportManager
from llm_edge.tui.notifications import notify
from llm_edge.tui.screens.chat import ChatScreen
from llm_edge.tui.screens.help import HelpScreen
from llm_edge.tui.themes import restore_theme

_NARROW_BELOW = 110  # columns; in a narrow terminal, panels cover the conversation
_EXPORT_TIMEOUT = 20.0  # seconds; the user may be doing something else when an export ends
_TMUX_TIMEOUT = 5.0  # seconds
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


class ChatApp(App[None]):
    """The chat application.

    Args:
        store: the conversations.
        load: returns the first model; called on a worker thread.
        settings: the user's settings; None for those in the default location.
        changed: values that replace the first model's defaults, by parameter name.
    """

    TITLE = "llm-edge"
    CSS_PATH = "app.tcss"
    HORIZONTAL_BREAKPOINTS = [(0, "narrow"), (_NARROW_BELOW, "wide")]  # noqa: RUF012 (Textual's type)
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("ctrl+c", "copy_or_stop", "Copy, or stop", show=False, priority=True)
    ]

    def __init__(
        self,
        store: Store,
        load: Callable[[], Responder],
        settings: Settings | None = None,
        changed: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.settings = settings or Settings()
        self.session = ChatSession(store, ChatParameters(SamplingParams()))
        self.session.automatic_titles = True
        self.exports = ExportManager(self, self.settings, self._export_ended)
        self.chat_screen = ChatScreen(self.session, self.settings, self.exports, load, changed or {})

    def get_default_screen(self) -> ChatScreen:
        return self.chat_screen

    def on_mount(self) -> None:
        restore_theme(self, self.settings, self.chat_screen.conversation_view.use_code_theme)

    def on_unmount(self) -> None:
        """Cancel a running export, and save what there is of an answer."""
        self.exports.close()
        self.session.close()

    def get_system_commands(self, screen: Screen[Any]) -> Iterable[SystemCommand]:
        """The entries of the command palette."""
        if isinstance(screen, ChatScreen):
            for title, help_text, action in _CHAT_COMMANDS:
                yield SystemCommand(
                    title, help_text, lambda action=action: screen.call_later(screen.run_action, action)
                )
            for title, help_text, role, action in _MESSAGE_COMMANDS:
                view = next(
                    (each for each in reversed(screen.conversation_view.views) if each.message.role == role), None
                )
                if view is not None:
                    yield SystemCommand(
                        title, help_text, lambda view=view, action=action: view.call_later(view.run_action, action)
                    )
        yield SystemCommand("Theme", "Choose a color theme, such as high-contrast", self.action_change_theme)
        yield SystemCommand(
            "Help", "F1 · all keys, and where files are stored", lambda: self.call_later(self.run_action, "help")
        )
        yield SystemCommand(
            "Screenshot", "Save the screen as SVG", lambda: self.set_timer(0.1, self.deliver_screenshot)
        )
        yield SystemCommand("Quit", "Ctrl-Q · everything is saved", self.action_quit)

    def get_key_display(self, binding: Binding) -> str:
        """Show function keys in upper case, as keyboards do."""
        shown = super().get_key_display(binding)
        return shown.upper() if shown[0] == "f" and shown[1:].isdigit() else shown

    def copy_to_clipboard(self, text: str) -> None:
        """Copy with OSC 52, and through tmux, which does not accept OSC 52 by default."""
        super().copy_to_clipboard(text)
        if not self.is_web:
            self.run_worker(functools.partial(_copy_to_tmux, text), thread=True, group="clipboard")

    def action_copy_or_stop(self) -> None:
        """Copy the selection; without one, stop the answer."""
        if selected := _selected_text(self.screen):
            self.copy_to_clipboard(selected)
        elif self.session.answering is not None:
            self.session.stop()
        else:
            notify(self, "Press Ctrl-Q to quit.")

    def action_help(self) -> None:
        self.push_screen(HelpScreen({"Conversations": self.session.store.path, "Settings": self.settings.path}))

    def _export_ended(self, job: ExportJob) -> None:
        """Report an export that ended in the background; its bundle is loaded only if there is no other model."""
        loader = self.chat_screen.loader
        if job.bundle is None:
            notify(self, f"Export of {job.name} failed: {job.export.error()}\nPress F4.", "error", _EXPORT_TIMEOUT)
        elif self.session.responder is None and not loader.loading:
            self.exports.dismiss(job)
            loader.choose(BundleChoice(job.bundle))
        else:
            notify(self, f"Exported {job.bundle.name}. Press F4 to use it.", timeout=_EXPORT_TIMEOUT)


def _selected_text(screen: Screen[Any]) -> str | None:
    """Text selected with the mouse, or in the focused text area."""
    text = screen.get_selected_text()
    if not text and isinstance(screen.focused, TextArea):
        text = screen.focused.selected_text
    return text


def _copy_to_tmux(text: str) -> None:
    """Load a text into tmux's buffer, and from there into the clipboard of the outer terminal; no-op outside tmux.

    With its default `set-clipboard external`, tmux ignores OSC 52 from the programs inside it.
    """
    if not os.environ.get("TMUX") or not text or (tmux := shutil.which("tmux")) is None:
        return
    with contextlib.suppress(OSError, subprocess.SubprocessError):  # copying with OSC 52 may still have worked
        subprocess.run(  # noqa: S603 (no shell)
            [tmux, "load-buffer", "-w", "-"],
            input=text.encode("utf-8", "replace"),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            timeout=_TMUX_TIMEOUT,
            check=False,
        )
