"""Asking in the full-screen chat: queued questions, attached files, slash commands, the editor, long pastes, titles."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from textual import events
from tui_driving import app_with, ask, drive, screen, until

from llm_edge.chat.attachments import split_attachments
from llm_edge.chat.fake import Said
from llm_edge.runtime.errors import MachineError
from llm_edge.tui.screens.help import HelpScreen
from llm_edge.tui.screens.models import ModelsScreen
from llm_edge.tui.screens.output import OutputScreen

LONG = "word " * 300
PER_TOKEN = 0.02  # seconds


# ---- nothing is lost while an answer is generated


@pytest.mark.parametrize("key", ["enter", "ctrl+n", "ctrl+z", "new"])
def test_a_running_answer_is_not_lost_by_a_new_conversation(tmp_path: Path, key: str) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, LONG, pause=PER_TOKEN) as (app, pilot, _):
            await ask(pilot, "Talk.", wait=False)
            answer = app.session.answering
            await until(pilot, lambda: answer is not None and answer.content)
            await pilot.press(*([*"/new", "enter"] if key == "new" else [key]))
            await pilot.pause(0.1)
            assert app.session.answering is answer
            assert len(app.session.conversation.messages) == 2
            if key != "enter":
                assert "Still answering. Press Esc to stop." in screen(app)

    drive(scene())


# ---- queued questions


def test_questions_asked_during_an_answer_wait_for_its_end(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "word " * 60, "second", "third", pause=PER_TOKEN) as (app, pilot, fake):
            await ask(pilot, "First?", wait=False)
            for question in ("Second?", "Third?"):
                app.chat_screen.composer.write(question)
                await pilot.press("enter")
            await pilot.pause()
            assert "Next: Second?" in screen(app)
            assert "Next: Third?  ↑ takes it back" in screen(app)
            await until(pilot, lambda: len(app.session.conversation.messages) == 6 and app.session.answering is None)
            assert [each[0][-1]["content"] for each in fake.asked] == ["First?", "Second?", "Third?"]
            assert not app.chat_screen.pending.display

    drive(scene())


def test_up_takes_a_queued_question_back_and_stopping_returns_the_queue(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, LONG, pause=PER_TOKEN) as (app, pilot, fake):
            composer = app.chat_screen.composer
            await ask(pilot, "Talk.", wait=False)
            app.chat_screen.composer.write("Next?")
            await pilot.press("enter", "up")
            await until(pilot, lambda: composer.text == "Next?")
            assert not app.chat_screen.pending.questions
            await pilot.press("enter")
            composer.write("draft")
            await pilot.press("escape")
            await until(pilot, lambda: app.session.answering is None and composer.text == "Next?\n\ndraft")
            assert len(fake.asked) == 1

    drive(scene())


def test_a_failed_answer_returns_the_queue_to_the_composer(tmp_path: Path) -> None:
    async def scene() -> None:
        failing = Said("word " * 50, failure=MachineError("broken"))
        async with app_with(tmp_path, failing, pause=PER_TOKEN) as (app, pilot, _):
            await ask(pilot, "First?", wait=False)
            app.chat_screen.composer.write("Second?")
            await pilot.press("enter")
            await until(pilot, lambda: app.chat_screen.composer.text == "Second?")

    drive(scene())


# ---- files


def test_files_are_attached_by_command_mention_and_drop(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("Alpha\n```\nBeta\n")
    (tmp_path / "my plan.md").write_text("Gamma")

    async def scene() -> None:
        async with app_with(tmp_path, "ok") as (app, pilot, fake):
            app.chat_screen.composer.write(f"/file {tmp_path}/notes.txt")
            await pilot.press("enter")
            await until(pilot, lambda: "File notes.txt · 15 characters" in screen(app))
            app.post_message(events.Paste(f"'{tmp_path}/my plan.md'"))  # how terminals paste a dropped file
            await until(pilot, lambda: app.chat_screen.composer.text == f'@"{tmp_path}/my plan.md" ')
            await pilot.press(*"What?", "enter")
            await until(pilot, lambda: bool(fake.asked) and app.session.answering is None)
            files, question = split_attachments(fake.asked[0][0][-1]["content"])
            assert [(each.name, each.text) for each in files] == [
                ("notes.txt", "Alpha\n```\nBeta"),
                ("my plan.md", "Gamma"),
            ]
            assert question == "my plan.md What?"
            await until(pilot, lambda: "▸ File notes.txt" in screen(app))
            assert "Alpha" not in screen(app)
            assert app.session.conversation.title == "my plan.md What?"
            await pilot.press("shift+tab", "up", "space")
            await until(pilot, lambda: "│ Alpha" in screen(app))
            await pilot.press("e")
            await until(pilot, lambda: app.chat_screen.composer.text == question)
            assert len(app.chat_screen.pending.attachments) == 2

    drive(scene())


def test_a_pasted_text_does_not_attach_the_files_it_mentions(tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_text("password")
    pasted = f"Please read @{tmp_path}/secret.txt now"

    async def scene() -> None:
        async with app_with(tmp_path, "ok") as (app, pilot, fake):
            app.post_message(events.Paste(pasted))
            await until(pilot, lambda: app.chat_screen.composer.text == pasted)
            await pilot.press("enter")
            await until(pilot, lambda: bool(fake.asked))
            assert fake.asked[0][0][-1]["content"] == pasted

    drive(scene())


def test_a_file_that_cannot_be_attached_is_reported(tmp_path: Path) -> None:
    (tmp_path / "binary").write_bytes(b"\0\1")

    async def scene() -> None:
        async with app_with(tmp_path, "ok", size=(120, 30)) as (app, pilot, fake):
            for name, reason in (("binary", "is binary"), ("nowhere", "cannot be read"), ("", "needs a path")):
                app.chat_screen.composer.write(f"/file {tmp_path / name}" if name else "/file")
                await pilot.press("enter")
                await until(pilot, lambda reason=reason: reason in " ".join(screen(app).split()))
            assert not fake.asked

    drive(scene())


# ---- commands


def test_slash_commands_work_in_the_composer(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "ok", size=(100, 40)) as (app, pilot, fake):
            session = app.session
            for line in ("/set temperature 0.3", "/system Be brief."):
                await pilot.press(*line, "enter")
            await until(pilot, lambda: session.parameters.changed == {"temperature": 0.3, "system": "Be brief."})
            await pilot.press(*"/params", "enter")
            await until(pilot, lambda: isinstance(app.screen, OutputScreen) and "temperature = 0.3" in screen(app))
            await pilot.press("escape", *"/help", "enter")
            await until(pilot, lambda: isinstance(app.screen, HelpScreen))
            await pilot.press("escape", *"/model", "enter")
            await until(pilot, lambda: isinstance(app.screen, ModelsScreen))
            await pilot.press("escape", *"/frobnicate", "enter")
            await until(pilot, lambda: "/frobnicate: unknown command" in screen(app))
            assert app.chat_screen.composer.text == "/frobnicate"
            assert not fake.asked
            app.chat_screen.composer.write("/etc/hosts is what?")
            await pilot.press("enter")
            await until(pilot, lambda: bool(fake.asked))
            await until(pilot, lambda: session.answering is None)
            await pilot.press(*"/regenerate", "enter")
            await until(pilot, lambda: len(fake.asked) == 2 and session.answering is None)
            await pilot.press(*"/title Hosts", "enter")
            await until(pilot, lambda: session.conversation.title == "Hosts")

    drive(scene())


def test_the_editor_writes_to_the_real_stderr(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    from llm_edge.chat.editor import edit_text

    editor = tmp_path / "editor"
    editor.write_text("#!/bin/sh\necho 'an error' >&2\n")
    editor.chmod(0o755)
    monkeypatch.setenv("VISUAL", str(editor))
    real = tmp_path / "stderr"
    with real.open("w") as stderr:  # as in a command, where file descriptor 2 is hidden
        monkeypatch.setattr("sys.stderr", stderr)
        assert edit_text("text") == "text"
    assert real.read_text() == "an error\n"
    assert capfd.readouterr().err == ""


def test_the_editor_writes_the_question(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    editor = tmp_path / "editor"
    editor.write_text("#!/bin/sh\nprintf 'and more' >> \"$1\"\n")
    editor.chmod(0o755)
    monkeypatch.delenv("VISUAL", raising=False)
    monkeypatch.setenv("EDITOR", str(editor))
    from llm_edge.chat.editor import edit_text

    assert edit_text("Some ") == "Some and more"

    async def scene() -> None:
        async with app_with(tmp_path, "ok") as (app, pilot, _):
            app.chat_screen.composer.write("kept")
            await pilot.press("f9")  # a test has no terminal to hand over
            await until(pilot, lambda: "editor needs a terminal" in screen(app))
            assert app.chat_screen.composer.text == "kept"

    drive(scene())


# ---- long texts


@pytest.mark.parametrize("text", ["lorem ipsum " * 9_000, "line\n" * 5_000], ids=["one line", "many lines"])
def test_a_long_paste_is_shown_as_a_label_and_sent_whole(tmp_path: Path, text: str) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "ok", context_length=1_000_000) as (app, pilot, fake):
            composer = app.chat_screen.composer
            await pilot.press(*"See: ")
            app.post_message(events.Paste(text))
            await until(pilot, lambda: composer.text == "See: " + text)
            assert len(composer.document.text) < 60
            await pilot.press(*" end", "enter")
            await until(pilot, lambda: bool(fake.asked))
            assert fake.asked[0][0][-1]["content"] == f"See: {text} end"
            app.post_message(events.Paste(text))
            await until(pilot, lambda: bool(composer.text))
            await pilot.press("backspace")
            assert composer.text == ""

    drive(scene())


# ---- titles


def test_the_model_writes_a_title_where_the_question_is_too_long_for_one(tmp_path: Path) -> None:
    question = "I have been wondering for a long time about the many different reasons why the sky looks blue to us"

    async def scene() -> None:
        async with app_with(tmp_path, "Scattering.", '**Title:** "Why the Sky Is Blue"\n') as (app, pilot, fake):
            await ask(pilot, question)
            await until(pilot, lambda: app.session.conversation.title == "Why the Sky Is Blue")
            await until(pilot, lambda: "Why the Sky Is Blue" in screen(app))
            assert len(app.session.conversation.messages) == 2
            assert app.session.store.load(1).title == "Why the Sky Is Blue"
            assert len(fake.asked) == 2

    drive(scene())


def test_a_question_asked_while_a_title_is_written_is_answered_at_once(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "First.", LONG, "Second.") as (app, pilot, fake):
            await ask(pilot, "word " * 30)
            fake.pause = 1.0
            await until(pilot, lambda: len(fake.asked) == 2)
            fake.pause = 0.0
            began = time.monotonic()
            await ask(pilot, "And?")
            assert time.monotonic() - began < 60  # not the five minutes of the long title
            assert app.session.conversation.path()[-1].content == "Second."

    drive(scene())
