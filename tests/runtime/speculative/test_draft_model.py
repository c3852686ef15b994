"""A smaller model that guesses: what it guesses, when it rests, and that texts stay as they are."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import tiny
from calling import call
from safetensors.torch import load_file, save_file
from sessions import open_file

from llm_edge.bench import draft as measured
from llm_edge.exporter.export import export
from llm_edge.exporter.options import ExportOptions, GraphChoice
from llm_edge.runtime import Constraint, Engine, FinishReason, GenerationResult, Model, SamplingParams
from llm_edge.runtime.backend.session import PREFILL_CHUNK, Session
from llm_edge.runtime.bundle import MANIFEST, Bundle, manifest_entry
from llm_edge.runtime.errors import BundleError, ParameterError
from llm_edge.runtime.speculative.draft_model import DraftModel, DraftModelProposer, optimal_draft_length
from llm_edge.runtime.speculative.prompt_lookup import MAX_DRAFT_TOKENS
from llm_edge.tui import cli

LIVELY: dict[str, Any] = {"initializer_range": 0.3, "tie_word_embeddings": False}  # does not repeat its last token
PROMPT = "The quick brown fox"
GREEDY = SamplingParams(temperature=0, max_tokens=60)
DRAWN = SamplingParams(temperature=0.3, max_tokens=60, seed=1)
WAYS = [GREEDY, DRAWN, replace(DRAWN, seed=2, top_k=20, repetition_penalty=1.2)]
SYSTEM = {"role": "system", "content": "You answer questions about foxes and dogs, and never about cats. " * 4}


def said(result: GenerationResult) -> tuple[Any, ...]:
    return result.text, result.tokens, result.finish_reason


def exported(checkpoint: Path, output: Path, graph: GraphChoice = GraphChoice.FUSED) -> Path:
    export(str(checkpoint), ExportOptions(output, precision="fp32", graph=graph, validate=False))
    return output


def changed(bundle: Path, to: Path, name: str, change: Callable[[str], str], **model: int) -> Path:
    """A copy of a bundle with another text in one of its files, other figures in its manifest, which agrees."""
    shutil.copytree(bundle, to)
    (to / name).write_text(change((to / name).read_text("utf-8")), "utf-8")
    manifest = json.loads((to / MANIFEST).read_text())
    manifest["files"][name] = manifest_entry(to / name)
    manifest["model"] |= model
    (to / MANIFEST).write_text(json.dumps(manifest))
    return to


def session_of(bundle: Path) -> Session:
    opened = Bundle.open(bundle)
    info = opened.precision("fp32")
    return open_file(opened.file(info.model), opened.shape, info.share_buffer, "cpu", 1)


def watched(draft: DraftModel, patch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens each of a draft's steps takes from now on."""
    steps: list[int] = []
    step = draft._session.step

    def noted(tokens: list[int], num_logits: int = 1) -> Any:
        steps.append(len(tokens))
        return step(tokens, num_logits)

    patch.setattr(draft._session, "step", noted)
    return steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("draft")


@pytest.fixture(scope="module")
def small(folder: Path) -> Path:
    return exported(tiny.save_checkpoint(folder / "small-checkpoint", **LIVELY), folder / "small")


@pytest.fixture(scope="module")
def large(folder: Path, small: Path) -> Path:
    """Computes what `small` does, over six layers: four of them add nothing."""
    checkpoint = tiny.save_checkpoint(folder / "large-checkpoint", num_hidden_layers=6, **LIVELY)
    weights = load_file(checkpoint / "model.safetensors") | load_file(folder / "small-checkpoint/model.safetensors")
    for name, weight in weights.items():
        if any(f"layers.{layer}." in name for layer in range(2, 6)) and ("o_proj" in name or "down_proj" in name):
            weight.zero_()
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    return exported(checkpoint, folder / "large")


@pytest.fixture(scope="module")
def stranger(folder: Path) -> Path:
    """As small as `small`, and of another mind."""
    return exported(tiny.save_checkpoint(folder / "stranger-checkpoint", seed=5, **LIVELY), folder / "stranger")


@pytest.fixture(scope="module")
def plain(large: Path) -> Model:
    """Without a draft."""
    return Model.load(large, "fp32", provider="cpu", threads=1)


@pytest.fixture(scope="module")
def helped(large: Path, small: Path) -> Model:
    return Model.load(large, "fp32", provider="cpu", threads=1, draft=small)


# What a draft guesses


@pytest.fixture
def draft(small: Path) -> DraftModel:
    return DraftModel(session_of(small), 320, 0.4)


@pytest.fixture(scope="module")
def own(small: Path) -> Callable[[list[int], int], list[int]]:
    """What the small model goes on with by itself."""
    model = Model.load(small, "fp32", provider="cpu", threads=1)
    model.speculative = False
    banned = replace(GREEDY, banned_tokens=tuple(range(320, 331)))

    def answer(tokens: list[int], count: int) -> list[int]:
        found: list[int] = []
        while len(found) < count:  # beyond the ends of answers
            params = replace(banned, max_tokens=count - len(found))
            found += model.generate([*tokens, *found], params).result().tokens
        return found

    return answer


def test_a_draft_guesses_what_it_would_say(draft: DraftModel, own: Callable[[list[int], int], list[int]]) -> None:
    order = random.Random(0)
    text = [order.randrange(320) for _ in range(30)]
    for _ in range(25):
        guess = draft.propose(text, count := order.randrange(1, 9))
        assert guess == own(text, count)
        right = order.randrange(count + 1)
        text = [*text, *guess[:right], order.randrange(320)]  # at times what it would have guessed
        if order.random() < 0.3:
            text = text[: order.randrange(2, len(text))]
            draft.start(text)


def test_a_long_text_is_caught_up_with_in_pieces(
    draft: DraftModel, own: Callable[[list[int], int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    order = random.Random(1)
    text = [order.randrange(320) for _ in range(3 * PREFILL_CHUNK)]
    steps = watched(draft, monkeypatch)
    vain = 0
    while not (guess := draft.propose(text, 4)):
        vain += 1
        assert len(steps) == vain
    assert (vain, guess) == (2, own(text, 4))
    assert steps == [PREFILL_CHUNK, PREFILL_CHUNK, PREFILL_CHUNK, 1, 1, 1]


def test_what_texts_begin_with_is_not_computed_again(draft: DraftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    order = random.Random(2)
    text = [order.randrange(320) for _ in range(100)]
    draft.propose(text, 4)
    steps = watched(draft, monkeypatch)
    draft.start(text)  # the last two tokens are computed anyway, and cuts lie at multiples of 8
    draft.propose(text, 1)
    assert steps == [4]
    draft.start([*text[:50], 0, 0, 0])
    draft.propose([*text[:50], 0, 0, 0], 1)
    assert steps == [4, 5]
    draft.clear_cache()
    draft.propose(text, 1)
    assert steps == [4, 5, 100]


def test_tokens_that_a_draft_does_not_have(draft: DraftModel) -> None:
    guess = draft.propose([5, 6, 331, 100_000, 7], 5)
    assert len(guess) == 5
    assert all(0 <= token < 320 for token in guess)


def test_a_draft_does_not_guess_beyond_its_context(draft: DraftModel) -> None:
    limit = draft._session.limit
    text = [3, 4] * (limit // 2)
    for _ in range(limit // PREFILL_CHUNK):
        draft.propose(text[: limit - 2], 1)
    assert [len(draft.propose(text[:length], 5)) for length in (limit - 2, limit - 1, limit)] == [3, 2, 1]
    assert draft.propose([*text, 3], 5) == []


# How much is guessed


@pytest.mark.parametrize("price", [0.05, 0.3, 0.6, 0.95, 1.0, 2.0])
def test_guesses_are_as_long_as_pays_best(price: float) -> None:
    lengths = []
    for percent in range(100):
        chance = percent / 100

        def speed(count: int, chance: float = chance) -> float:
            return sum(chance**index for index in range(count + 1)) / (1 + count * price)

        lengths.append(optimal_draft_length(chance, price, 12))
        assert speed(lengths[-1]) == pytest.approx(max(speed(count) for count in range(13)))
        assert (lengths[-1] > 0) == (chance > price)
    assert lengths == sorted(lengths)


class Oracle(DraftModel):
    """Knows how a text goes on, or does not."""

    def __init__(self, text: list[int], price: float = 0.4) -> None:
        self.cost_ratio = price
        self.right = True
        self.behind = 0
        self._text = text

    def start(self, tokens: Any) -> None:
        pass

    def propose(self, tokens: list[int], count: int) -> list[int]:
        guess = self._text[len(tokens) : len(tokens) + count]
        return guess if self.right else [token + 1 for token in guess]

    def missing(self, tokens: list[int]) -> int:
        return self.behind


def answered(oracle: Oracle, guesses: DraftModelProposer, known: int, until: int) -> list[tuple[int, int, int]]:
    """Draw the oracle's text up to a length: how long it was before each guess, the guess, and what was right of it."""
    text, tokens, steps = oracle._text, oracle._text[:known], []
    while len(tokens) < until:
        guess = guesses.propose(tokens, 1000)
        right = 0
        while right < len(guess) and guess[right] == text[len(tokens) + right]:
            right += 1
        if guess:
            steps.append((len(tokens), len(guess), right))
        tokens = text[: len(tokens) + right + 1]
        guesses.record_acceptance(len(guess), right, len(tokens))
    return steps


def test_right_guesses_grow_and_wrong_ones_rest() -> None:
    oracle = Oracle(list(range(0, 40_000, 2)))  # nothing to look up
    guesses = DraftModelProposer(oracle)
    lengths = [length for _, length, _ in answered(oracle, guesses, 10, 500)]
    assert lengths == sorted(lengths)
    assert lengths[0] < MAX_DRAFT_TOKENS == lengths[-1]

    oracle.right = False
    wrong = answered(oracle, guesses, 600, 10_000)
    gaps = [after - before for (before, *_), (after, *_) in pairwise(wrong)]
    assert gaps == sorted(gaps)
    assert gaps[0] == 1
    assert gaps[-1] > 1000
    assert sum(length for _, length, _ in wrong) < 300
    assert wrong[-1][1] == 1  # a try

    oracle.right = True
    tries = answered(oracle, guesses, 10_000, 19_000)
    assert sum(right for *_, right in tries) > 1000  # and come back


def test_guesses_follow_from_the_text_alone() -> None:
    order = random.Random(3)
    runs = []
    text = [order.randrange(1000) for _ in range(2000)]
    for _ in range(2):
        oracle = Oracle(text)
        guesses = DraftModelProposer(oracle)
        steps = []
        for start in range(10, 1500, 100):
            oracle.right = start % 300 < 200
            steps += answered(oracle, guesses, start, start + 100)
        runs.append(steps)
    assert runs[0] == runs[1]


def test_what_stands_in_the_text_comes_first() -> None:
    text = [*range(1, 40), *range(1, 40)]
    oracle = Oracle(text)
    oracle.right = False
    assert all(right for _, _, right in answered(oracle, DraftModelProposer(oracle), 45, 70))


def test_nothing_is_guessed_at_a_price_above_what_it_gives() -> None:
    oracle = Oracle(list(range(1000)), price=1.07)  # as large as the model itself
    assert answered(oracle, DraftModelProposer(oracle), 10, 900) == []


def test_a_long_prompt_is_not_computed_for_a_short_answer() -> None:
    oracle = Oracle(list(range(1000)))
    oracle.behind = 500
    assert DraftModelProposer(oracle).propose(oracle._text[:500], 10) == []
    assert DraftModelProposer(oracle).propose(oracle._text[:500], 100)


# Texts


@pytest.mark.parametrize("params", WAYS)
def test_a_draft_changes_no_text(
    plain: Model, helped: Model, large: Path, stranger: Path, params: SamplingParams
) -> None:
    misled = Model.load(large, "fp32", provider="cpu", threads=1, draft=stranger)
    for prompt in (PROMPT, "What is the capital of France?", list(range(3, 300, 7))):
        wanted = plain.generate(prompt, params).result()
        alike, other = (model.generate(prompt, params).result() for model in (helped, misled))
        assert said(alike) == said(other) == said(wanted)
        assert alike.timings.accepted_tokens > wanted.timings.accepted_tokens + 15
        assert other.timings.accepted_tokens <= wanted.timings.accepted_tokens + 3
        assert wanted.timings.draft_tokens < other.timings.draft_tokens < 15
    assert len(wanted.tokens) == 60


def test_a_draft_that_is_right_saves_steps(helped: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    step = helped._session.step
    monkeypatch.setattr(helped._session, "step", lambda *given: steps.append(len(given[0])) or step(*given))
    result = helped.generate(PROMPT, replace(GREEDY, max_tokens=200)).result()
    timings = result.timings
    assert timings.draft_tokens >= timings.accepted_tokens >= 0.8 * timings.draft_tokens
    assert len(steps) - 1 == timings.completion_tokens - timings.accepted_tokens - 1 < 50
    assert max(steps) <= MAX_DRAFT_TOKENS + 1 or steps.index(max(steps)) == 0


def test_the_next_turn_and_one_that_was_cancelled(large: Path, small: Path, plain: Model) -> None:
    model = Model.load(large, "fp32", provider="cpu", threads=1, draft=small)
    messages = [SYSTEM, {"role": "user", "content": "Who jumps?"}]
    for number in range(3):
        given_up = model.chat(messages, DRAWN)
        for _ in range(5):
            next(iter(given_up))
        given_up.cancel()
        assert next(iter(given_up)).finish_reason is FinishReason.CANCELLED
        plain.clear_cache()
        wanted = plain.chat(messages, replace(GREEDY, max_tokens=30)).result()
        result = model.chat(messages, replace(GREEDY, max_tokens=30)).result()
        assert said(result) == said(wanted)
        assert result.timings.cached_tokens > wanted.timings.cached_tokens == 0
        assert result.timings.accepted_tokens >= 5
        messages += [{"role": "assistant", "content": result.text}, {"role": "user", "content": f"And {number}?"}]


def test_a_next_turn_computes_little_again(large: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model.load(large, "fp32", provider="cpu", threads=1, draft=small)
    assert model._draft is not None
    steps = watched(model._draft, monkeypatch)
    question = [SYSTEM, {"role": "user", "content": "Who jumps?"}]
    model.chat(question, GREEDY).result()
    assert steps[0] > 100
    steps.clear()
    model.chat([*question, {"role": "assistant", "content": "I"}, {"role": "user", "content": "?"}], GREEDY).result()
    assert 0 < max(steps) < 50
    model.clear_cache()
    steps.clear()
    model.chat(question, GREEDY).result()
    assert steps[0] > 100
    assert model.run_seconds > model._session.run_seconds


def test_a_draft_of_a_shorter_context_stops_guessing(plain: Model, large: Path, small: Path, folder: Path) -> None:
    short = changed(small, folder / "short", "config.json", str, max_position_embeddings=40)
    model = Model.load(large, "fp32", provider="cpu", threads=1, draft=short)
    assert model.context_length == plain.context_length == 1024
    wanted = plain.generate(PROMPT, GREEDY).result()
    result = model.generate(PROMPT, GREEDY).result()
    assert said(result) == said(wanted)
    assert 5 < result.timings.accepted_tokens - wanted.timings.accepted_tokens <= 40 - result.timings.prompt_tokens
    assert said(model.generate(PROMPT * 10, GREEDY).result()) == said(plain.generate(PROMPT * 10, GREEDY).result())


def test_a_constraint_and_a_draft(plain: Model, helped: Model) -> None:
    for params in WAYS:
        held = replace(params, constraint=Constraint.regex("[a-z ]{30,60}"))
        result = helped.generate(PROMPT, held).result()
        assert said(result) == said(plain.generate(PROMPT, held).result())
        assert 30 <= len(result.text) <= 60


def test_a_draft_may_be_told_to_rest(helped: Model) -> None:
    helped.speculative = False
    try:
        assert helped.generate(PROMPT, GREEDY).result().timings.draft_tokens == 0
    finally:
        helped.speculative = True


def test_a_draft_as_large_as_the_model_is_never_asked(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model.load(small, "fp32", provider="cpu", threads=1, draft=small, draft_precision="fp32")
    assert model._draft is not None
    steps = watched(model._draft, monkeypatch)
    assert len(model.generate(PROMPT, GREEDY).result().tokens) == 60
    assert steps == []


def test_an_engine_for_one_answer_at_a_time(large: Path, small: Path, plain: Model) -> None:
    with Engine.load(large, "fp32", threads=1, draft=small, active=1) as engine:
        answers = [(params, engine.generate(PROMPT, params)) for params in [*WAYS, *WAYS]]
        for params, answer in answers:
            assert said(answer.result()) == said(plain.generate(PROMPT, params).result())
        assert engine.counters().accepted_tokens > 6 * 15


# What is refused


@pytest.mark.parametrize("options", [{}, {"active": 2}, {"active": 1, "step_seconds": 5}])
def test_an_engine_for_many_takes_no_draft(large: Path, small: Path, options: dict[str, Any]) -> None:
    with pytest.raises(ParameterError, match="draft: it needs an engine with active=1 and without step_seconds"):
        Engine.load(large, "fp32", threads=1, draft=small, **options)


def test_another_vocabulary_is_refused(large: Path, small: Path, folder: Path) -> None:
    def swap(text: str) -> str:
        content = json.loads(text)
        ids = content["model"]["vocab"]
        ids["a"], ids["b"] = ids["b"], ids["a"]
        return json.dumps(content)

    other = changed(small, folder / "other", "tokenizer.json", swap)
    with pytest.raises(ParameterError, match=r"other has another vocabulary than .*\(token \d+ is '.', not '.'\)"):
        Model.load(large, draft=other)


def test_a_graph_that_cannot_take_guesses_back_is_refused(folder: Path, large: Path, small: Path) -> None:
    portable = exported(folder / "small-checkpoint", folder / "portable", GraphChoice.PORTABLE)
    for bundle, draft in ((large, portable), (portable, small)):
        with pytest.raises(ParameterError, match=r"draft: .*portable in fp32 cannot rewind its cache: export it with"):
            Model.load(bundle, draft=draft)


def test_a_draft_that_is_none(large: Path, small: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such bundle folder"):
        Model.load(large, draft=tmp_path / "none")
    with pytest.raises(BundleError, match="small: no precision 'int4'"):
        Model.load(large, draft=small, draft_precision="int4")
    with pytest.raises(ParameterError, match="draft_precision is 'fp32' without draft"):
        Model.load(large, draft_precision="fp32")


def test_a_chat_with_a_draft(large: Path, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("llm-chat", large, "--ask", "Who jumps?", "--max-tokens", 20, "--temperature", 0)
    alone = call(cli.main, capsys, *words)
    assert call(cli.main, capsys, *words, "--draft", small) == alone
    assert alone[0] == 0
    code, out, errors = call(cli.main, capsys, *words, "--draft", tmp_path)
    assert (code, out) == (2, "")
    assert "is not an llm-edge bundle" in errors


def test_what_a_draft_gives_is_measured(large: Path, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(measured.main, capsys, "bench.draft", large, small, "--tokens", 4, "--rounds", 1)
    assert code == 0
    ratio = r"\d+\.\d\d x"
    line = rf"(prose|copying), (greedy|drawn): {ratio} without guesses, {ratio} with lookup alone, \d+% of .* came\n"
    assert re.fullmatch(f"({line}){{4}}", out)
    assert call(measured.main, capsys, "bench.draft", large, small, "--precision", "int3")[0] == 2
