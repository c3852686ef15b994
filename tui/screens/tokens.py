"""The tokens of an answer: how probable each was, what else could have come, and what the parameters leave of that.

Knows no model: it reads the records that an answer left, see `SamplingParams.logprobs`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ClassVar

from rich.cells import cell_len, set_cell_size
from rich.style import Style
from rich.text import Text
from textual.app import ComposeResult
from textual.binding import Binding, BindingType
from textual.containers import Container, Grid, VerticalScroll
from textual.screen import ModalScreen
from textual.widgets import Footer, Static

from llm_edge.chat.candidates import Candidate, candidates
from llm_edge.chat.history.conversation import ASSISTANT, Message
from llm_edge.chat.parameters import EDITABLE, ChatParameters
from llm_edge.chat.text import printable
from llm_edge.chat.token_records import TokenRecord
from llm_edge.runtime.errors import LlmEdgeError, ParameterError
from llm_edge.tui.themes import coloured
from llm_edge.tui.widgets.message_view import MessageView
from llm_edge.tui.widgets.parameter_panel import ParameterChanged, ParameterLine
from llm_edge.tui.widgets.token_text import TokenText, visible

if TYPE_CHECKING:
    from llm_edge.tui.app import ChatApp

KEPT = 10  # runners-up that are kept from here on where none were
_LOOK = 0.25  # seconds between two looks at an answer that grows
_TURNED_HERE = ("temperature", "top_k", "top_p", "min_p")
_NAME, _BAR = 16, 14  # columns

_NO_RECORD = """\
This answer has no record of its tokens.

A record is kept while an answer is made, if 'Token view' among the parameters (F3) is a number: so many runners-up \
of each token are kept with it.

Press r to turn it on and have the answer made again, beside this one."""


class TokensScreen(ModalScreen[bool]):
    """See the module; dismissed with whether the answer is to be made again with a record.

    Args:
        message: the answer.
        records: of its tokens; may grow.
        parameters: the parameters of now.
        turn: turns them; see `ChatSession.turn`.
        why_not: why there is nothing to be seen, if that has another reason than that there are no records.
    """

    DEFAULT_CSS = """
    TokensScreen { layout: vertical; background: $background; }
    TokensScreen #tokens-title { height: 1; padding: 0 1; background: $panel; text-style: bold;
        text-wrap: nowrap; text-overflow: ellipsis; }
    TokensScreen #tokens-none { padding: 2 4; }
    TokensScreen #tokens { layout: vertical; height: 1fr; }
    TokensScreen TokenText { padding: 0 1; }
    TokensScreen #token-side { height: 12; padding: 0 1; border-top: solid $panel-lighten-2; }
    TokensScreen #token-parameters { grid-size: 2; grid-gutter: 0 2; height: 2; margin: 0 0 1 0; }
    TokensScreen #token-parameters .parameter-title { width: 13; }
    TokensScreen #runners-up { height: 1fr; scrollbar-size-vertical: 1; }
    TokensScreen.wide #tokens { layout: horizontal; }
    TokensScreen.wide #token-side { height: 1fr; width: 64; border-top: none; border-left: solid $panel-lighten-2; }
    """
    BINDINGS: ClassVar[list[BindingType]] = [
        Binding("r", "record", "Make it again with a record"),
        Binding("escape,f6,q", "close", "Close", key_display="esc"),
        Binding("f1", "app.help", "Help", show=False),
        Binding("ctrl+c", "app.copy_or_stop", "Copy", show=False, priority=True),
        Binding("ctrl+q", "app.quit", "Quit", show=False, priority=True),
    ]

    def __init__(
        self,
        message: Message,
        records: Sequence[TokenRecord],
        parameters: ChatParameters,
        turn: Callable[[Callable[[ChatParameters], None]], None],
        why_not: str = "",
    ) -> None:
        super().__init__()
        self._message, self._records = message, records
        self._parameters, self._turn, self._why_not = parameters, turn, why_not
        self._texts: list[str] = []

    def compose(self) -> ComposeResult:
        """The text, what else could have come, and what has a say in that."""
        yield Static("", id="tokens-title", markup=False)
        if self._why_not or not self._records:
            yield Static(printable(self._why_not or _NO_RECORD), id="tokens-none", markup=False)
        else:
            with Container(id="tokens"):
                yield TokenText()
                with Container(id="token-side"):
                    with Grid(id="token-parameters"):
                        for name in _TURNED_HERE:
                            yield ParameterLine(EDITABLE[name], printable(self._parameters.text(name)))
                    with VerticalScroll(id="runners-up", can_focus=False):
                        yield Static("", id="runners-up-text", markup=False)
        yield Footer(compact=True, show_command_palette=False)

    def on_mount(self) -> None:
        """Begin at the first token."""
        title = f"Tokens of what {self._message.model or 'the model'} said"
        if self._why_not or not self._records:
            self.query_one("#tokens-title", Static).update(printable(title))
            return
        self._grow()
        for line in self.query(ParameterLine):
            line.show(self._parameters)
        self.query_one(TokenText).focus()
        self._show_candidates()
        self.set_interval(_LOOK, self._grow)

    def check_action(self, action: str, parameters: tuple[object, ...]) -> bool | None:  # noqa: ARG002 (Textual's)
        """An answer with a record need not be made again for one."""
        return action != "record" or (not self._records and not self._why_not)

    def _grow(self) -> None:
        records = self._records
        if len(records) == len(self._texts) or not self.query(TokenText):
            return
        self._texts += [record.text(record.logprob.token) for record in records[len(self._texts) :]]
        logprobs = [record.logprob.logprob for record in records]
        self.query_one(TokenText).put(self._texts, logprobs)
        mean = sum(logprobs) / len(logprobs)
        title = f"Tokens of what {self._message.model or 'the model'} said · {len(records)} · "
        title += f"perplexity {math.exp(min(-mean, 99)):.3g} · the darker the shade, the less probable"
        self.query_one("#tokens-title", Static).update(printable(title))

    # ---- what else could have come

    def on_token_text_moved(self) -> None:
        """Another token."""
        self._show_candidates()

    def on_turned(self, event: ParameterChanged) -> None:
        """A parameter was turned: from now on the chat has it so, too."""
        event.stop()
        try:
            self._turn(event.change)
        except ParameterError as error:
            self.notify(printable(str(error)), severity="warning", markup=False)
        for line in self.query(ParameterLine):
            line.show(self._parameters)
        self._show_candidates()

    def _show_candidates(self) -> None:
        record = self._records[self.query_one(TokenText).cursor]
        own = record.logprob
        found = candidates(own, self._parameters.params)
        text = Text(no_wrap=True)
        text.append(f"{'token':<{_NAME}} {'':<{_BAR}} {'model':>7} {'drawn':>9}\n", Style(dim=True))
        if not found:
            text.append(f"{_cells(visible(self._texts[self.query_one(TokenText).cursor]), _NAME)} ", Style(bold=True))
            chance = math.exp(min(own.logprob, 0))
            text.append(f"{_bar(chance)} {_percent(chance)}\n\n")
            text.append("No runners-up were kept: turn 'Token view' (F3) up to see them.", Style(dim=True))
        for each in found:
            name = "all others" if each.token is None else visible(record.text(each.token))
            self._append(text, each, name)
        if any(each.token is None for each in found):
            text.append("What happens to all others is an estimate.\n", Style(dim=True))
        self.query_one("#runners-up-text", Static).update(text)
        self.query_one("#runners-up").scroll_home(animate=False)

    def _append(self, text: Text, each: Candidate, name: str) -> None:
        variables = self.app.theme_variables
        colour = coloured(variables, "accent" if each.drawn else "primary")
        style = Style(dim=bool(each.cut) or each.token is None, bold=each.drawn, strike=bool(each.cut))
        shown = _cells(name, _NAME).rstrip()
        text.append(shown, style)
        text.append(" " * (_NAME + 1 - cell_len(shown)))
        text.append(_bar(each.before), Style(dim=True) if each.cut else colour)
        text.append(f" {_percent(each.before)} ", Style(dim=bool(each.cut)))
        if each.cut:
            title = "greedy" if each.cut == "greedy" else EDITABLE[each.cut].title
            text.append(f"  cut by {title}", coloured(variables, "warning"))
        else:
            text.append(f"→ {_percent(each.after)}")
        text.append("  ◂ came\n" if each.drawn else "\n", Style(bold=True))

    # ---- leave

    def action_close(self) -> None:
        """Back to the chat."""
        self.dismiss(False)

    def action_record(self) -> None:
        """Have the answer made again, with a record."""
        self.dismiss(True)


def show_tokens(app: ChatApp, message: Message | None = None) -> None:
    """Open the view of an answer's tokens; of None, of the answer that has the focus, or else of the last one."""
    session = app.session
    if message is None:
        focused = app.home.focused
        message = focused.message if isinstance(focused, MessageView) else None
    if message is None or message.role != ASSISTANT:
        answers = [each for each in session.conversation.path() if each.role == ASSISTANT]
        if not answers:
            app.say("There is no answer yet whose tokens could be looked at.")
            return
        message = answers[-1]
    answer, records, why_not = message, list[TokenRecord](), ""
    try:
        records = session.record_of(answer)
    except LlmEdgeError as error:
        why_not = str(error)

    async def done(again: bool | None) -> None:
        app.controls.show()
        if again:
            try:
                session.apply_change(lambda parameters: parameters.set("logprobs", KEPT))
            except LlmEdgeError as error:
                app.say(str(error), "warning")
                return
            app.controls.show()
            await app.answering(lambda session: session.regenerate(answer))

    app.push_screen(TokensScreen(answer, records, session.parameters, session.apply_change, why_not), done)


def _percent(chance: float) -> str:
    shown = 100 * chance
    return f"{shown:6.2f}%" if shown >= 0.005 or not chance else "<0.01%".rjust(7)


def _bar(chance: float) -> str:
    """A bar of eighths."""
    eighths = round(min(max(chance, 0.0), 1.0) * _BAR * 8)
    full, part = divmod(eighths, 8)
    return ("█" * full + (" ▏▎▍▌▋▊▉"[part] if part else "")).ljust(_BAR)


def _cells(text: str, width: int) -> str:
    if cell_len(text) > width:
        text = set_cell_size(text, width - 1) + "…"
    return set_cell_size(text, width)
