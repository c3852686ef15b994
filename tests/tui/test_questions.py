"""Sample questions: the editable list, and the drop-down menu that asks them."""

from __future__ import annotations

from pathlib import Path

import pytest
from textual.events import Paste
from textual.widgets import OptionList
from tui_driving import app_with, ask, drive, screen, until

from llm_edge.chat.questions import MAX_QUESTIONS, SECTION, SHIPPED, Questions
from llm_edge.chat.settings import Settings
from llm_edge.runtime.errors import InputError, ParameterError
from llm_edge.tui.app import ChatApp
from llm_edge.tui.screens.questions import QuestionEditor, QuestionsScreen
from llm_edge.tui.widgets.composer import Composer

PRESCRIBED = [
    "What is the fastest animal?",
    "How many Rs are there in strawberry?",
    "If the Han dynasty Chinese fought the Romans, who would win?",
    "What is the capital of France?",
    "Explain quantum computing in simple terms",
    "Tell me a joke",
]


def listed(app: ChatApp) -> list[str]:
    assert isinstance(app.screen, QuestionsScreen)
    options = app.screen.query_one(OptionList).options
    return [str(option.prompt) for option in options]


def test_default_questions_are_listed_until_changed(tmp_path: Path) -> None:
    questions = Questions(Settings(tmp_path))
    assert questions.all() == PRESCRIBED
    assert questions.add(" Why?\r\nAnd how?\x1b[2J ") == 6
    questions.edit(0, "Which animal is slow?")
    assert questions.delete(1) == PRESCRIBED[1]
    assert questions.move(4, -10) == 0
    assert questions.move(0, 100) == 5
    again = Questions(Settings(tmp_path)).all()
    assert again == ["Which animal is slow?", *PRESCRIBED[2:5], "Why?\nAnd how?[2J", PRESCRIBED[5]]
    assert questions.restore() == 2
    assert Questions(Settings(tmp_path)).all() == [*PRESCRIBED, "Which animal is slow?", "Why?\nAnd how?[2J"]
    assert questions.restore() == 0


def test_invalid_questions_are_rejected(tmp_path: Path) -> None:
    questions = Questions(Settings(tmp_path))
    for text in ("", " \n ", "\x1b", SHIPPED[0], "x" * 20_001):
        with pytest.raises(ParameterError):
            questions.add(text)
    with pytest.raises(ParameterError):
        questions.edit(1, SHIPPED[0])
    questions.edit(1, SHIPPED[1])  # back to the default
    for place in (-1, 6, 100):
        with pytest.raises(InputError):
            questions.delete(place)
        with pytest.raises(InputError):
            questions.edit(place, "x")
    assert questions.all() == PRESCRIBED


def test_the_number_of_questions_is_limited(tmp_path: Path) -> None:
    settings = Settings(tmp_path)
    settings.set(SECTION, [str(number) for number in range(MAX_QUESTIONS)])
    with pytest.raises(ParameterError, match="delete one first"):
        Questions(settings).add("one more")
    Questions(settings).delete(0)
    assert Questions(settings).add("one more") == MAX_QUESTIONS - 1


def test_an_emptied_list_stays_empty(tmp_path: Path) -> None:
    questions = Questions(Settings(tmp_path))
    for _ in PRESCRIBED:
        questions.delete(0)
    assert Questions(Settings(tmp_path)).all() == []
    questions.put_back(3, "x")
    questions.put_back(3, "x")
    assert questions.all() == ["x"]


@pytest.mark.parametrize("size", [(80, 24), (200, 60)])
def test_enter_asks_immediately(tmp_path: Path, size: tuple[int, int]) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "Paris.", size=size) as (app, pilot, fake):
            app.query_one(Composer).write("a draft")
            await pilot.press("f5")
            await pilot.pause()
            assert all(each in screen(app) for each in PRESCRIBED)
            await pilot.press("down", "down", "down", "enter")
            await until(pilot, lambda: fake.asked and app.session.answering is None)
            assert fake.asked[0][0][-1]["content"] == "What is the capital of France?"
            assert app.screen is app.chat_screen
            assert app.query_one(Composer).text == "a draft"

    drive(scene())


@pytest.mark.parametrize("key", ["space", "tab", "right"])
def test_another_key_puts_it_into_the_composer(tmp_path: Path, key: str) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "ok") as (app, pilot, fake):
            await pilot.press("f5", "down", key)
            await pilot.pause()
            composer = app.query_one(Composer)
            assert composer.text == SHIPPED[1]
            assert app.focused is composer
            await pilot.press("f5", key)
            await pilot.pause()
            assert composer.text == f"{SHIPPED[1]}\n\n{SHIPPED[0]}"  # the text in the composer is kept
            assert not fake.asked

    drive(scene())


def test_a_click_asks(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "ok") as (_, pilot, fake):
            await pilot.press("f5")
            await pilot.pause()
            await pilot.click(OptionList, offset=(5, 4))
            await until(pilot, lambda: fake.asked)
            assert fake.asked[0][0][-1]["content"] == SHIPPED[4]

    drive(scene())


def test_add_change_delete_undo_restore(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "ok") as (app, pilot, fake):
            await pilot.press("f5", "a", *"Why me?", "ctrl+j", *"ad", "enter")
            await pilot.pause()
            assert listed(app) == [*PRESCRIBED, "Why me? ad"]
            assert Questions(Settings(tmp_path)).all()[-1] == "Why me?\nad"
            await pilot.press("e")
            await pilot.pause()
            wording = app.screen.query_one(QuestionEditor)
            assert wording.text == "Why me?\nad"
            await pilot.press(*"der", "enter")
            await pilot.pause()
            assert listed(app)[-1] == "Why me? adder"
            await pilot.press("home", "d", "d")
            await pilot.pause()
            assert listed(app) == [*PRESCRIBED[2:], "Why me? adder"]
            await pilot.press("u")
            await pilot.pause()
            assert listed(app) == [*PRESCRIBED[1:], "Why me? adder"]
            await pilot.press("r")
            await pilot.pause()
            assert listed(app) == [*PRESCRIBED, "Why me? adder"]
            await pilot.press("end", "shift+up")
            await pilot.pause()
            assert listed(app)[-2:] == ["Why me? adder", PRESCRIBED[-1]]
            await pilot.press("enter")
            await until(pilot, lambda: fake.asked)
            assert fake.asked[0][0][-1]["content"] == "Why me?\nadder"

    drive(scene())


def test_a_rejected_question_can_be_corrected_or_abandoned(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "ok") as (app, pilot, _):
            await pilot.press("f5", "a", "enter")
            await pilot.pause()
            assert "the question is empty" in screen(app)
            await pilot.press("x", "escape")
            await pilot.pause()
            assert isinstance(app.screen, QuestionsScreen)
            assert listed(app) == PRESCRIBED
            await pilot.press("escape")
            await pilot.pause()
            assert app.screen is app.chat_screen
            assert not (tmp_path / "settings.json").exists()

    drive(scene())


def test_an_empty_list_explains_how_to_add_questions(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "ok") as (app, pilot, _):
            await pilot.press("f5", *"dddddd")
            await pilot.pause()
            assert "Press r to restore" in screen(app)
            await pilot.press("enter", "space", "e", "d")  # there is no question to act on
            await pilot.press("r")
            await pilot.pause()
            assert listed(app) == PRESCRIBED

    drive(scene())


def test_escape_codes_reach_neither_the_list_nor_the_file(tmp_path: Path) -> None:
    async def scene() -> None:
        Settings(tmp_path)
        (tmp_path / "settings.json").write_text(
            '{"questions": ["\\u001b]0;x\\u0007a\\u202e[bold]b"]}', encoding="utf-8"
        )
        async with app_with(tmp_path, "ok") as (app, pilot, _):
            await pilot.press("f5")
            await pilot.pause()
            assert listed(app) == ["]0;xa[bold]b"]
            await pilot.press("a")
            app.post_message(Paste("\x1b[31mred\r\nline"))
            await until(pilot, lambda: app.screen.query_one(QuestionEditor).text == "[31mred\nline")
            await pilot.press("enter")
            await pilot.pause()
            assert Questions(Settings(tmp_path)).all()[1] == "[31mred\nline"
            assert not {"\x1b", "\x07", "\u202e"} & {*screen(app)}

    drive(scene())


def test_questions_can_be_viewed_during_generation(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "word " * 40, pause=0.01) as (app, pilot, fake):
            await ask(pilot, "Talk.", wait=False)
            await pilot.press("f5")
            await until(pilot, lambda: app.session.answering is None)
            assert isinstance(app.screen, QuestionsScreen)
            await pilot.press("enter")
            await until(pilot, lambda: len(fake.asked) == 2)

    drive(scene())
