"""The chat application: themes, help, palette, context gauge, long conversations, and lazy imports."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from rich.style import Style
from textual.binding import Binding
from tui_driving import app_with, ask, drive, screen, shown, until, views

from llm_edge.chat.fake import FakeResponder, Said
from llm_edge.chat.history.store import Store
from llm_edge.chat.responder import tokens_of_question
from llm_edge.chat.settings import THEME, Settings
from llm_edge.runtime.errors import InputError
from llm_edge.tui.app import ChatApp
from llm_edge.tui.notifications import notify
from llm_edge.tui.screens.chat import ChatScreen
from llm_edge.tui.screens.help import KEYS, HelpScreen
from llm_edge.tui.widgets.conversation_view import BATCH_SIZE
from llm_edge.tui.widgets.markdown import MarkdownLines
from llm_edge.tui.widgets.message_view import MessageView
from llm_edge.tui.widgets.status_bar import ContextGauge, StopButton

MARKDOWN = (
    "# Head\n\n`code`, [a link](x), **bold**\n\n> quote\n\n```python\nx = 1\n```\n\n| a | b |\n|---|---|\n| 1 | 2 |\n"
)


# ---- themes


def test_the_chosen_theme_is_used_at_the_next_start(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path) as (app, pilot, _):
            await pilot.press("ctrl+p")
            await until(pilot, lambda: len(app.screen_stack) == 2)
            await pilot.press(*"theme")
            await until(pilot, lambda: "such as high-contrast" in screen(app) and "Compare" not in screen(app))
            await pilot.press("enter")
            await until(pilot, lambda: "Search for themes" in screen(app))
            await pilot.press(*"high-con")
            await until(pilot, lambda: "high-contrast" in screen(app) and "gruvbox" not in screen(app))
            await pilot.press("enter")
            await until(pilot, lambda: Settings(tmp_path).get(THEME) == "high-contrast")
        async with app_with(tmp_path) as (app, _, _):
            assert app.theme == "high-contrast"
            assert not app._notifications

    drive(scene())


def test_an_unknown_theme_is_reported(tmp_path: Path) -> None:
    Settings(tmp_path).change(THEME, lambda _: "beige")

    async def scene() -> None:
        async with app_with(tmp_path, size=(160, 40)) as (app, pilot, _):
            assert app.theme == "llm-edge-dark"
            await until(pilot, lambda: any("unknown theme 'beige'" in each.message for each in app._notifications))

    drive(scene())
    assert json.loads((tmp_path / "settings.json").read_text()) == {"theme": "beige"}


def test_all_kinds_of_themes_render_all_parts(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, Said(MARKDOWN, reasoning="So."), size=(120, 40)) as (app, pilot, _):
            app.session.parameters.set("logprobs", 3)
            await ask(pilot, "Show me all.")
            await pilot.press("f3")
            for name in ("ansi-dark", "ansi-light", "textual-light", "high-contrast"):
                assert name in app.available_themes
                app.theme = name
                await until(pilot, lambda: "Context" in screen(app) and "Temperature" in screen(app))
                await pilot.press("f6")
                await until(pilot, lambda: "◂ chosen" in screen(app))
                await pilot.press("escape")
                await until(pilot, lambda: len(app.screen_stack) == 1)

    drive(scene())


@pytest.mark.parametrize("theme", ["textual-dark", "textual-light", "high-contrast", "solarized-light", "nord"])
def test_messages_have_sufficient_contrast(tmp_path: Path, theme: str) -> None:
    """The contrast of all text is at least 3:1 by WCAG's formula, and 4.5:1 in high-contrast themes; dim text is
    rendered by the terminal."""

    def luminance(colour: tuple[int, int, int]) -> float:
        parts = [each / 255 for each in colour]
        red, green, blue = (each / 12.92 if each <= 0.03928 else ((each + 0.055) / 1.055) ** 2.4 for each in parts)
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    async def scene() -> None:
        async with app_with(tmp_path, MARKDOWN, size=(100, 40)) as (app, pilot, _):
            app.theme = theme
            await ask(pilot, "Show me `all`.")
            for view in views(app):
                for segment in (each for y in range(view.size.height) for each in view.render_line(y)):
                    style = segment.style or Style()
                    if not segment.text.strip() or style.dim:
                        continue
                    assert style.color is not None
                    assert style.bgcolor is not None
                    ink, ground = (
                        luminance(each.get_truecolor(app.ansi_theme)) for each in (style.color, style.bgcolor)
                    )
                    ratio = (max(ink, ground) + 0.05) / (min(ink, ground) + 0.05)
                    assert ratio >= (4.5 if theme == "high-contrast" else 3.0), (segment, ratio)

    drive(scene())


def test_inline_code_has_the_background_of_code_blocks() -> None:
    for theme in ("monokai", "tango"):
        lines = MarkdownLines(theme).lines("A `word`.\n\n```\nblock\n```\n", 40)
        grounds = {s.text.strip(): s.style.bgcolor for line in lines for s in line if s.style and s.text.strip()}
        assert grounds["word"] is not None
        assert grounds["word"].get_truecolor() == grounds["block"].get_truecolor()


# ---- help and palette


def test_help_lists_every_key_and_fits_a_small_terminal(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, size=(80, 24)) as (app, pilot, _):
            await pilot.press("f1")
            await until(pilot, lambda: isinstance(app.screen, HelpScreen))
            await pilot.pause()
            assert "Ctrl-P" in screen(app)
            await pilot.press("end")
            await until(pilot, lambda: "settings.json" in screen(app).replace("\n", ""))
            await pilot.press("f1")
            await until(pilot, lambda: not isinstance(app.screen, HelpScreen))
            assert app.focused is app.chat_screen.composer

    drive(scene())
    listed = {key for keys in KEYS.values() for each, _ in keys for key in each.replace(",", " ").split()}
    named = {"escape": "Esc", "space": "Space", "left_square_bracket": "[", "right_square_bracket": "]"}
    for binding in (*ChatApp.BINDINGS, *ChatScreen.BINDINGS, *MessageView.BINDINGS):
        assert isinstance(binding, Binding)
        for key in binding.key.split(","):
            name = named.get(key) or "-".join(part.title() if len(part) > 1 else part for part in key.split("+"))
            name = {"Up": "↑", "Down": "↓", "Left": "←", "Right": "→"}.get(name, name)
            name = name[:-1] + name[-1].upper() if name[-2:-1] == "-" else name
            assert name in listed, key


def test_the_palette_commands_work(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "Because.") as (app, pilot, _):
            assert "Copy answer" not in [each.title for each in app.get_system_commands(app.screen)]
            await ask(pilot, "Why?")
            await pilot.press("ctrl+p")
            await until(pilot, lambda: len(app.screen_stack) == 2)
            await pilot.press(*"quote ans")
            await until(pilot, lambda: "Quote answer" in screen(app) and "Compare" not in screen(app))
            await pilot.press("enter")
            await until(pilot, lambda: app.chat_screen.composer.text == "> Because.\n\n")
            await pilot.press("f1")
            await until(pilot, lambda: len(app.screen_stack) == 2)
            over_it = [each.title for each in app.get_system_commands(app.screen)]
            assert over_it == ["Theme", "Help", "Screenshot", "Quit"]  # commands without effect there are not offered

    drive(scene())


def test_the_footer_fits_a_small_terminal(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, size=(80, 24)) as (app, pilot, _):
            await until(pilot, lambda: "palette" in screen(app))
            last = screen(app).splitlines()[-1]
            for each in ("F1 Help", "F2 Chats", "F3 Parameters", "F4 Models", "F5 Questions"):
                assert each in last
            assert last.endswith("palette")

    drive(scene())


# ---- context gauge


def test_the_gauge_counts_the_text_being_typed(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "Fine.") as (app, pilot, _):
            gauge = app.query_one(ContextGauge)
            app.chat_screen.composer.write("How are you today?")
            await until(pilot, lambda: gauge.typed == 4 + 4)  # words, and the tokens of the fake chat template
            assert "0 + 8 typed of 4,096 tokens" in screen(app)
            await pilot.press("enter")
            await until(pilot, lambda: app.session.answering is None and gauge.typed == 0 and gauge.used == 9)
            app.chat_screen.composer.write("And you?")
            await until(pilot, lambda: gauge.typed == 2)
            assert "9 + 2 typed of 4,096" in screen(app)

    drive(scene())


@pytest.mark.parametrize(("used", "columns"), [(0, 0), (1, 1 / 8), (37, 1 / 8), (4096, 12), (8192, 24)])
def test_the_gauge_shows_the_true_proportion(tmp_path: Path, used: int, columns: float) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, size=(140, 24)) as (app, _, _):
            gauge = app.query_one(ContextGauge)
            gauge.limit, gauge.used = 8192, used
            bar = gauge._bar(24)
            primary = app.theme_variables["primary"].lower()
            filled = 0.0
            for span in bar.spans:
                style = span.style
                assert isinstance(style, Style)
                text = bar.plain[span.start : span.end]
                full = style.bgcolor is not None and style.bgcolor.get_truecolor().hex == primary
                filled += full or " ▏▎▍▌▋▊▉".index(text) / 8
            assert filled == columns

    drive(scene())


@pytest.mark.parametrize("width", [40, 60, 80, 100, 140])
def test_the_footer_shows_whole_hints_only(tmp_path: Path, width: int) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, size=(width, 24)) as (app, pilot, _):
            await pilot.pause()
            footer = screen(app).splitlines()[-1]
            hints = ["⏎ Send", "F1 Help", "F2 Chats", "F3 Parameters", "F4 Models", "F5 Questions", "^n New"]
            shown = [hint for hint in hints if hint in footer]
            assert shown == hints[: len(shown)]
            assert len(shown) >= 2
            left = footer.partition("^p")[0].rstrip("▏ ")
            assert left.endswith((*hints, "Regenerate", "Continue"))

    drive(scene())


def test_a_notification_replaces_the_one_before_and_leaves_the_composer_visible(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, size=(80, 24)) as (app, pilot, _):
            for number in range(3):
                notify(app, f"Note {number}")
            await until(pilot, lambda: "Note 2" in screen(app))
            assert "Note 1" not in screen(app)
            assert "Ask a question." in screen(app)
            lines = screen(app).splitlines()
            assert next(y for y, line in enumerate(lines) if "Note 2" in line) < 4

    drive(scene())


def test_a_short_conversation_starts_at_the_top(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "Because.", size=(80, 24)) as (app, pilot, _):
            await ask(pilot, "Why?")
            assert screen(app).splitlines()[1] == " ▌ You"
            assert app.query_one(StopButton).display is False

    drive(scene())


def test_parameters_are_shown_below_an_answer_only_where_they_change(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "Because.", size=(80, 30)) as (app, pilot, _):
            app.session.parameters.set("top_k", 3)
            await ask(pilot, "Why?")
            await ask(pilot, "Why?")
            assert screen(app).count("with top-k 3") == 1
            app.session.parameters.set("top_k", 4)
            await ask(pilot, "Why?")
            assert screen(app).count("with top-k") == 2

    drive(scene())


@pytest.mark.parametrize("width", [40, 80, 120])
def test_a_running_answer_has_a_visible_stop_button(tmp_path: Path, width: int) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "word " * 500, pause=0.02, size=(width, 24)) as (app, pilot, _):
            await ask(pilot, "Talk.", wait=False)
            await until(pilot, lambda: "■ Stop" in screen(app) and "tok/s" in screen(app).splitlines()[-2])
            await pilot.click(StopButton)
            await until(pilot, lambda: app.session.answering is None)

    drive(scene())


def test_a_question_is_counted_at_bounded_cost() -> None:
    class Counting(FakeResponder):
        longest = 0

        def count(self, messages):  # type: ignore[no-untyped-def]
            self.longest = max(self.longest, *(len(str(each["content"])) for each in messages))
            return super().count(messages)

    responder = Counting()
    assert tokens_of_question(responder, "word " * 200_000, first=False) == pytest.approx(200_000, rel=0.01)
    assert responder.longest <= 50_000
    assert tokens_of_question(responder, "  ", first=True) == 0
    assert tokens_of_question(None, "word", first=True) == 0

    class Refusing(FakeResponder):
        def count(self, messages):  # type: ignore[no-untyped-def]
            raise InputError("no")

    assert tokens_of_question(Refusing(), "word", first=True) == 0


# ---- continued answers


def test_reasoning_is_kept_when_an_answer_is_continued(tmp_path: Path) -> None:
    async def scene() -> None:
        reply = Said("one two three four", reasoning="Let me count")
        async with app_with(tmp_path, reply, size=(80, 24)) as (app, pilot, fake):
            app.session.parameters.set("max_tokens", 5)
            await ask(pilot, "Count.")
            answer = app.session.conversation.path()[-1]
            assert (answer.reasoning, answer.content) == ("Let me count", "one two")
            await pilot.press("ctrl+g")
            await until(pilot, lambda: len(fake.asked) == 2 and app.session.answering is None)
            await pilot.pause()
            assert (answer.reasoning, answer.content) == ("Let me count", "one two three four")
            assert "▸ Reasoning" in shown(views(app)[-1])
            assert app.session.store.load(1).path()[-1].reasoning == "Let me count"

    drive(scene())


# ---- long conversations


def long_conversation(store: Store, messages: int) -> int:
    conversation = store.new()
    for number in range(messages):
        role = "assistant" if number % 2 else "user"
        store.add(conversation, role, f"Number {number}.\n\n" + "some **words** " * 60, finished=True)
    return conversation.id


def test_a_long_conversation_shows_its_end_and_loads_the_rest_on_scrolling(tmp_path: Path) -> None:
    with Store(tmp_path / "chats.db") as store:
        number = long_conversation(store, 100)

    async def scene() -> None:
        async with app_with(tmp_path, "More.") as (app, pilot, _):
            view = app.chat_screen.conversation_view
            app.session.open(number)
            await app.chat_screen.show()
            await until(pilot, lambda: "Number 99." in screen(app))
            assert len(views(app)) == BATCH_SIZE
            assert view.unmounted == 60
            views(app)[0].focus()
            first = views(app)[0]
            await until(pilot, lambda: view.unmounted == 20)
            await pilot.pause()
            await until(pilot, lambda: first in view.children and "Number 60." in screen(app))  # it stays visible
            assert [view.message.content.split(".")[0] for view in views(app)] == [
                f"Number {n}" for n in range(20, 100)
            ]
            await ask(pilot, "And then?")
            assert [view.message.content[:5] for view in views(app)[-2:]] == ["And t", "More."]
            await until(pilot, lambda: "More." in screen(app))
            view.scroll_home(animate=False)
            await until(pilot, lambda: view.unmounted == 0)
            assert len(views(app)) == 102

    drive(scene())


def test_home_and_end_go_to_the_first_and_last_message_of_a_long_conversation(tmp_path: Path) -> None:
    with Store(tmp_path / "chats.db") as store:
        number = long_conversation(store, 150)

    async def scene() -> None:
        async with app_with(tmp_path) as (app, pilot, _):
            app.session.open(number)
            await app.chat_screen.show()
            await until(pilot, lambda: "Number 149." in screen(app))
            await pilot.press("shift+tab", "home")
            await until(pilot, lambda: app.chat_screen.conversation_view.unmounted == 0 and "Number 0." in screen(app))
            assert len(views(app)) == 150
            await pilot.press("end")
            await until(pilot, lambda: "Number 149." in screen(app))

    drive(scene())


def test_page_keys_in_the_composer_scroll_the_conversation(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "\n\n".join(f"Line {n}" for n in range(80)), size=(80, 24)) as (app, pilot, _):
            chat = app.chat_screen
            await ask(pilot, "Long, please.")
            assert "Line 79" in screen(app)
            await pilot.press("pageup")
            await until(pilot, lambda: "Line 79" not in screen(app))
            await pilot.press(*["pagedown"] * 3)
            await until(pilot, lambda: "Line 79" in screen(app) and chat.conversation_view.is_vertical_scroll_end)
            chat.composer.write("\n".join(str(n) for n in range(40)))
            await pilot.press("pageup")
            await until(
                pilot, lambda: chat.composer.cursor_location[0] < 39
            )  # a long text in the composer scrolls first
            assert chat.conversation_view.scroll_target_y >= chat.conversation_view.max_scroll_y - 10

    drive(scene())


# ---- panels


def test_escape_closes_the_parameter_panel(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, size=(80, 24)) as (app, pilot, _):
            await pilot.press("f3")
            await until(pilot, lambda: app.chat_screen.parameter_panel.has_class("open"))
            await pilot.press("escape")
            await until(pilot, lambda: not app.chat_screen.parameter_panel.has_class("open"))
            assert app.focused is app.chat_screen.composer

    drive(scene())


# ---- start


def test_unneeded_modules_are_not_imported_at_start() -> None:
    code = "import sys, llm_edge.tui.start; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert "textual" in found
    late = ("torch", "transformers", "onnx", "openai", "keyring", "httpx", "textual_serve", "onnxruntime", "pydantic")
    assert not {*late} & {*found}
