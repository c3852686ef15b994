"""The token view: recorded probabilities of each token, and how the current parameters would change them."""

from __future__ import annotations

import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from textual.pilot import Pilot
from tui_driving import app_with, ask, drive, screen, until, views

from llm_edge.chat.candidates import Candidate, candidates
from llm_edge.chat.token_records import Recorder, pack, unpack
from llm_edge.runtime.errors import InputError
from llm_edge.runtime.sampling.logprobs import TokenLogprob, log_probabilities
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.runtime.sampling.sampler import Sampler
from llm_edge.tui.app import ChatApp
from llm_edge.tui.screens.tokens import TokensScreen
from llm_edge.tui.widgets.parameter_fields import ValueField
from llm_edge.tui.widgets.token_text import TokenText, visible

RECORD = TokenLogprob(7, math.log(0.2), tuple((t, math.log(p)) for t, p in ((3, 0.5), (7, 0.2), (1, 0.1), (2, 0.05))))


def by_token(record: TokenLogprob, params: SamplingParams) -> dict[int | None, Candidate]:
    return {each.token: each for each in candidates(record, params)}


@pytest.mark.parametrize(
    ("params", "cut", "after"),
    [
        ({}, {}, {3: 0.5, 7: 0.2, 1: 0.1, 2: 0.05, None: 0.15}),
        ({"temperature": 0.0}, {7: "greedy", 1: "greedy", 2: "greedy", None: "greedy"}, {3: 1.0}),
        ({"top_k": 2}, {1: "top_k", 2: "top_k", None: "top_k"}, {3: 5 / 7, 7: 2 / 7}),
        ({"top_k": 4}, {None: "top_k"}, {3: 0.5 / 0.85, 7: 0.2 / 0.85, 1: 0.1 / 0.85, 2: 0.05 / 0.85}),
        ({"top_p": 0.6}, {1: "top_p", 2: "top_p", None: "top_p"}, {3: 5 / 7, 7: 2 / 7}),
        ({"top_p": 0.5}, {7: "top_p", 1: "top_p", 2: "top_p", None: "top_p"}, {3: 1.0}),
        ({"top_n_sigma": 0.5}, {7: "top_n_sigma", 1: "top_n_sigma", 2: "top_n_sigma", None: "top_n_sigma"}, {3: 1.0}),
        ({"epsilon_cutoff": 0.15}, {1: "epsilon_cutoff", 2: "epsilon_cutoff", None: "epsilon_cutoff"}, {3: 5 / 7}),
        ({"min_p": 0.3}, {1: "min_p", 2: "min_p", None: "min_p"}, {3: 5 / 7, 7: 2 / 7}),
        ({"top_k": 3, "min_p": 0.3}, {1: "min_p", 2: "top_k", None: "top_k"}, {3: 5 / 7, 7: 2 / 7}),
        ({"top_k": 3, "top_p": 0.7}, {1: "top_p", 2: "top_k", None: "top_k"}, {3: 5 / 7, 7: 2 / 7}),
        ({"temperature": 0.5, "top_k": 2}, {1: "top_k", 2: "top_k", None: "top_k"}, {3: 25 / 29, 7: 4 / 29}),
        ({"repetition_penalty": 5.0, "presence_penalty": 2.0}, {}, {3: 0.5, 7: 0.2}),  # they depend on other tokens
    ],
)
def test_filtered_and_remaining_candidates(
    params: dict[str, Any], cut: dict[int, str], after: dict[int, float]
) -> None:
    found = by_token(RECORD, SamplingParams(**params))
    assert [*found] == [3, 7, 1, 2, None]
    assert {token: each.cut for token, each in found.items() if each.cut} == cut
    for token, chance in after.items():
        assert found[token].after == pytest.approx(chance, abs=1e-6)
    assert sum(each.after for each in found.values()) == pytest.approx(1)
    assert [token for token, each in found.items() if each.drawn] == [7]
    assert found[None].before == pytest.approx(0.15, abs=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_complete_distributions_are_filtered_like_in_the_sampler(seed: int) -> None:
    random = np.random.default_rng(seed)
    logits = random.normal(0, 3, 20).astype(np.float32)  # so few that the record contains all
    record = log_probabilities(logits, int(random.integers(20)), 20)
    for params in (
        SamplingParams(temperature=0.6, top_k=7, top_p=0.9, min_p=0.02),
        SamplingParams(temperature=1.7, top_p=0.8),
        SamplingParams(temperature=0.3, min_p=0.1, top_k=3),
    ):
        ids, left = Sampler(params, ()).candidates(logits)
        assert ids is not None
        expected = np.exp(left - left.max())
        found = by_token(record, params)
        assert {token for token, each in found.items() if not each.cut} == {*ids.tolist()}
        for token, chance in zip(ids.tolist(), expected / expected.sum(), strict=True):
            assert found[token].after == pytest.approx(chance, rel=1e-4)


def test_an_improbable_sampled_token_is_not_listed_as_a_runner_up() -> None:
    record = TokenLogprob(9, math.log(0.001), ((3, math.log(0.5)), (7, math.log(0.2))))
    found = by_token(record, SamplingParams(top_k=3))
    assert found[9].cut == "top_k"
    assert found[9].drawn
    assert not found[None].cut
    assert by_token(record, SamplingParams())[9].after == pytest.approx(0.001, rel=1e-4)


@pytest.mark.parametrize(
    "record",
    [
        TokenLogprob(1, -0.5, ()),
        TokenLogprob(1, -0.5, ((1, math.nan),)),
        TokenLogprob(1, -0.5, ((1, -math.inf), (2, math.inf))),
    ],
)
def test_an_empty_record_yields_nothing(record: TokenLogprob) -> None:
    assert candidates(record, SamplingParams()) == []


@pytest.mark.parametrize("own", [math.nan, -math.inf, -9999.0, 5.0])
def test_unusual_records_of_endpoints_are_accepted(own: float) -> None:
    for params in (SamplingParams(temperature=0.01, top_p=0.5), SamplingParams(temperature=0), SamplingParams(top_k=1)):
        found = by_token(TokenLogprob(1, own, ((2, -1e-9), (3, -9999.0))), params)
        assert sum(each.after for each in found.values()) == pytest.approx(1)


def test_displayed_tokens_are_one_line_without_control_characters() -> None:
    assert visible("a\n\n\tb") == "a⏎⏎⇥b"
    assert visible("\x1b[31m\u202e") == "[31m"
    assert visible("") == "·"
    assert visible("\x07") == "·"


async def asked(pilot: Pilot[Any], app: ChatApp, logprobs: int | None = 8) -> TokensScreen:
    app.session.parameters.set("logprobs", logprobs)
    await ask(pilot, "Talk.")
    await pilot.press("f6")
    await until(pilot, lambda: isinstance(app.screen, TokensScreen))
    await pilot.pause()
    assert isinstance(app.screen, TokensScreen)
    return app.screen


@pytest.mark.parametrize("size", [(80, 24), (200, 60)])
def test_the_cursor_moves_by_keys_and_mouse_and_shows_the_runners_up(tmp_path: Path, size: tuple[int, int]) -> None:
    async def scene() -> None:
        reply = "one two three\nfour five " + " ".join(map(str, range(60)))
        async with app_with(tmp_path, reply, size=size) as (app, pilot, _):
            tokens = (await asked(pilot, app)).query_one(TokenText)
            records = app.session.records[app.session.conversation.path()[-1].id]
            text = screen(app)
            assert "one two three" in text
            first = records[0]
            assert f"{100 * math.exp(first.logprob.logprob):.2f}%" in text
            assert len([line for line in text.splitlines() if "◂ chosen" in line]) == 1
            await pilot.press("right", "right")
            await pilot.pause()
            assert tokens.cursor == 2
            assert f"{100 * math.exp(records[2].logprob.logprob):.2f}%" in screen(app)
            await pilot.press("down", "home", "left")
            assert tokens.cursor == 0
            await pilot.press("down")
            assert tokens.cursor == 3  # a token that starts with a line end has its word on the next line
            await pilot.click(TokenText, offset=(6, 0))
            await pilot.pause()
            assert tokens.cursor == 1
            await pilot.press("pagedown", "pageup", "end", "right")
            assert tokens.cursor == len(records) - 1
            await pilot.press("home", "n")
            unlikely = next(i for i, each in enumerate(records) if i and math.exp(each.logprob.logprob) < 0.5)
            assert tokens.cursor == unlikely
            await pilot.press("f6")
            await pilot.pause()
            assert app.screen is app.chat_screen

    drive(scene())


def test_changing_a_parameter_shows_its_effect_and_applies_to_the_chat(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "one two three", size=(120, 40)) as (app, pilot, fake):
            await asked(pilot, app)
            assert "cut by top-k" not in screen(app)
            field = app.screen.query_one("#value-top_k", ValueField)
            field.focus()
            await pilot.pause()
            await pilot.press("end", "ctrl+u", "2", "enter")
            await until(pilot, lambda: "cut by top-k" in screen(app))
            assert app.session.parameters.value("top_k") == 2
            app.screen.query_one("#value-temperature", ValueField).focus()
            await pilot.pause()
            await pilot.press("end", "ctrl+u", "0", "enter")
            await until(pilot, lambda: "cut by greedy" in screen(app))
            await pilot.press(*"hot", "enter")  # only numbers can be typed
            await pilot.pause()
            assert app.session.parameters.value("temperature") == 0
            await pilot.press("escape", "f3")
            await until(pilot, lambda: app.query("#value-top_k"))
            assert app.query_one("#value-top_k", ValueField).value == "2"
            await ask(pilot, "Again.")
            assert (fake.asked[-1][1].top_k, fake.asked[-1][1].temperature) == (2, 0)

    drive(scene())


def test_an_answer_without_a_record_can_be_regenerated_with_one(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "one two", "three four") as (app, pilot, fake):
            await asked(pilot, app, None)
            assert "'Log-probabilities' (F3) is on" in " ".join(screen(app).split())
            await pilot.press("r")
            await until(pilot, lambda: len(fake.asked) == 2 and app.session.answering is None)
            assert isinstance(app.screen, TokensScreen)  # it stays, and shows the new answer
            assert app.session.parameters.value("logprobs") is None  # later answers are not recorded
            path = app.session.conversation.path()
            assert path[-1].content == "three four"
            assert len(app.session.conversation.siblings(path[-1].id)) == 2
            await until(pilot, lambda: "three four" in screen(app) and "◂ chosen" in screen(app))

    drive(scene())


def test_t_shows_the_tokens_of_the_focused_answer(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "alpha", "omega") as (app, pilot, _):
            app.session.parameters.set("logprobs", 3)
            await ask(pilot, "One?")
            await ask(pilot, "Two?")
            views(app)[1].focus()
            await pilot.press("t")
            await until(pilot, lambda: isinstance(app.screen, TokensScreen))
            await pilot.pause()
            assert "alpha" in screen(app)

    drive(scene())


def test_without_an_answer_a_message_is_shown(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "ok") as (app, pilot, _):
            await pilot.press("f6")
            await pilot.pause()
            assert app.screen is app.chat_screen
            assert "no answer yet" in " ".join(screen(app).split())

    drive(scene())


def test_a_record_is_saved_with_its_answer(tmp_path: Path) -> None:
    """The record of the first answer is still available after a restart with another model."""

    async def first() -> None:
        async with app_with(tmp_path, "one two three four") as (app, pilot, fake):
            app.session.parameters.set("logprobs", 3)
            app.session.parameters.set("max_tokens", 2)
            await ask(pilot, "Count.")
            fake.enqueue(" three four")
            await pilot.press("ctrl+g")
            await until(pilot, lambda: len(fake.asked) == 2 and app.session.answering is None)

    async def second() -> None:
        async with app_with(tmp_path, "someone else") as (app, pilot, fake):
            fake.name = "somebody else"
            app.session.open(1)
            await app.chat_screen.show()
            answer = app.session.conversation.path()[-1]
            assert [each.text(each.logprob.token) for each in app.session.record_of(answer)] == [
                "one",
                " two",
                " three",
                " four",
            ]
            await pilot.press("f6")
            await until(pilot, lambda: isinstance(app.screen, TokensScreen))
            await pilot.pause()
            assert "one two three four" in screen(app)
            assert "Tokens of script's answer" in screen(app)
            assert "◂ chosen" in screen(app)

    drive(first())
    drive(second())


def test_a_damaged_record_is_reported_and_harmless(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "one two") as (app, pilot, fake):
            app.session.parameters.set("logprobs", 3)
            await ask(pilot, "Count.")
            answer = app.session.conversation.path()[-1]
            app.session.records.clear()
            app.session.store.add_records(answer.id, b"x")
            await pilot.press("f6")
            await until(pilot, lambda: isinstance(app.screen, TokensScreen))
            await pilot.pause()
            assert "are damaged" in screen(app)
            fake.enqueue(" three four")
            await pilot.press("escape", "ctrl+g")
            await until(pilot, lambda: app.session.answering is None and answer.content == "one two three four")
            assert len(app.session.record_of(answer)) == 2

    drive(scene())


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no zlib",
        zlib.compress(b"[1]"),
        zlib.compress(b'{"texts": {}, "tokens": [[1, "x", []]]}'),
        zlib.compress(b'{"texts": {"1": 5}, "tokens": []}'),
        zlib.compress(b'{"texts": {"a": "b"}, "tokens": []}'),
        zlib.compress(b"[" * 100_000),
        zlib.compress(b" " * (65 << 20)),
    ],
)
def test_invalid_records_are_rejected(data: bytes) -> None:
    with pytest.raises(InputError, match="damaged"):
        unpack(data)


def test_records_are_loaded_as_saved() -> None:
    recorder = Recorder(lambda token: f"\ud83d\x00{token}" if token == 3 else f"t{token}")
    records = [recorder.record(RECORD), recorder.record(TokenLogprob(5, -math.inf, ((3, -0.25), (5, -math.inf))))]
    again = unpack(pack(records))
    assert [each.text(3) for each in again] == [each.text(3) for each in records]
    assert again[0].text(99) == "<99>"
    assert again[1].logprob == records[1].logprob
    assert again[0].logprob.top == tuple((id_, round(value, 5)) for id_, value in RECORD.top)


def test_the_view_grows_during_generation_without_escape_codes(tmp_path: Path) -> None:
    async def scene() -> None:
        reply = "\x1b]52;c;eA==\x07 \u202eab \x9b31m " + "word " * 200
        async with app_with(tmp_path, reply, pause=0.01) as (app, pilot, _):
            app.session.parameters.set("logprobs", 3)
            await ask(pilot, "Talk.", wait=False)
            answer = app.session.answering
            assert answer is not None
            await until(pilot, lambda: len(app.session.records[answer.id]) > 3)
            await pilot.press("f6")
            await until(pilot, lambda: isinstance(app.screen, TokensScreen))
            before = screen(app).count("word")
            await until(pilot, lambda: screen(app).count("word") > before + 5)
            assert app.session.answering is answer
            assert "]52;c;eA==" in screen(app)
            assert not {"\x1b", "\x07", "\u202e", "\x9b"} & {*screen(app)}

    drive(scene())


def test_a_long_answer_opens_and_scrolls_quickly(tmp_path: Path) -> None:
    async def scene() -> None:
        async with app_with(tmp_path, "word " * 3000 + "last", size=(80, 24), context_length=9000) as (app, pilot, _):
            app.session.parameters.set("max_tokens", 5000)
            tokens = (await asked(pilot, app)).query_one(TokenText)
            await pilot.press("end")
            await until(pilot, lambda: "last" in screen(app))
            assert tokens.cursor == 3000
            await pilot.press("up")
            await until(pilot, lambda: 2900 < tokens.cursor < 3000)

    drive(scene())
