"""The parameter panel: every parameter by keys, mouse and typing, while an answer is generated; presets."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
from textual.pilot import Pilot
from textual.widgets import Button, Select, Static
from tui_driving import app_with, ask, drive, screen, shown, until, views

from llm_edge.chat.endpoint.request import unsupported
from llm_edge.chat.fake import FakeResponder
from llm_edge.chat.figures import figures_line
from llm_edge.chat.parameters import EDITABLE
from llm_edge.chat.presets import MODEL_DEFAULTS
from llm_edge.runtime.sampling.constraint import Constraint
from llm_edge.tui.app import ChatApp
from llm_edge.tui.widgets.composer import Composer
from llm_edge.tui.widgets.parameter_fields import ParameterLine, StepButton, TextField, ValueField
from llm_edge.tui.widgets.parameter_panel import ParameterPanel, PresetNameInput

LONG = "word " * 400
PER_TOKEN = 0.02  # seconds; an answer of 8
NUMBERS = [parameter for parameter in EDITABLE.values() if parameter.kind not in ("strings", "text")]


def error_under(app: ChatApp, name: str) -> str:
    shown = [line for line in app.query(f"#error-{name}").results(Static) if line.display]
    return str(shown[0].content) if shown else ""


async def type_into(pilot: Pilot[Any], name: str, text: str) -> None:
    """Type like a user: focus the field, replace its text, press Enter."""
    pilot.app.query_one(f"#value-{name}").focus()
    await pilot.pause()
    await pilot.press("end", "ctrl+u", *text)
    if isinstance(pilot.app.query_one(f"#value-{name}"), ValueField):
        await pilot.press("enter")
    await pilot.pause()


def test_every_number_can_be_changed_by_keys_during_generation(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, 10 * LONG, pause=3 * PER_TOKEN, size=(120, 40)) as (app, pilot, fake):
            app.session.parameters.defaults = dataclasses.replace(fake.default_params, max_tokens=4000)
            await ask(pilot, "Talk.", wait=False)
            await pilot.press("f3")
            answer = app.session.answering
            assert answer is not None
            await until(pilot, lambda: len(answer.content) > 10)
            for parameter in NUMBERS:
                app.query_one(f"#value-{parameter.name}").focus()
                await pilot.press("right" if parameter.name not in ("top_p", "typical_p") else "left")
                await pilot.pause()
                value = app.session.parameters.value(parameter.name)
                assert value != app.session.parameters.default(parameter.name)
                assert getattr(fake.replies[-1].params, parameter.name) == value
                assert app.query_one(f"#value-{parameter.name}", ValueField).value == app.session.parameters.text(
                    parameter.name
                )
                assert app.query_one(f"#title-{parameter.name}").has_class("changed")
            assert app.session.answering is answer  # all changes happened during generation
            changes = {each["name"]: each for each in answer.figures["changes"]}
            assert set(changes) == {parameter.name for parameter in NUMBERS}
            assert all(0 < each["at"] < 4000 for each in changes.values())
            await pilot.press("escape", "escape")  # closes the panel, then stops the answer
            await until(pilot, lambda: app.session.answering is None)
            await until(pilot, lambda: "temperature 0.75 from token" in " ".join(shown(views(app)[-1]).split()))

    drive(scene())


def test_texts_apply_during_generation_and_others_from_the_next_answer(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, LONG, "two", pause=PER_TOKEN, size=(120, 60)) as (app, pilot, fake):
            await ask(pilot, "Talk.", wait=False)
            await pilot.press("f3")
            answer = app.session.answering
            assert answer is not None
            await until(pilot, lambda: bool(answer.content))
            await type_into(pilot, "stop", "END")
            assert fake.replies[-1].params.stop == ("END",)
            await type_into(pilot, "system", "Be brief.")
            await type_into(pilot, "json_schema", "{}")
            assert app.session.answering is answer
            changes = {each["name"]: each for each in answer.figures["changes"]}
            assert {name for name, each in changes.items() if each["at"] is None} == {"system", "json_schema"}
            assert set(changes) == {"stop", "system", "json_schema"}
            assert "system prompt Be brief. from the next answer" in figures_line(answer.figures)
            assert changes["stop"]["value"] == "END"
            app.session.stop()
            await until(pilot, lambda: app.session.answering is None)
            await ask(pilot, "Again.")
            messages, params, _ = fake.asked[-1]
            assert messages[0] == {"role": "system", "content": "Be brief."}
            assert params.constraint == Constraint.json()
            assert params.stop == ("END",)
            assert "with stop strings 'END'" in shown(views(app)[-1])

    drive(scene())


def test_typed_values_apply_on_enter_and_blur_with_errors_below_the_field(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "ok", size=(120, 50)) as (app, pilot, _):
            await pilot.press("f3")
            await type_into(pilot, "temperature", "1.3")
            assert app.session.parameters.changed == {"temperature": 1.3}
            await type_into(pilot, "temperature", "1e")
            assert "temperature" in error_under(app, "temperature")
            assert "a number" in error_under(app, "temperature")
            assert app.session.parameters.changed == {"temperature": 1.3}
            await type_into(pilot, "temperature", "99")  # beyond the slider's range but valid
            assert error_under(app, "temperature") == ""
            assert app.session.parameters.changed == {"temperature": 99.0}
            field = app.query_one("#value-top_k", ValueField)
            field.focus()
            await pilot.pause()
            await pilot.press("end", "ctrl+u", *"12", "tab")
            await pilot.pause()
            assert app.session.parameters.changed == {"temperature": 99.0, "top_k": 12}

    drive(scene())


def test_up_and_down_move_between_parameters_and_left_and_right_change_them(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "ok", size=(120, 50)) as (app, pilot, _):
            parameters = app.session.parameters
            await pilot.press("f3", "down", "down")
            assert app.focused is app.query_one("#value-top_k")
            assert parameters.changed == {}
            await until(pilot, lambda: "Sample from the k most likely tokens" in screen(app))  # the parameter's help
            await pilot.press("right", "up", "left", *"hot words")
            assert parameters.changed == {"top_k": 5, "top_p": 0.9}
            assert app.query_one("#value-top_p", ValueField).value == "0.9"  # words are not typed into numbers
            await pilot.press("0", ".", "5", "enter")
            assert parameters.changed == {"top_k": 5, "top_p": 0.5}
            await pilot.press("ctrl+z")
            await until(pilot, lambda: parameters.changed == {"top_k": 5, "top_p": 0.9})
            await pilot.press("ctrl+z", "ctrl+z")
            await until(pilot, lambda: parameters.changed == {})
            app.query_one("#value-system").focus()
            await pilot.press("up")
            await until(pilot, lambda: app.focused is not app.query_one("#value-system"))

    drive(scene())


def test_the_answer_stays_visible_while_the_panels_are_open_in_a_small_terminal(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "The answer.", size=(80, 24)) as (app, pilot, _):
            await ask(pilot, "Why?")
            for key in ("f3", "f2"):
                await pilot.press(key)
                await until(pilot, lambda: "The answer." in screen(app) and "tokens" in screen(app))
                await pilot.press("escape")

    drive(scene())


def test_parameters_follow_neither_into_new_conversations_nor_to_other_models(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "ok") as (app, pilot, fake):
            session = app.session
            session.apply_change(lambda parameters: parameters.set("temperature", 0.1))
            session.apply_change(lambda parameters: parameters.set("system", "Be brief."))
            await ask(pilot, "Hello?")
            other = FakeResponder("ok", name="other")
            session.set_responder(other)
            assert session.parameters.changed == {"system": "Be brief."}
            session.apply_change(lambda parameters: parameters.set("top_k", 7))
            session.set_responder(fake)
            assert session.parameters.changed == {"temperature": 0.1, "system": "Be brief."}
            session.set_responder(other)
            assert session.parameters.value("top_k") == 7
            session.set_responder(fake)
            await pilot.press("ctrl+n")
            await until(pilot, lambda: session.parameters.changed == {"system": "Be brief."})
            await pilot.press("ctrl+z")
            await until(pilot, lambda: session.parameters.value("temperature") == 0.1)  # the conversation's own

    drive(scene())


def test_parameters_that_a_model_does_not_take_are_hidden(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "ok", size=(120, 50)) as (app, pilot, _):
            panel = app.query_one(ParameterPanel)
            await pilot.press("f3")
            assert app.query_one("#value-reasoning_budget").display
            panel.use(app.session.parameters, "endpoint", unsupported("http://127.0.0.1:8000/v1"))
            await until(pilot, lambda: "Reasoning budget" not in screen(app) and "Top-k" in screen(app))
            panel.use(app.session.parameters, "endpoint", unsupported("https://api.openai.com/v1"))
            await until(pilot, lambda: "Top-k" not in screen(app) and "Temperature" in screen(app))

    drive(scene())


def test_the_mouse_changes_values(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "ok", size=(120, 50)) as (app, pilot, _):
            await pilot.press("f3")
            await pilot.pause()
            line = app.query(ParameterLine).first()
            less, more = line.query(StepButton)
            await pilot.click(more)
            await pilot.click(more)
            await pilot.click(less)
            await pilot.pause()
            assert app.session.parameters.changed == {"temperature": 0.75}
            await pilot.click("#reset")
            await pilot.pause()
            assert app.session.parameters.changed == {}
            assert line.query_one(ValueField).value == "0.7"

    drive(scene())


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ('{"type": ', "not JSON"),
        ('{"type": "objec"}', "objec"),
        ('{"$ref": "#/nowhere"}', "nowhere"),
        ("[1]", "give a JSON object"),
        ('{"a": "\\u001b]52;c;x\\u0007", "type": "\\u009b31m"}', ""),
    ],
)
def test_an_unsatisfiable_schema_is_reported_below_its_field(tmp_path: Path, schema: str, reason: str) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "ok", size=(120, 60)) as (app, pilot, _):
            await pilot.press("f3")
            area = app.query_one("#value-json_schema", TextField)
            area.focus()
            area.load_text(schema)
            await until(pilot, lambda: error_under(app, "json_schema"))
            assert "json_schema" in error_under(app, "json_schema")
            assert reason in error_under(app, "json_schema")
            assert "\x1b" not in error_under(app, "json_schema")
            assert "\x9b" not in error_under(app, "json_schema")
            assert app.session.parameters.changed == {}
            area.load_text('{"type": "object"}')
            await until(pilot, lambda: not error_under(app, "json_schema"))
            await until(pilot, lambda: app.session.parameters.changed == {"json_schema": '{"type": "object"}'})
            assert app.session.parameters.params.constraint == Constraint.json_schema({"type": "object"})

    drive(scene())


def test_a_preset_is_saved_used_replaced_and_deleted(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "ok", size=(120, 50)) as (app, pilot, _):
            select = app.query_one("#presets", Select)
            await pilot.press("f3")
            await pilot.pause()
            assert select.value == MODEL_DEFAULTS
            assert app.query_one("#delete-preset", Button).disabled
            await type_into(pilot, "temperature", "1.1")
            assert select.value is Select.NULL
            await pilot.press("ctrl+s")
            assert app.query_one(PresetNameInput).display
            await pilot.press(*"greedy", "enter")
            await pilot.pause()
            assert "greedy is a built-in preset" in error_under(app, "presets")
            await pilot.press("end", "ctrl+u", *"mine", "enter")
            await until(pilot, lambda: select.value == "mine")
            assert not app.query_one(PresetNameInput).display
            assert error_under(app, "presets") == ""

            await pilot.click("#reset")
            await until(pilot, lambda: select.value == MODEL_DEFAULTS)
            assert app.session.parameters.changed == {}
            select.value = "greedy"
            await until(pilot, lambda: app.session.parameters.value("temperature") == 0)
            select.value = "mine"
            await until(pilot, lambda: app.session.parameters.changed == {"temperature": 1.1})
            assert app.query_one("#value-temperature", ValueField).value == "1.1"

            await type_into(pilot, "temperature", "1.2")
            await pilot.press("ctrl+s", "end", "ctrl+u", *"mine", "enter")
            await until(pilot, lambda: select.value == "mine")
            await pilot.click("#delete-preset")
            await until(pilot, lambda: select.value is Select.NULL)
            assert app.session.parameters.changed == {"temperature": 1.2}  # still applied
        async with app_with(tmp_path, "ok") as (app, pilot, _):
            assert "mine" not in (tmp_path / "settings.json").read_text(encoding="utf-8")

    drive(scene())


def test_presets_persist_and_can_be_chosen_by_keys(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "ok", size=(80, 24)) as (app, pilot, _):
            await pilot.press("f3")
            await type_into(pilot, "top_k", "3")
            await pilot.press("ctrl+s", *"three", "enter")
            await pilot.pause()
        async with app_with(tmp_path, "ok", size=(80, 24)) as (app, pilot, fake):
            await pilot.press("f3")
            app.query_one("#presets").focus()
            await pilot.press("enter")
            await pilot.pause()
            assert "always the most likely token" in screen(app)
            await pilot.press("down", "enter")
            await until(pilot, lambda: app.session.parameters.changed == {"top_k": 3})
            await pilot.press("f3")
            await ask(pilot, "Hello?")
            assert fake.asked[-1][1].top_k == 3
            assert dict(app.session.conversation.path()[-1].params) == {"top_k": 3}
            await pilot.resize_terminal(120, 40)
            await pilot.pause()
            assert "with top-k 3" in shown(views(app)[-1])

    drive(scene())


def test_escape_from_the_name_field_saves_nothing(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "ok") as (app, pilot, _):
            await pilot.press("f3")
            await pilot.press("ctrl+s", *"mine", "escape")
            await pilot.pause()
            assert not app.query_one(PresetNameInput).display
            assert not (tmp_path / "settings.json").exists()

    drive(scene())


def test_a_preset_applies_during_generation(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, LONG, pause=PER_TOKEN, size=(120, 50)) as (app, pilot, fake):
            await ask(pilot, "Talk.", wait=False)
            answer = app.session.answering
            assert answer is not None
            await until(pilot, lambda: bool(answer.content))
            await pilot.press("f3")
            app.query_one("#presets", Select).value = "creative"
            await until(pilot, lambda: fake.replies[-1].params.dry_multiplier == 0.8)
            assert app.session.answering is answer
            expected = dataclasses.replace(fake.default_params, temperature=1.0, top_p=1.0, min_p=0.05)
            expected = dataclasses.replace(expected, dry_multiplier=0.8, max_tokens=fake.replies[-1].params.max_tokens)
            assert fake.replies[-1].params == expected
            names = {each["name"] for each in answer.figures["changes"]}
            assert names == {"temperature", "top_p", "min_p", "dry_multiplier"}

    drive(scene())


def test_leaving_the_panel_untouched_changes_nothing_even_without_a_model(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "ok", size=(120, 50)) as (app, pilot, _):
            await pilot.press("f3")
            for _ in range(len(EDITABLE) + 6):
                await pilot.press("tab")
            await pilot.press("f3")
            await pilot.pause()
            assert app.session.parameters.changed == {}
            assert not app.query_one(ParameterPanel).has_class("open")
            assert app.focused is app.query_one(Composer)

    drive(scene())


def test_escape_codes_pasted_into_a_field_do_not_reach_the_terminal(tmp_path: Path) -> None:
    from textual.events import Paste

    async def scene() -> None:
        async with app_with(tmp_path, "ok", size=(120, 50)) as (app, pilot, _):
            await pilot.press("f3")
            for name in ("system", "temperature"):
                field = app.query_one(f"#value-{name}")
                field.focus()
                await pilot.pause()
                app.post_message(Paste("\x1b]52;c;eA==\x07\u202e1"))
                await pilot.pause()
                assert "\x1b" not in screen(app)
                assert "\u202e" not in screen(app)
            assert app.session.parameters.system == "]52;c;eA==1"

    drive(scene())


@pytest.mark.parametrize(
    ("content", "reported"),
    [
        ("{", "not JSON"),
        ('{"presets": 3}', "presets: expected an object of models"),
        ('{"presets": {"script": {"bad": 1}}}', "script, bad: expected an object of parameters"),
        ('{"presets": {"script": {"b\\u001b[2Jd": {"temperature": "hot"}}}}', ""),
    ],
)
def test_damaged_settings_are_reported_and_the_panel_works(tmp_path: Path, content: str, reported: str) -> None:
    async def scene() -> None:
        (tmp_path / "settings.json").write_text(content, encoding="utf-8")
        async with app_with(tmp_path, "ok", size=(120, 50)) as (app, pilot, _):
            assert (reported in app.settings.trouble) if reported else not app.settings.trouble
            if reported:
                assert str(tmp_path)[:12] in screen(app)  # a notification
            await pilot.press("f3")
            if not reported:
                app.query_one("#presets", Select).value = "b\x1b[2Jd"
                await until(pilot, lambda: "cannot be used" in error_under(app, "presets"))
                await until(pilot, lambda: app.query_one("#presets", Select).value == MODEL_DEFAULTS)
            await type_into(pilot, "temperature", "1.3")
            await pilot.press("ctrl+s", *"mine", "enter")
            await until(pilot, lambda: app.query_one("#presets", Select).value == "mine")
            assert "\x1b" not in screen(app)
        if reported:
            assert (tmp_path / "settings.damaged-1.json").read_text(encoding="utf-8") == content

    drive(scene())
