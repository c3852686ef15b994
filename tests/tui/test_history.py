"""The history panel: finding, renaming, deleting, exporting, importing and reopening conversations."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
from project import SUPPORT
from textual.pilot import Pilot
from textual.widgets import Input
from tui_driving import app_with, ask, drive, screen, shown, until, views

from llm_edge.chat.fake import Said
from llm_edge.chat.history import transcript
from llm_edge.chat.history.conversation import Conversation, Message
from llm_edge.chat.history.search import Summary
from llm_edge.chat.history.store import Store
from llm_edge.tui.app import ChatApp
from llm_edge.tui.screens.dialogs import ConfirmDialog, TextPrompt
from llm_edge.tui.widgets.composer import Composer
from llm_edge.tui.widgets.conversation_list import ConversationList, file_name, group_of
from llm_edge.tui.widgets.history_panel import PAGE, HistoryPanel

NOW = time.mktime((2026, 11, 23, 12, 0, 0, 0, 0, -1))
DAY = 86_400


def keep(folder: Path, *questions: str, answer: str = "The cheetah, at 110 km/h.", finished: bool = True) -> list[int]:
    """Put conversations into the application's store; the first one is the most recent."""
    numbers = []
    with Store(folder / "chats.db") as store:
        for question in reversed(questions):
            conversation = store.new()
            store.add(conversation, "user", question)
            message = store.add(conversation, "assistant", answer, model="smollm2")
            message.finished = finished
            store.update(message)
            numbers.append(conversation.id)
    return numbers[::-1]


def panel(app: ChatApp) -> HistoryPanel:
    return app.query_one(HistoryPanel)


def lines(app: ChatApp) -> list[str]:
    """The lines of the list."""
    conversations = app.query_one(ConversationList)
    return [str(option.prompt) for option in conversations.options]


def titles(app: ChatApp) -> list[str]:
    """The first line of each entry, with headings in brackets."""
    options = app.query_one(ConversationList).options
    firsts = [(str(option.prompt).splitlines()[0], option.disabled) for option in options]
    return [f"[{first}]" if heading else first for first, heading in firsts]


def notifications(app: ChatApp) -> list[str]:
    """All notifications."""
    return [notification.message for notification in app._notifications]


async def open_panel(app: ChatApp, pilot: Pilot[Any], *, to_list: bool = True) -> None:
    await pilot.press("f2")
    await until(pilot, lambda: panel(app).has_class("open") and app.query_one(ConversationList).options)
    if to_list:
        await pilot.press("down")
        await until(pilot, lambda: app.query_one(ConversationList).has_focus)


async def until_titles(app: ChatApp, pilot: Pilot[Any], wanted: list[str]) -> None:
    await until(pilot, lambda: [title for title in titles(app) if not title.startswith("[")] == wanted)


async def dialog(app: ChatApp, pilot: Pilot[Any], text: str) -> None:
    """Enter a line of text into the dialog."""
    await until(pilot, lambda: isinstance(app.screen, TextPrompt) and app.screen.query(Input))
    app.screen.query_one(Input).value = text
    await pilot.press("enter")
    await pilot.pause()


# Finding and opening


@pytest.mark.parametrize("size", [(80, 24), (200, 60)])
@pytest.mark.parametrize("key", ["f2", "ctrl+t"])
def test_a_conversation_is_found_and_opened(tmp_path: Path, size: tuple[int, int], key: str) -> None:
    numbers = keep(tmp_path, "What is the fastest animal?", "Tell me a joke")

    async def scene() -> None:
        async with app_with(tmp_path, size=size) as (app, pilot, _):
            assert not panel(app).display
            await pilot.press(key)
            await until(pilot, lambda: panel(app).display and titles(app))
            assert titles(app) == ["[Today]", "What is the fastest animal?", "Tell me a joke"]
            for text in ("Conversations", "Tell me a joke", "smollm2 · 2 messages"):
                assert text in screen(app)
            await pilot.press("down", "down", "enter")
            await until(pilot, lambda: views(app))
            assert app.session.conversation.id == numbers[1]
            assert "Tell me a joke" in shown(views(app)[0])
            assert app.query_one(Composer).has_focus
            assert panel(app).display == (size[0] > 110)  # it covers the conversation on narrow screens
            assert "Tell me a joke  —  script" in screen(app)

    drive(scene())


def test_search_finds_messages_while_typing(tmp_path: Path) -> None:
    numbers = keep(tmp_path, "Tell me a joke")
    keep(tmp_path, "How many Rs are there in strawberry?", answer="Well, there are three of them, as I count " * 3)

    async def scene() -> None:
        async with app_with(tmp_path) as (app, pilot, _):
            await open_panel(app, pilot, to_list=False)
            await pilot.press(*"three")
            await until_titles(app, pilot, ["How many Rs are there in strawberry?"])
            assert titles(app)[0] == "[Found]"
            assert "there are three of them" in " ".join(lines(app)[1].split())
            await pilot.press(*" chee")
            await until_titles(app, pilot, [])
            await until(pilot, lambda: "No matches." in screen(app))
            await pilot.press("escape")
            await until(pilot, lambda: len(titles(app)) == 3)
            assert panel(app).display
            await pilot.press(*"CHEE")
            await until_titles(app, pilot, ["Tell me a joke"])
            assert "cheetah" in lines(app)[1]
            await pilot.press("enter")
            await until(pilot, lambda: app.session.conversation.id == numbers[0])

    drive(scene())


def test_the_mouse_works_too(tmp_path: Path) -> None:
    numbers = keep(tmp_path, "first", "second", "third")

    async def scene() -> None:
        async with app_with(tmp_path, size=(120, 30)) as (app, pilot, _):
            await open_panel(app, pilot)
            await pilot.click(ConversationList, offset=(3, 3))
            await until(pilot, lambda: app.session.conversation.id == numbers[1])
            await pilot.click(ConversationList, offset=(3, 5), button=3)
            await pilot.pause()
            assert app.session.conversation.id == numbers[1]  # the right button only focuses
            buttons = {button.name: button for button in panel(app).query("Button")}
            await pilot.click(buttons["pin"])
            await until(pilot, lambda: titles(app) == ["[Pinned]", "third", "[Today]", "first", "second"])
            await pilot.click(buttons["delete"])
            await until_titles(app, pilot, ["first", "second"])
            await pilot.click(buttons["close"])
            await until(pilot, lambda: not panel(app).display)

    drive(scene())


def test_conversations_are_grouped_by_date(tmp_path: Path) -> None:
    def group(age: float, pinned: bool = False) -> str:
        return group_of(Summary(1, "", pinned, NOW - age, 2, ""), NOW)

    assert [group(0), group(11.9 * 3600), group(-5)] == ["Today"] * 3
    assert [group(12.1 * 3600), group(35.9 * 3600)] == ["Yesterday"] * 2
    assert [group(36.1 * 3600), group(400 * DAY), group(NOW)] == ["Earlier"] * 3
    assert group(400 * DAY, pinned=True) == "Pinned"


def test_thousands_of_conversations_are_loaded_on_demand(tmp_path: Path) -> None:
    count = 3 * PAGE + 20
    with Store(tmp_path / "chats.db") as store:
        for number in range(count):
            old = Conversation(title=f"talk {number}", created=NOW - number * DAY, updated=NOW - number * DAY)
            old.attach(Message(1, None, "user", "needle"))
            old.leaf = 1
            store.import_conversation(old)
        store.pin(count)

    async def scene() -> None:
        async with app_with(tmp_path) as (app, pilot, _):
            await open_panel(app, pilot)
            names = [title for title in titles(app) if not title.startswith("[")]
            assert names == [f"talk {count - 1}", *(f"talk {number}" for number in range(PAGE - 1))]
            conversations = app.query_one(ConversationList)
            for pages in (2, 3):
                await pilot.press("end")
                await until(pilot, lambda pages=pages: len(conversations.options) > pages * PAGE)
            await pilot.press("end")
            await until(pilot, lambda: len([title for title in titles(app) if not title.startswith("[")]) == count)
            names = [title for title in titles(app) if not title.startswith("[")]
            assert names == [f"talk {count - 1}", *(f"talk {number}" for number in range(count - 1))]
            assert titles(app).count("[Earlier]") == 1
            await pilot.press("slash", *"needle")
            await until(pilot, lambda: titles(app)[0] == "[Found]")
            await pilot.press("down", "end")
            await until(pilot, lambda: len(titles(app)) > PAGE + 1)
            names = [f"talk {number}" for number in range(count)]
            assert titles(app)[1:] == names[: len(titles(app)) - 1]

    drive(scene())


def test_stored_text_cannot_control_the_terminal(tmp_path: Path) -> None:
    payloads = [
        "\x1b]52;c;ZXZpbA==\x07",
        "\x1b[2J",
        "\x9b31m",
        "\x1bPq\x1b\\",
        "\u202etxt.exe",
        "\x08\r\x00",
        "\u2066x\u2069",
    ]
    foul = "needle " + " ".join(payloads)
    with Store(tmp_path / "chats.db") as store:
        foreign = Conversation(title=foul, system=foul)
        foreign.attach(Message(1, None, "user", foul))
        foreign.attach(Message(2, 1, "assistant", foul, reasoning=foul, model=foul, params={"seed": foul}))
        foreign.leaf = 2
        store.import_conversation(foreign)
        store._database.execute("UPDATE conversations SET title = ?", (foul,))  # bypasses the sanitization

    async def scene() -> None:
        async with app_with(tmp_path, size=(120, 40)) as (app, pilot, _):
            seen = []

            async def look(text: str) -> None:
                await until(pilot, lambda: text in screen(app))
                seen.append(screen(app) + "".join(lines(app)) + "".join(notifications(app)))

            await open_panel(app, pilot)
            await look("needle")
            await pilot.press("slash", *"needle")
            await look("Found")
            await pilot.press("down", "r")
            await look("Title")
            await pilot.press("escape", "e")
            await look("Export to")
            await pilot.press("escape", "d", "u", "enter")
            await until(pilot, lambda: views(app))
            await look("Restored")
            for text in seen:
                assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)

    drive(scene())


def test_an_empty_history_and_keys_that_close_it(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, size=(80, 24)) as (app, pilot, _):
            await pilot.press("f2")
            await until(pilot, lambda: "No conversations yet" in screen(app))
            await pilot.press("escape")
            assert not panel(app).display
            assert app.query_one(Composer).has_focus
            await pilot.press("f2", "f2")
            assert not panel(app).display
            await pilot.press("f3")
            assert app.query_one("#parameters").display
            await pilot.press("ctrl+t")
            assert not app.query_one("#parameters").display  # one panel at a time on narrow screens
            assert panel(app).display

    drive(scene())


# Renaming, pinning, deleting


@pytest.mark.parametrize("key", ["r", "f2"])
def test_a_conversation_can_be_renamed(tmp_path: Path, key: str) -> None:
    numbers = keep(tmp_path, "first", "second")

    async def scene() -> None:
        async with app_with(tmp_path, size=(120, 30)) as (app, pilot, _):
            await open_panel(app, pilot)
            await pilot.press("enter")
            await until(pilot, lambda: app.session.conversation.id == numbers[0])
            app.query_one(ConversationList).focus()
            await pilot.press(key)
            await dialog(app, pilot, "Cheetahs \x1b]52;c;eA==\x07 & co")
            await until_titles(app, pilot, ["Cheetahs ]52;c;eA== & co", "second"])
            assert "Cheetahs ]52;c;eA== & co  —" in screen(app)
            await pilot.press("down", key)
            await until(pilot, lambda: isinstance(app.screen, TextPrompt))
            await pilot.press("escape")
            await pilot.press("escape")
            await ask(pilot, "And the next?")  # the new title is kept when the conversation continues
            assert app.session.store.load(numbers[0]).title.startswith("Cheetahs")
            assert app.session.store.load(numbers[1]).title == "second"

    drive(scene())


def test_a_conversation_can_be_pinned(tmp_path: Path) -> None:
    keep(tmp_path, "first", "second")

    async def scene() -> None:
        async with app_with(tmp_path) as (app, pilot, _):
            await open_panel(app, pilot)
            await pilot.press("down", "p")
            await until(pilot, lambda: titles(app) == ["[Pinned]", "second", "[Today]", "first"])
            await pilot.press("p")  # it is still highlighted
            await until(pilot, lambda: titles(app) == ["[Today]", "first", "second"])

    drive(scene())


def test_deleting_can_be_undone(tmp_path: Path) -> None:
    numbers = keep(tmp_path, "first", "second", "third")

    async def scene() -> None:
        async with app_with(tmp_path, size=(120, 30)) as (app, pilot, _):
            await open_panel(app, pilot)
            await pilot.press("enter")
            await until(pilot, lambda: len(views(app)) == 2)
            app.query_one(ConversationList).focus()
            await pilot.press("d")
            await until_titles(app, pilot, ["second", "third"])
            await until(pilot, lambda: not views(app))  # it was the current one
            assert notifications(app)[-1] == "Deleted “first”. Press u in the list to undo."
            await pilot.press("delete")
            await until_titles(app, pilot, ["third"])
            await pilot.press("u")
            await until_titles(app, pilot, ["second", "third"])
            assert app.session.conversation.id == 0
            await pilot.press("u")
            await until_titles(app, pilot, ["first", "second", "third"])
            await until(pilot, lambda: len(views(app)) == 2)  # as it was before
            assert app.session.conversation.id == numbers[0]
            await pilot.press("u")
            await until(pilot, lambda: notifications(app)[-1] == "Nothing to undo.")

    drive(scene())


def test_deleting_a_conversation_stops_its_answer(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "word " * 10_000, pause=0.005) as (app, pilot, fake):
            await ask(pilot, "Count", wait=False)
            await until(pilot, lambda: app.session.answering and app.session.answering.content)
            await open_panel(app, pilot)
            await pilot.press("d")
            await until(pilot, lambda: not views(app))
            assert app.session.answering is None
            assert fake.replies[0]._cancelled.is_set()
            await pilot.press("u")
            await until(pilot, lambda: len(views(app)) == 2)
            assert "stopped" in shown(views(app)[1])

    drive(scene())


# Files


def test_conversations_are_exported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "home").mkdir()
    keep(tmp_path, "What is: the/fastest animal?")

    async def scene() -> None:
        async with app_with(tmp_path) as (app, pilot, _):
            await open_panel(app, pilot)
            await pilot.press("e")
            await until(pilot, lambda: isinstance(app.screen, TextPrompt))
            assert app.screen.query_one(Input).value == "What-is-the-fastest-animal.md"
            await pilot.press("enter")
            written = tmp_path / "What-is-the-fastest-animal.md"
            await until(pilot, lambda: notifications(app)[-1:] == [f"Exported to {written.name}"])
            assert "The cheetah" in written.read_text()
            await pilot.press("e")
            await dialog(app, pilot, "~/talk.json")
            await until(pilot, lambda: notifications(app)[-1:] == ["Exported to ~/talk.json"])
            assert transcript.read(tmp_path / "home" / "talk.json").title == "What is: the/fastest animal?"

            written.write_text("precious")
            for answer, content in (("escape", "precious"), ("enter", "precious"), ("y", "The cheetah")):
                await pilot.press("e")
                await dialog(app, pilot, written.name)
                await until(pilot, lambda: isinstance(app.screen, ConfirmDialog))
                assert "already exists. Replace it?" in screen(app)
                await pilot.press(answer)
                await until(pilot, lambda: not isinstance(app.screen, ConfirmDialog))
                await until(pilot, lambda content=content: content in written.read_text())
            await pilot.press("e")
            await dialog(app, pilot, "nowhere/talk.md")
            await until(pilot, lambda: "nowhere/talk.md cannot be written (" in " ".join(screen(app).split()))
            assert app.screen.query_one(Input).value == "nowhere/talk.md"  # it can be corrected there
            await dialog(app, pilot, "corrected.md")
            await until(pilot, lambda: notifications(app)[-1:] == ["Exported to corrected.md"])

    drive(scene())


@pytest.mark.parametrize(
    ("title", "name"),
    [
        ("What is: the/fastest animal?", "What-is-the-fastest-animal.md"),
        ("../../etc/passwd", "etc-passwd.md"),
        ("量子コンピュータ", "量子コンピュータ.md"),
        ("\x1b[31m?!", "31m.md"),
        ("???", "conversation.md"),
        ("x" * 300, "x" * 60 + ".md"),
    ],
)
def test_file_names_are_derived_from_titles(title: str, name: str) -> None:
    assert file_name(title) == name


def archive(folder: Path, count: int) -> Path:
    """An archive as exported by ChatGPT."""
    entries = []
    for number in range(count):
        nodes = {}
        for place, (role, text) in enumerate([("user", f"Question {number}"), ("assistant", f"Answer {number}")]):
            message = {"author": {"role": role}, "content": {"content_type": "text", "parts": [text]}}
            nodes[f"n{place}"] = {"id": f"n{place}", "parent": f"n{place - 1}" if place else None, "message": message}
        entries.append(
            {
                "title": f"Talk {number}",
                "create_time": NOW - number,
                "update_time": NOW - number,
                "mapping": nodes,
                "current_node": "n1",
                "conversation_id": f"c{number}",
            }
        )
    path = folder / "chatgpt.zip"
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("conversations.json", json.dumps(entries))
    return path


def test_chatgpt_archives_are_imported(tmp_path: Path) -> None:
    path = archive(tmp_path, 120)

    async def scene() -> None:
        async with app_with(tmp_path, size=(120, 30)) as (app, pilot, _):
            await pilot.press("f2", "down", "i")
            await dialog(app, pilot, str(path))
            await until(pilot, lambda: notifications(app)[-1:] == ["Imported 120 conversations."])
            await until(pilot, lambda: len(titles(app)) > PAGE)
            await pilot.press("i")
            await dialog(app, pilot, str(path))
            await until(pilot, lambda: notifications(app)[-1:] == ["Imported 0 conversations."])
            await pilot.press("slash", *"Answer 77")
            await until_titles(app, pilot, ["Talk 77"])
            await pilot.press("enter")
            await until(pilot, lambda: views(app) and "Answer 77" in shown(views(app)[-1]))
            panel(app).query_one(ConversationList).focus()
            await pilot.press("i")
            await dialog(app, pilot, str(tmp_path / "none.zip"))
            await until(pilot, lambda: "none.zip: cannot be read (No such file" in notifications(app)[-1])

    drive(scene())


def test_exported_conversations_are_imported(tmp_path: Path) -> None:
    odd = {"tokens": "many", "tokens_per_second": [], "time_to_first_token": {}, "prompt_tokens": True, "changes": [1]}
    conversation = Conversation(title="Old \x1b[2J talk", created=NOW, updated=NOW, system="Be brief.")
    conversation.attach(Message(1, None, "user", "Why?", created=NOW))
    conversation.attach(Message(2, 1, "assistant", "Because.", created=NOW, figures=odd | {"finish_reason": "stop"}))
    conversation.leaf = 2
    transcript.save(str(tmp_path / "talk.json"), conversation)

    async def scene() -> None:
        async with app_with(tmp_path) as (app, pilot, _):
            await pilot.press("f2", "down", "i")
            await dialog(app, pilot, str(tmp_path / "talk.json"))
            await until(pilot, lambda: notifications(app)[-1:] == ["Imported 1 conversation."])
            await until_titles(app, pilot, ["Old [2J talk"])
            await pilot.press("enter")
            await until(pilot, lambda: views(app))
            assert "complete" in shown(views(app)[1])
            assert app.session.conversation.messages[2].figures == {"finish_reason": "stop"}
            assert app.session.parameters.system == "Be brief."

    drive(scene())


# State restored with a conversation


def test_the_system_prompt_of_a_conversation_is_restored(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "Arr.", "Yes.", "Hm.", "So.", size=(120, 40)) as (app, pilot, fake):
            app.session.apply_change(lambda parameters: parameters.set_text("system", "You are a pirate."))
            await ask(pilot, "Who are you?")
            pirate = app.session.conversation.id
            await pilot.press("ctrl+n")
            app.session.apply_change(lambda parameters: parameters.set_text("system", "Be brief."))
            await ask(pilot, "Is it so?")
            brief = app.session.conversation.id
            assert [app.session.store.load(number).system for number in (pirate, brief)] == [
                "You are a pirate.",
                "Be brief.",
            ]
            await open_panel(app, pilot)
            await pilot.press("down", "enter")
            await until(pilot, lambda: app.session.conversation.id == pirate)
            await pilot.press("f3")
            assert app.query_one("#value-system").text == "You are a pirate."  # type: ignore[attr-defined]
            await ask(pilot, "Sure?")
            await pilot.press("ctrl+n")  # a new one starts with the last edited prompt, not with the last viewed one
            await ask(pilot, "And now?")
            systems = [asked[0]["content"] for asked, _, _ in fake.asked if asked[0]["role"] == "system"]
            assert systems == ["You are a pirate.", "Be brief.", "You are a pirate.", "Be brief."]
            assert app.session.conversation.system == "Be brief."

    drive(scene())


def test_earlier_questions_are_in_the_input_history(tmp_path: Path) -> None:
    _, gone, *_ = keep(tmp_path, "the latest", "deleted", "the first\nof two lines")
    with Store(tmp_path / "chats.db") as store:
        store.delete(gone)
        pasted = store.new()
        store.add(pasted, "user", "x" * 10_000)
        foreign = Conversation(title="foreign")
        foreign.attach(Message(1, None, "user", "asked elsewhere"))
        store.import_conversation(foreign, "chatgpt:1", {1: "n"})

    async def scene() -> None:
        async with app_with(tmp_path) as (app, pilot, _):
            composer = app.query_one(Composer)
            await pilot.press("up")
            assert composer.text == "the latest"
            await pilot.press("up", "up", "up")
            assert composer.text == "the first\nof two lines"

    drive(scene())


def test_the_title_is_set_by_the_first_question(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "word " * 1000, pause=0.01, size=(120, 30)) as (app, pilot, _):
            await pilot.press("f2")
            app.query_one(Composer).focus()
            await ask(pilot, "What is the capital of France? I forgot.", wait=False)
            assert app.session.answering is not None
            await until(pilot, lambda: "What is the capital of France?" in "".join(titles(app)))
            assert "What is the capital of France?" in screen(app).splitlines()[0]

    drive(scene())


KILLED = """
import asyncio, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from tui_driving import app_with, ask, until

async def scene():
    async with app_with(Path({folder!r}), "word " * 10**5, pause=0.002, context_length=10**6) as (app, pilot, _):
        app.session.apply_change(lambda parameters: parameters.set("max_tokens", 10**5))
        await ask(pilot, "Count", wait=False)
        await until(pilot, lambda: app.session.answering.content.count("word") > 400)
        print("now", flush=True)
        await asyncio.sleep(60)

asyncio.run(scene())
"""


def test_an_answer_cut_by_a_kill_can_be_continued(tmp_path: Path) -> None:
    script = KILLED.format(tests=str(SUPPORT), folder=str(tmp_path))
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, env=os.environ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"now\n"
        process.send_signal(signal.SIGKILL)

    async def scene() -> None:
        async with app_with(tmp_path, "and the rest.", "From the beginning.") as (app, pilot, fake):
            await open_panel(app, pilot)
            await pilot.press("enter")
            await until(pilot, lambda: len(views(app)) == 2)
            assert shown(views(app)[1]).splitlines()[0].endswith("unfinished")
            cut = app.session.conversation.path()[1].content
            assert cut.count("word") > 100
            assert not app.session.store.load(1).path()[1].finished
            await pilot.press("ctrl+g")
            await until(pilot, lambda: fake.asked and app.session.answering is None)
            await pilot.pause()
            assert fake.asked[0][2] == cut
            kept = app.session.store.load(1).path()[1]
            assert (kept.content, kept.finished) == (cut + "and the rest.", True)
            assert "unfinished" not in shown(views(app)[1])
            assert views(app)[1].region.bottom <= app.query_one("#conversation").region.bottom  # scrolled to its end
            await pilot.press("ctrl+r")
            await until(pilot, lambda: len(fake.asked) == 2 and app.session.answering is None)
            assert app.session.conversation.path()[1].content == "From the beginning."

    drive(scene())


def test_a_question_without_an_answer_after_a_kill(tmp_path: Path) -> None:
    with Store(tmp_path / "chats.db") as store:
        asked = store.new()
        store.add(asked, "user", "Only asked")
        thought = store.new()
        store.add(thought, "user", "Thought about")
        message = store.add(thought, "assistant")
        message.reasoning = "One and"
        store.update(message)

    async def scene() -> None:
        reply = Said("Two.", reasoning="One and one")
        async with app_with(tmp_path, "One.", reply) as (app, pilot, _):
            for number, (content, reasoning) in ((asked.id, ("One.", "")), (thought.id, ("Two.", "One and one"))):
                panel(app).open(number)
                await until(pilot, lambda number=number: app.session.conversation.id == number)
                await pilot.pause()
                await pilot.press("ctrl+g")
                await until(
                    pilot, lambda: app.session.conversation.path()[-1].finished and app.session.answering is None
                )
                answer = app.session.conversation.path()[-1]
                assert (answer.role, answer.content, answer.reasoning) == ("assistant", content, reasoning)

    drive(scene())


def test_opening_another_conversation_stops_an_answer_and_reports_it(tmp_path: Path) -> None:
    (number,) = keep(tmp_path, "earlier")

    async def scene() -> None:
        async with app_with(tmp_path, "word " * 10_000, pause=0.005) as (app, pilot, _):
            await ask(pilot, "Count", wait=False)
            counting = app.session.conversation
            await until(pilot, lambda: app.session.answering and app.session.answering.content)
            await open_panel(app, pilot)
            await pilot.press("down", "enter")
            await until(pilot, lambda: app.session.conversation.id == number)
            assert "Press Ctrl-G there to continue it" in notifications(app)[-1]
            answer = app.session.store.load(counting.id).path()[1]
            assert (answer.figures["finish_reason"], answer.content[:5]) == ("cancelled", "word ")

    drive(scene())
