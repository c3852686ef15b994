"""The comparison screen: one question, two answers side by side, and keeping one of them."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Button
from tui_driving import app_with, ask, drive, screen, until, views
from tui_driving import shown as drawn

from llm_edge.chat.comparison import Comparison, ComparisonSide
from llm_edge.chat.fake import FakeResponder, Said
from llm_edge.chat.history.conversation import ASSISTANT, Conversation, Message
from llm_edge.chat.history.store import InMemoryStore
from llm_edge.chat.parameters import ChatParameters
from llm_edge.chat.responder import LocalResponder
from llm_edge.runtime.errors import MachineError
from llm_edge.runtime.model import Model
from llm_edge.tui.app import ChatApp
from llm_edge.tui.screens.compare import CompareScreen
from llm_edge.tui.screens.models import ModelsScreen
from llm_edge.tui.screens.tokens import TokensScreen
from llm_edge.tui.widgets.composer import Composer
from llm_edge.tui.widgets.message_view import MessageView
from llm_edge.tui.widgets.parameter_fields import ValueField


def side(*answers: Said | str, pause: float = 0.0, name: str = "script") -> tuple[ComparisonSide, FakeResponder]:
    fake = FakeResponder(*answers, pause=pause, name=name)
    return ComparisonSide(fake, ChatParameters(fake.default_params)), fake


def wait(comparison: Comparison) -> None:
    end = time.monotonic() + 20
    while comparison.busy:
        assert time.monotonic() < end, "the answers are not finished"
        comparison.poll()
        time.sleep(0.001)


def compare(app: ChatApp) -> CompareScreen:
    assert isinstance(app.screen, CompareScreen)
    return app.screen


async def both(pilot: Pilot[Any], text: str | None = None) -> CompareScreen:
    """Ask in the comparison and wait for both answers."""
    app = pilot.app
    assert isinstance(app, ChatApp)
    shown = compare(app)
    if text is not None:
        shown.query_one(Composer).write(text)
    await pilot.press("enter")
    await until(pilot, lambda: all(each.answer and not each.busy for each in shown.sides))
    await pilot.pause()
    return shown


# ---- without a screen


def test_both_sides_get_the_same_question_and_nothing_is_saved() -> None:
    left, one = side("left says")
    right, other = side("right says")
    history = [Message(3, None, "user", "Hi"), Message(8, 3, ASSISTANT, "Hello")]
    comparison = Comparison(left, right, history)
    comparison.ask("Why?")
    wait(comparison)
    assert [each.answer and each.answer.content for each in comparison.sides] == ["left says", "right says"]
    assert one.asked[0][0] == other.asked[0][0]
    assert [each["content"] for each in one.asked[0][0]] == ["Hi", "Hello", "Why?"]
    comparison.ask("And?")
    wait(comparison)
    assert [each["content"] for each in one.asked[1][0]] == ["Hi", "Hello", "And?"]  # without the compared answers
    assert [each.content for each in history] == ["Hi", "Hello"]


def test_one_responder_on_both_sides_answers_in_turn() -> None:
    fake = FakeResponder("first", "second")
    left, right = (ComparisonSide(fake, ChatParameters(fake.default_params, {"temperature": t})) for t in (0.1, 0.9))
    comparison = Comparison(left, right, [])
    comparison.ask("Why?")
    assert right.waiting
    wait(comparison)
    assert [each[1].temperature for each in fake.asked] == [0.1, 0.9]
    assert left.answer is not None
    assert right.answer is not None
    assert (left.answer.content, right.answer.content) == ("first", "second")
    assert left.answer.params == {"temperature": 0.1}
    comparison.close()


def test_two_responders_answer_concurrently_unless_in_turn_is_set() -> None:
    for in_turn in (False, True):
        left, _ = side("word " * 50, pause=0.001)
        right, other = side("word " * 50, pause=0.001)
        comparison = Comparison(left, right, [])
        comparison.in_turn = in_turn
        comparison.ask("Why?")
        assert right.waiting is in_turn
        comparison.poll()
        assert bool(right.answer) is not in_turn
        wait(comparison)
        assert len(other.asked) == 1


def test_stopping_stops_both_and_a_failure_affects_only_one_side() -> None:
    fake = FakeResponder("word " * 1000, pause=0.001)
    left, right = (ComparisonSide(fake, ChatParameters(fake.default_params)) for _ in range(2))
    comparison = Comparison(left, right, [])
    comparison.ask("Why?")
    comparison.stop()
    wait(comparison)
    assert left.answer is not None
    assert left.answer.figures["finish_reason"] == "cancelled"
    assert right.answer is None

    bad, _ = side(Said("so far", failure=MachineError("the disk is gone")))
    good, _ = side("fine")
    comparison = Comparison(bad, good, [])
    comparison.ask("Why?")
    wait(comparison)
    assert bad.answer is not None
    assert good.answer is not None
    assert bad.answer.figures["error"] == "the disk is gone"
    assert good.answer.content == "fine"


def test_the_in_memory_store_accepts_messages_like_a_store() -> None:
    store, conversation = InMemoryStore(), Conversation(messages={5: Message(5, None, "user", "Hi")}, leaf=5)
    answer = store.add(conversation, ASSISTANT, model="m")
    again = store.add(conversation, ASSISTANT, parent=5)
    assert conversation.siblings(answer.id) == [answer.id, again.id]
    assert (answer.finished, store.add(conversation, "user", "x").finished) == (False, True)


# ---- on the screen


@pytest.mark.parametrize("size", [(80, 24), (200, 60)])
def test_two_settings_of_one_model(tmp_path: Path, size: tuple[int, int]) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "alpha", "omega", size=size) as (app, pilot, fake):
            app.query_one(Composer).write("Why?")
            await pilot.press("f7")
            await until(pilot, lambda: isinstance(app.screen, CompareScreen))
            await pilot.pause()
            assert compare(app).query_one(Composer).text == "Why?"
            shown = await both(pilot)
            text = screen(app)
            assert "alpha" in text
            assert "omega" in text
            assert "Model defaults" in text
            assert "temperature 0.0" in text
            await until(pilot, lambda: all("1 token · " in drawn(view) for view in shown.query(MessageView)))
            assert [each[1].temperature for each in fake.asked] == [0.7, 0.0]
            assert app.focused is shown.query_one("#keep-0", Button)
            await pilot.press("2")
            await until(pilot, lambda: app.screen is app.chat_screen)
            await until(pilot, lambda: len(views(app)) == 2)
            path = app.session.conversation.path()
            assert [each.content for each in path] == ["Why?", "omega"]
            assert path[1].params == {"temperature": 0.0, "top_p": 1.0}
            assert path[1].figures["tokens"] == 1
            assert path[1].finished
            assert app.query_one(Composer).text == ""
            kept = app.session.store.load(app.session.conversation.id)
            assert [each.content for each in kept.path()] == ["Why?", "omega"]
            await ask(pilot, "And?")
            assert [each["content"] for each in fake.asked[-1][0]] == ["Why?", "omega", "And?"]

    drive(scene())


def test_the_last_question_is_compared_and_kept_as_another_version(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "first", "left", "right") as (app, pilot, fake):
            await ask(pilot, "Why?")
            await pilot.press("f7")
            await pilot.pause()
            await both(pilot)
            assert [each["content"] for each in fake.asked[-1][0]] == ["Why?"]
            await pilot.click("#keep-0")
            await until(pilot, lambda: app.screen is app.chat_screen)
            path = app.session.conversation.path()
            assert [each.content for each in path] == ["Why?", "left"]
            assert len(app.session.conversation.siblings(path[1].id)) == 2
            assert len(app.session.conversation.messages) == 3

    drive(scene())


def test_both_can_be_kept_and_another_question_starts_a_branch(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "first", "left", "right") as (app, pilot, _):
            await ask(pilot, "Why?")
            await pilot.press("f7")
            await pilot.pause()
            compare(app).query_one(Composer).load_text("")
            await both(pilot, "Why not?")
            await pilot.press("3")
            await until(pilot, lambda: app.screen is app.chat_screen)
            path = app.session.conversation.path()
            assert [each.content for each in path] == ["Why not?", "left"]
            siblings = app.session.conversation.siblings(path[1].id)
            contents = [app.session.conversation.messages[each].content for each in siblings]
            assert contents == ["right", "left"]
            assert len(app.session.conversation.siblings(path[0].id)) == 2

    drive(scene())


def test_leaving_saves_nothing_and_escape_stops_first(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "word " * 500, pause=0.01) as (app, pilot, _):
            await pilot.press("f7")
            await pilot.pause()
            shown = compare(app)
            shown.query_one(Composer).write("Why?")
            await pilot.press("1", "enter")
            await until(pilot, lambda: shown.sides[0].answer is not None and shown.sides[0].answer.content)
            assert "Waiting for the other answer" in screen(app)
            assert shown.query_one("#keep-0", Button).disabled
            await pilot.press("escape")
            await until(pilot, lambda: not any(each.busy for each in shown.sides))
            assert app.screen is shown
            await pilot.press("f7")
            await until(pilot, lambda: app.screen is app.chat_screen)
            assert not app.session.conversation.messages
            assert not app.session.store.recent()

    drive(scene())


def test_each_side_has_separate_parameters(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "ok", size=(120, 40)) as (app, pilot, fake):
            app.session.parameters.set("system", "Be brief.")
            app.session.parameters.set("top_k", 9)
            await pilot.press("f7")
            await pilot.pause()
            shown = compare(app)
            assert [each.session.parameters.changed for each in shown.sides] == [
                {"system": "Be brief.", "top_k": 9},
                {"system": "Be brief."},
            ]
            await pilot.press("f3")
            await pilot.pause()
            assert shown.query_one("#value-temperature", ValueField).has_focus
            assert "Parameters, right" in screen(app)
            await pilot.press("right")
            await pilot.press("f3", "left")
            await pilot.pause()
            assert "Parameters, left" in screen(app)
            await pilot.press("f3")
            await pilot.pause()
            text = screen(app)
            assert "temperature 0.75" in text
            assert "temperature 0.65" in text
            await both(pilot, "Why?")
            assert [each[1].temperature for each in fake.asked] == [0.65, 0.75]
            assert [each[1].top_k for each in fake.asked] == [9, 0]
            assert app.session.parameters.changed == {
                "system": "Be brief.",
                "top_k": 9,
            }  # those of the chat are unchanged

    drive(scene())


@contextlib.asynccontextmanager
async def with_another(tmp_path: Path, other: FakeResponder) -> AsyncIterator[tuple[ChatApp, Pilot[None], list[str]]]:
    """Open the comparison with another model to choose."""
    async with app_with(tmp_path, "word " * 30, pause=0.002, size=(120, 40)) as (app, pilot, _):
        kept: list[str] = []

        async def choose() -> Any:
            return lambda: other

        def done(found: str | None) -> None:
            kept.extend([found] if found is not None else [])

        assert app.session.responder is not None
        app.push_screen(CompareScreen(app.session, choose_model=choose), done)
        await until(pilot, lambda: isinstance(app.screen, CompareScreen))
        await pilot.press("f4")
        await until(pilot, lambda: compare(app).sides[1].responder is other)
        await pilot.pause()
        yield app, pilot, kept


def test_two_models_answer_concurrently(tmp_path: Path) -> None:
    async def scene() -> None:
        other = FakeResponder("another " * 30, pause=0.002, name="other\x1b[31m", detail="int4")
        async with with_another(tmp_path, other) as (app, pilot, kept):
            await until(pilot, lambda: "other[31m · int4" in screen(app))
            shown = await both(pilot, "Why?")
            assert "another another" in screen(app)
            assert not {"\x1b"} & {*screen(app)}
            assert shown.sides[1].answer is not None
            assert shown.sides[1].answer.model == "other\x1b[31m"
            assert shown.sides[1].answer.params == {}  # another model has its own parameters
            await pilot.press("2")
            await until(pilot, lambda: bool(kept))
            assert kept[0] == "Why?"
            await until(pilot, lambda: other.closed)

    drive(scene())


def test_a_model_that_cannot_be_loaded_is_reported(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "ok", size=(120, 40)) as (app, pilot, _):

            def fail() -> Any:
                raise MachineError("no \x1b[31mmemory")

            async def choose() -> Any:
                return fail

            assert app.session.responder is not None
            app.push_screen(CompareScreen(app.session, choose_model=choose))
            await until(pilot, lambda: isinstance(app.screen, CompareScreen))
            await pilot.press("f4")
            await until(pilot, lambda: "no [31mmemory" in screen(app))
            await both(pilot, "Why?")

    drive(scene())


def test_the_tokens_of_a_side_can_be_viewed(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "alpha", "omega") as (app, pilot, _):
            app.session.parameters.set("logprobs", 3)
            await pilot.press("f7")
            await pilot.pause()
            shown = await both(pilot, "Why?")
            [left, right] = shown.query(MessageView)
            left.focus()
            await pilot.press("t")
            await until(pilot, lambda: isinstance(app.screen, TokensScreen))
            await pilot.pause()
            assert "alpha" in screen(app)
            await pilot.press("escape")
            await pilot.pause()
            right.focus()
            await pilot.press("e", "r", "left_square_bracket")  # available for kept answers only
            await pilot.pause()
            assert app.screen is shown
            assert not app.session.conversation.messages

    drive(scene())


def test_leaving_during_generation_stops_both(tmp_path: Path) -> None:
    async def scene() -> None:
        other = FakeResponder("another " * 500, pause=0.01)
        async with with_another(tmp_path, other) as (app, pilot, kept):
            shown = compare(app)
            shown.query_one(Composer).write("Why?")
            await pilot.press("enter")
            await until(pilot, lambda: all(each.answer and each.answer.content for each in shown.sides))
            await pilot.press("f7")
            await until(pilot, lambda: other.replies[0]._cancelled.is_set())
            assert not kept

    drive(scene())


def test_comparing_is_not_possible_during_generation(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "word " * 500, pause=0.01) as (app, pilot, _):
            await ask(pilot, "Talk.", wait=False)
            await pilot.press("f7")
            await pilot.pause()
            assert app.screen is app.chat_screen
            assert "Press Esc to stop" in " ".join(screen(app).split())

    drive(scene())


def test_a_bundle_from_the_list_is_compared_with_the_chats_model(
    tmp_path: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "artifacts").mkdir()
    shutil.copytree(tiny_bundle, tmp_path / "artifacts/good")

    async def scene() -> None:
        async with app_with(tmp_path, "from the script", size=(120, 40)) as (app, pilot, fake):
            for name, value in (("max_tokens", 7), ("logprobs", 4)):
                app.session.parameters.set(name, value)
            await pilot.press("f7")
            await pilot.pause()
            shown = compare(app)
            await pilot.press("f4")
            await until(pilot, lambda: isinstance(app.screen, ModelsScreen) and "int8" in screen(app))
            await pilot.press(*"good int8", "enter")
            await until(pilot, lambda: isinstance(shown.sides[1].responder, LocalResponder), 60)
            await pilot.pause()
            for name, value in (("max_tokens", 7), ("logprobs", 4)):  # another model starts with its own
                shown.sides[1].session.parameters.set(name, value)
            await both(pilot, "Why?")
            left, right = (each.answer for each in shown.sides)
            assert left is not None
            assert right is not None
            assert left.content == "from the script"
            assert 0 < right.figures["tokens"] <= 7
            assert right.figures["precision"] == "int8"
            records = shown.sides[1].session.records[right.id]
            assert len(records) == right.figures["tokens"]
            texts = "".join(each.text(each.logprob.token) for each in records)
            assert right.content in texts
            await pilot.press("2")
            await until(pilot, lambda: app.screen is app.chat_screen)
            await until(pilot, lambda: len(views(app)) == 2)
            assert app.session.responder is fake  # it was asked only once
            kept = app.session.conversation.path()[-1]
            assert kept.model == right.model
            assert app.session.record_of(kept) == records

    drive(scene())


def test_token_texts_add_up_to_the_answer(tiny_bundle: Path) -> None:
    responder = LocalResponder(Model.load(tiny_bundle, "fp32"))
    text = "Hi there,\n  how are you? "
    model = responder._model
    ids = model.tokenizer.encode(text)
    assert "".join(map(responder.token_text, ids)) == text
    assert responder.token_text(10**6) == "<1000000>"
    special = next(iter(model.tokenizer.special_ids))
    assert responder.token_text(special) == model.tokenizer.token_text(special)
