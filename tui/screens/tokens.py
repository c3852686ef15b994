"""The token view: how probable each token of an answer was, the alternatives, and which of them the parameters cut."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

from rich.cells import cell_len, set_cell_size
from rich.style import Style
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container, Grid, VerticalScroll
from textual.screen import ModalScreen
from textual.widget import Widget
from textual.widgets import Static

from llm_edge.chat.candidates import Candidate, candidates
from llm_edge.chat.history.conversation import Message
from llm_edge.chat.parameters import EDITABLE, title_of
from llm_edge.chat.session import ChatSession
from llm_edge.chat.text import printable
from llm_edge.chat.token_records import TokenRecord
from llm_edge.runtime.errors import LlmEdgeError, ParameterError
from llm_edge.tui.notifications import notify
from llm_edge.tui.themes import theme_style
from llm_edge.tui.widgets.footer import KeyFooter
from llm_edge.tui.widgets.parameter_fields import (
    FieldLeft,
    ParameterChanged,
    ParameterEditor,
    ParameterFocused,
    editor_of,
)
from llm_edge.tui.widgets.token_text import TokenText, visible

ALTERNATIVES = 10  # recorded for each token of an answer that is regenerated from here
_POLL_INTERVAL = 0.25  # seconds
_PARAMETERS = ("temperature", "top_k", "top_p", "min_p")
_NAME_WIDTH, _BAR_WIDTH = 16, 14  # columns
_LOGPROBS = EDITABLE["logprobs"].title

_NO_RECORD = f"""\
The tokens of this answer were not recorded.

Tokens are recorded while '{_LOGPROBS}' (F3) is on: it is the number of alternatives to record for each token."""
_HOW_TO_RECORD = "\n\nPress r to regenerate the answer as another version, with its tokens recorded."


class TokensScreen(ModalScreen[bool]):
    """The token view; dismissed with whether to regenerate the answer with its tokens recorded.

    The answer may still be growing. `can_regenerate`: offer to regenerate an answer without a record. `recording`: its
    tokens are recorded, even if there is none yet.
    """

    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("r", "regenerate", "Regenerate, recording tokens"),
        Binding("escape,f6,q", "close", "Close", key_display="esc"),
        Binding("f1", "app.help", "Help", show=False),
        Binding("ctrl+c", "app.copy_or_stop", "Copy", show=False, priority=True),
        Binding("ctrl+q", "app.quit", "Quit", show=False, priority=True),
    ]

    def __init__(
        self, session: ChatSession, answer: Message, *, can_regenerate: bool = True, recording: bool = False
    ) -> None:
        super().__init__()
        self._session, self._answer, self._can_regenerate = session, answer, can_regenerate
        self._recording = recording
        self._records: Sequence[TokenRecord] = ()
        self._error = ""
        try:
            self._records = session.record_of(answer)
        except LlmEdgeError as error:
            self._error = str(error)
        self._texts: list[str] = []

    @property
    def _offers_recording(self) -> bool:
        return self._can_regenerate and not self._shows_tokens and not self._error

    @property
    def _shows_tokens(self) -> bool:
        """Whether there are tokens, or will be."""
        return bool(self._records) or (self._recording and self._session.answering is self._answer)

    def compose(self) -> ComposeResult:
        yield Static("", id="tokens-title", markup=False)
        if not self._shows_tokens:
            hint = self._error or _NO_RECORD + (_HOW_TO_RECORD if self._can_regenerate else "")
            yield Static(printable(hint), id="tokens-none", markup=False)
        else:
            with Container(id="tokens"):
                yield TokenText()
                with Container(id="token-side"):
                    with Grid(id="token-parameters"):
                        for name in _PARAMETERS:
                            yield editor_of(EDITABLE[name], printable(self._session.parameters.text(name)))
                    with VerticalScroll(id="alternatives", can_focus=False):
                        yield Static("", id="alternatives-text", markup=False)
        yield KeyFooter()

    def on_mount(self) -> None:
        self.query_one("#tokens-title", Static).update(printable(self._title()))
        if not self.query(TokenText):
            return
        self._poll()
        for line in self.query(ParameterEditor):
            line.show(self._session.parameters)
        self.query_one(TokenText).focus()
        self._show_alternatives()
        self.set_interval(_POLL_INTERVAL, self._poll)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:  # noqa: ARG002 (Textual's)
        return action != "regenerate" or self._offers_recording

    def _title(self) -> str:
        return f"Tokens of {self._answer.model or 'the model'}'s answer"

    def _poll(self) -> None:
        """Show tokens that were added."""
        records, first = self._records, not self._texts
        if len(records) == len(self._texts) or not self.query(TokenText):
            return
        self._texts += [record.text(record.logprob.token) for record in records[len(self._texts) :]]
        logprobs = [record.logprob.logprob for record in records]
        self.query_one(TokenText).show(self._texts, logprobs)
        perplexity = math.exp(min(-sum(logprobs) / len(logprobs), 99))
        title = f"{self._title()} · {len(records)} tokens · perplexity {perplexity:.3g} · redder: less probable"
        self.query_one("#tokens-title", Static).update(printable(title))
        if first:
            self._show_alternatives()

    # ---- alternatives

    def on_token_text_cursor_moved(self) -> None:
        self._show_alternatives()

    def on_parameter_changed(self, event: ParameterChanged) -> None:
        """Change a parameter, for this view and for the chat."""
        event.stop()
        try:
            self._session.apply_change(event.change)
        except ParameterError as error:
            notify(self, str(error), "warning")
        for line in self.query(ParameterEditor):
            line.show(self._session.parameters)
        self._show_alternatives()

    def on_parameter_focused(self, event: ParameterFocused) -> None:
        event.stop()

    def on_field_left(self, event: FieldLeft) -> None:
        """Focus the next parameter, or the tokens."""
        event.stop()
        fields: list[Widget] = [line.field for line in self.query(ParameterEditor)]
        place = fields.index(event.field) + event.step
        (fields[place] if 0 <= place < len(fields) else self.query_one(TokenText)).focus()

    def _show_alternatives(self) -> None:
        cursor = self.query_one(TokenText).cursor
        if cursor >= len(self._texts):
            return
        record, params = self._records[cursor], self._session.parameters.params
        found = candidates(record.logprob, params)
        text = Text(no_wrap=True)
        text.append(f"{'token':<{_NAME_WIDTH}} {'':<{_BAR_WIDTH}} {'model':>7} {'sampled':>9}\n", Style(dim=True))
        if not found:
            probability = math.exp(min(record.logprob.logprob, 0))
            text.append(f"{_fit(visible(self._texts[cursor]), _NAME_WIDTH)} ", Style(bold=True))
            text.append(f"{_bar(probability)} {_percent(probability)}\n\n")
            text.append(f"No alternatives were recorded. Increase '{_LOGPROBS}' (F3).", Style(dim=True))
        for each in found:
            name = "all others" if each.token is None else visible(record.text(each.token))
            self._append(text, each, name)
        if any(each.token is None for each in found):
            text.append('The "all others" row is an estimate.\n', Style(dim=True))
        self.query_one("#alternatives-text", Static).update(text)
        self.query_one("#alternatives").scroll_home(animate=False)

    def _append(self, text: Text, each: Candidate, name: str) -> None:
        variables = self.app.theme_variables
        color = theme_style(variables, "accent" if each.drawn else "primary")
        shown = _fit(name, _NAME_WIDTH).rstrip()
        text.append(shown, Style(dim=bool(each.cut) or each.token is None, bold=each.drawn, strike=bool(each.cut)))
        text.append(" " * (_NAME_WIDTH + 1 - cell_len(shown)))
        text.append(_bar(each.before), Style(dim=True) if each.cut else color)
        text.append(f" {_percent(each.before)} ", Style(dim=bool(each.cut)))
        if each.cut:
            text.append(f"  cut by {title_of(each.cut)}", Style(dim=True))
        else:
            text.append(f"→ {_percent(each.after)}")
        text.append("  ◂ chosen\n" if each.drawn else "\n", Style(bold=True))

    # ---- closing

    def action_close(self) -> None:
        self.dismiss(False)

    def action_regenerate(self) -> None:
        """Regenerate the answer, with its tokens recorded."""
        self.dismiss(True)


def _percent(probability: float) -> str:
    shown = 100 * probability
    return f"{shown:6.2f}%" if shown >= 0.005 or not probability else "<0.01%".rjust(7)


def _bar(probability: float) -> str:
    """A bar with a resolution of an eighth of a column."""
    eighths = round(min(max(probability, 0.0), 1.0) * _BAR_WIDTH * 8)
    full, rest = divmod(eighths, 8)
    return ("█" * full + (" ▏▎▍▌▋▊▉"[rest] if rest else "")).ljust(_BAR_WIDTH)


def _fit(text: str, width: int) -> str:
    """The text padded or cut to a width in columns."""
    if cell_len(text) > width:
        text = set_cell_size(text, width - 1) + "…"
    return set_cell_size(text, width)
