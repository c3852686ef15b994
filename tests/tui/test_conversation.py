"""The conversation in the application: streaming, reasoning, figures, and actions on messages."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from tui_driving import app_with, ask, drive, screen, shown, until, views

from llm_edge.chat.fake import Said
from llm_edge.chat.history.store import Store
from llm_edge.runtime.errors import MachineError
from llm_edge.tui.app import ChatApp
from llm_edge.tui.widgets.composer import Composer

CODE = "Look:\n\n```python\ndef greet():\n    return 1\n```\n\nand\n\n```sh\nls\n```\nDone."


@pytest.fixture
def clipboard(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The copied texts."""
    copied: list[str] = []
    monkeypatch.setattr(ChatApp, "copy_to_clipboard", lambda _, text: copied.append(text))
    return copied


@pytest.mark.parametrize("size", [(80, 24), (200, 60)])
def test_an_answer_streams_and_is_kept(tmp_path: Path, size: tuple[int, int]) -> None:
    async def scene() -> None:
        reply = CODE + " And on" * 40 + " finished."
        async with app_with(tmp_path, reply, size=size, pause=0.02) as (app, pilot, fake):
            await ask(pilot, "How?", wait=False)
            await until(pilot, lambda: "def greet" in shown(views(app)[-1]))
            assert app.session.answering is not None  # still growing
            await until(pilot, lambda: app.session.answering is None)
            await pilot.pause()
            question, answer = (shown(view) for view in views(app))
            assert "How?" in question
            for text in ("def greet", "return 1", "ls", "Done.", "tokens", "tok/s", "first token", "fake", "complete"):
                assert text in answer
            assert "```" not in answer
            assert fake.asked[0][0] == [{"role": "user", "content": "How?"}]
            await until(pilot, lambda: "finished." in screen(app))

    drive(scene())


def test_reasoning_streams_and_collapses(tmp_path: Path) -> None:
    async def scene() -> None:
        reply = Said("The answer.", reasoning="\n".join(f"thought {number}" for number in range(12)))
        async with app_with(tmp_path, reply, pause=0.15) as (app, pilot, _):
            await ask(pilot, "Why?", wait=False)
            await until(pilot, lambda: "thought 8" in shown(views(app)[-1]))
            assert "Thinking" in shown(views(app)[-1])
            await until(pilot, lambda: app.session.answering is None)
            await pilot.pause()
            view = views(app)[-1]
            assert "thought 8" not in shown(view)
            assert "Reasoning · 24 tokens" in shown(view)
            view.focus()
            await pilot.press("space")
            await pilot.pause()
            assert "thought 0" in shown(view)
            await pilot.click(view, offset=(5, 1))
            await pilot.pause()
            assert "thought 0" not in shown(view)

    drive(scene())


def test_multiline_input_history_and_paste(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "Yes.") as (app, pilot, fake):
            await pilot.press("a", "ctrl+j", "b", "enter")
            await until(pilot, lambda: len(fake.asked) == 1 and app.session.answering is None)
            assert fake.asked[0][0][-1]["content"] == "a\nb"
            await ask(pilot, "second")
            composer = app.query_one(Composer)
            await pilot.press("d", "r", "a", "f", "t", "up")
            assert composer.text == "second"
            await pilot.press("up", "up")
            assert composer.text == "a\nb"
            await pilot.press("down", "down", "down")
            assert composer.text == "draft"
            composer.load_text("")
            from textual import events

            long = "line \x1b]52;c;aGk=\x07of a log\r\n" * 500
            app.post_message(events.Paste(long))
            await until(pilot, lambda: composer.text.count("\n") == 500)
            assert "\x1b" not in composer.text
            assert composer.size.height <= 10

    drive(scene())


def test_an_empty_enter_starts_a_new_conversation_and_can_be_undone(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "Yes.") as (app, pilot, _):
            await ask(pilot, "Is it?")
            await pilot.press("enter")
            await until(pilot, lambda: not views(app))
            await pilot.press("ctrl+z")
            await until(pilot, lambda: len(views(app)) == 2)
            assert "Is it?" in shown(views(app)[0])

    drive(scene())


def test_ctrl_z_at_the_start_returns_to_the_latest_conversation(tmp_path: Path) -> None:
    with Store(tmp_path / "chats.db") as store:
        for name in ("older", "latest", "pinned"):
            store.add(store.new(), "user", name)
        store.pin(3)
        store.add(store.load(2), "user", "more")

    async def scene() -> None:
        async with app_with(tmp_path) as (app, pilot, _):
            await pilot.press("ctrl+z")
            await until(pilot, lambda: app.session.conversation.title == "latest" and views(app))

    drive(scene())


def test_a_question_that_cannot_fit_is_not_sent(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "ok", context_length=60) as (app, pilot, fake):
            long = "word " * 100
            app.query_one(Composer).write(long)
            await pilot.press("enter")
            await until(pilot, lambda: app.query_one(Composer).text == long and "Shorten it" in screen(app))
            assert not fake.asked
            assert not app.session.conversation.messages
            app.query_one(Composer).write("")
            await ask(pilot, "short")
            views(app)[0].focus()
            await pilot.press("e")
            await until(pilot, lambda: app.query_one(Composer).text == "short")
            app.query_one(Composer).write(long)
            await pilot.press("enter")
            await until(pilot, lambda: app.query_one(Composer).text == long)
            await pilot.pause()
            assert app.chat_screen.composer.editing is not None  # editing is still active
            assert len(app.session.conversation.messages) == 2

    drive(scene())


def test_the_gauge_counts_the_prompt_during_generation(tmp_path: Path) -> None:
    async def scene() -> None:
        long = "four five " * 100
        async with app_with(tmp_path, "one two three", long, long, pause=0.02) as (app, pilot, fake):
            await ask(pilot, "Count to three.")
            before = app.session.used()
            for keys in (["o", "n", "enter"], ["ctrl+r"]):
                await pilot.press(*keys)
                await until(pilot, lambda: app.session.answering and app.session.answering.content)
                answer = app.session.answering
                assert answer is not None
                prompt = app.session.used() - len(answer.content.split())
                assert before + 1 <= prompt <= fake.count(fake.asked[-1][0])
                await pilot.press("escape")
                await until(pilot, lambda: app.session.answering is None)

    drive(scene())


def test_copied_text_reaches_tmux(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """tmux accepts OSC 52 from programs only if configured; test_real_terminal.py uses the real one."""
    (tmp_path / "tmux").write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/words; cat > {tmp_path}/copied\n')
    (tmp_path / "tmux").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("TMUX", "/tmp/tmux-0/default,1,0")

    async def scene() -> None:
        async with app_with(tmp_path, "ünd so") as (app, pilot, _):
            await ask(pilot, "How?")
            views(app)[-1].focus()
            await pilot.press("y")
            await until(pilot, lambda: (tmp_path / "copied").exists() and (tmp_path / "copied").read_text())

    drive(scene())
    assert (tmp_path / "words").read_text() == "load-buffer -w -\n"
    assert (tmp_path / "copied").read_text() == "ünd so"


@pytest.mark.parametrize("key", ["escape", "ctrl+c"])
def test_an_answer_can_be_stopped(tmp_path: Path, key: str) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "word " * 5000, pause=0.01) as (app, pilot, _):
            await ask(pilot, "Talk.", wait=False)
            await until(pilot, lambda: "word" in shown(views(app)[-1]))
            await pilot.press(key)
            await until(pilot, lambda: app.session.answering is None)
            await until(pilot, lambda: "stopped" in shown(views(app)[-1]))
            assert 1 <= app.session.conversation.path()[-1].figures["tokens"] < 5000

    drive(scene())


def test_regenerate_and_switch_between_versions(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "First.", "Second.", "Third.") as (app, pilot, fake):
            await ask(pilot, "Say.")
            await pilot.press("ctrl+r")
            await until(pilot, lambda: len(fake.asked) == 2 and app.session.answering is None)
            await pilot.pause()
            assert "Second." in shown(views(app)[-1])
            assert "2 of 2" in shown(views(app)[-1])
            views(app)[-1].focus()
            await pilot.press("left_square_bracket")
            await until(pilot, lambda: "First." in shown(views(app)[-1]))
            assert "1 of 2" in shown(views(app)[-1])
            await pilot.press("left_square_bracket")  # there is no earlier version
            await pilot.press("right_square_bracket")
            await until(pilot, lambda: "Second." in shown(views(app)[-1]))
            await ask(pilot, "And now?")
            assert [each["content"] for each in fake.asked[-1][0]] == ["Say.", "Second.", "And now?"]

    drive(scene())


def test_editing_creates_a_branch(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "One.", "Two.", "Three.") as (app, pilot, fake):
            await ask(pilot, "first question")
            await ask(pilot, "second question")
            views(app)[0].focus()
            await pilot.press("e")
            composer = app.query_one(Composer)
            await until(pilot, lambda: composer.text == "first question")
            composer.write("better question")
            await pilot.press("enter")
            await until(pilot, lambda: len(fake.asked) == 3 and app.session.answering is None)
            await pilot.pause()
            assert [view.message.content for view in views(app)] == ["better question", "Three."]
            views(app)[0].focus()
            await pilot.press("left_square_bracket")
            await until(pilot, lambda: len(views(app)) == 4)
            assert views(app)[0].message.content == "first question"
            composer.write("a draft")
            views(app)[0].focus()
            await pilot.press("e")
            await until(pilot, lambda: app.chat_screen.composer.editing is not None)
            assert composer.text == "first question"
            await pilot.press("escape")
            assert app.chat_screen.composer.editing is None
            assert composer.text == "a draft"

    drive(scene())


def test_an_answer_can_be_continued(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "one two three four") as (app, pilot, fake):
            app.session.parameters.set("max_tokens", 2)
            await ask(pilot, "Count.")
            assert app.session.conversation.path()[-1].content == "one two"
            assert "cut off at the limit" in shown(views(app)[-1])
            fake.enqueue(" three four")
            await pilot.press("ctrl+g")
            await until(pilot, lambda: len(fake.asked) == 2 and app.session.answering is None)
            assert fake.asked[1][2] == "one two"
            assert app.session.conversation.path()[-1].content == "one two three four"
            assert len(app.session.conversation.messages) == 2

    drive(scene())


def test_reasoning_that_was_cut_off_is_continued(tmp_path: Path) -> None:
    async def scene() -> None:
        reply = Said("The end.", reasoning="one two three four")
        async with app_with(tmp_path, reply) as (app, pilot, _):
            app.session.parameters.set("max_tokens", 2)
            await ask(pilot, "Count.")
            answer = app.session.conversation.path()[-1]
            assert (answer.reasoning, answer.content) == ("one two", "")
            app.session.parameters.set("max_tokens", 50)
            await pilot.press("ctrl+g")
            await until(pilot, lambda: answer.content == "The end." and app.session.answering is None)
            assert answer.reasoning == "one two three four"

    drive(scene())


def test_copy_code_and_quote(tmp_path: Path, clipboard: list[str]) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, CODE) as (app, pilot, _):
            await ask(pilot, "How?")
            views(app)[-1].focus()
            await pilot.press("y", "c", "c", "c")
            await until(pilot, lambda: len(clipboard) == 4)
            assert clipboard == [CODE, "def greet():\n    return 1\n", "ls\n", "def greet():\n    return 1\n"]
            await pilot.press("q")
            await until(pilot, lambda: app.query_one(Composer).text.startswith("> Look:"))
            assert all(line.startswith(">") for line in app.query_one(Composer).text.rstrip().split("\n"))

    drive(scene())


def test_the_mouse_selects_text(tmp_path: Path, clipboard: list[str]) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "alpha beta gamma") as (app, pilot, _):
            await ask(pilot, "Say.")
            view = views(app)[-1]
            await pilot.mouse_down(view, offset=(2, 1))
            await pilot.hover(view, offset=(11, 1))
            await pilot.mouse_up(view, offset=(11, 1))
            await until(pilot, lambda: app.screen.get_selected_text())
            await pilot.press("ctrl+c")
            await until(pilot, lambda: clipboard)
            assert clipboard[0].strip() in "alpha beta gamma"
            assert "alpha" in clipboard[0]

    drive(scene())


def test_an_error_is_shown_and_saved(tmp_path: Path) -> None:
    async def scene() -> None:
        reply = Said("Half of it", failure=MachineError("the weights \x1b[31mmelted"))
        async with app_with(tmp_path, reply, "Better.") as (app, pilot, _):
            await ask(pilot, "Work.")
            assert "Half of it" in shown(views(app)[-1])
            assert "error: the weights [31mmelted" in shown(views(app)[-1])
            await pilot.press("ctrl+r")
            await until(pilot, lambda: "Better." in shown(views(app)[-1]))

    drive(scene())


def test_the_oldest_turns_are_dropped_when_the_context_is_full(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "a b c d e f g h", context_length=60) as (app, pilot, fake):
            for number in range(6):
                await ask(pilot, f"question {number}")
            assert len(fake.asked[-1][0]) < 11
            assert fake.asked[-1][0][-1]["content"] == "question 5"
            assert len(views(app)) == 12  # they stay on the screen
            assert "oldest" in shown(views(app)[-1])
            assert "left out" in shown(views(app)[-1])

    drive(scene())


def test_a_question_waits_for_the_model(tmp_path: Path) -> None:
    import threading

    from llm_edge.chat.fake import FakeResponder

    async def scene() -> None:
        ready, fake = threading.Event(), FakeResponder("At last.")

        def load() -> Any:
            ready.wait(20)
            return fake

        app = ChatApp(Store(tmp_path / "chats.db"), load)
        async with app.run_test(size=(80, 24)) as pilot:
            await until(pilot, lambda: "Loading model" in screen(app))
            await pilot.press("h", "i", "enter")
            await pilot.pause()
            assert not fake.asked
            ready.set()
            await until(pilot, lambda: fake.asked and app.session.answering is None)
            await until(pilot, lambda: "At last." in screen(app))

    drive(scene())


def test_model_output_cannot_control_the_terminal(tmp_path: Path) -> None:
    async def scene() -> None:
        evil = "a\x1b]52;c;aGk=\x07b \x9b31m &#x202e;c\n\n```\n\x1b[0m\u2066\n```"
        async with app_with(tmp_path, Said(evil, reasoning=evil)) as (app, pilot, _):
            app.session.responder.name = "evil\x1b[31m\u202e"  # type: ignore[union-attr]
            await ask(pilot, "evil \x1b]0;title\x07 question")
            views(app)[-1].folded = False
            views(app)[-1].changed()
            await pilot.pause()
            found = screen(app) + "".join(map(shown, views(app)))
            assert not {"\x1b", "\x07", "\x9b", "\u202e", "\u2066"} & set(found)

    drive(scene())


def test_an_answer_that_cannot_be_saved_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "one two three") as (app, pilot, _):

            def full(*_: object) -> None:
                raise MachineError("no room on the disk")

            monkeypatch.setattr(app.session.store, "update", full)
            await ask(pilot, "Count.")
            assert "one two three" in shown(views(app)[-1])
            assert "not saved: no room on the disk" in shown(views(app)[-1])
            monkeypatch.undo()
            await ask(pilot, "Again.")
            assert "not kept" not in shown(views(app)[-1])

    drive(scene())
