"""Draft models: which tokens they propose, when they pause, and that texts do not change."""

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
from llm_edge.runtime.backend.limits import PREFILL_CHUNK
from llm_edge.runtime.backend.session import Session
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


def outcome(result: GenerationResult) -> tuple[Any, ...]:
    return result.text, result.tokens, result.finish_reason


def export_bundle(checkpoint: Path, output: Path, graph: GraphChoice = GraphChoice.FUSED) -> Path:
    export(str(checkpoint), ExportOptions(output, precision="fp32", graph=graph, validate=False))
    return output


def changed_copy(bundle: Path, to: Path, name: str, change: Callable[[str], str], **model: int) -> Path:
    """Copy a bundle, changing one file and some model figures, with a manifest that matches."""
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


def record_steps(draft: DraftModel, patch: pytest.MonkeyPatch) -> list[int]:
    """Record the number of tokens of each of the draft model's steps from now on."""
    steps: list[int] = []
    step = draft._session.step

    def recording_step(tokens: list[int], num_logits: int = 1) -> Any:
        steps.append(len(tokens))
        return step(tokens, num_logits)

    patch.setattr(draft._session, "step", recording_step)
    return steps


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("draft")


@pytest.fixture(scope="module")
def small(folder: Path) -> Path:
    return export_bundle(tiny.save_checkpoint(folder / "small-checkpoint", **LIVELY), folder / "small")


@pytest.fixture(scope="module")
def large(folder: Path, small: Path) -> Path:
    """A six-layer model that computes the same as `small`: four of its layers add nothing."""
    checkpoint = tiny.save_checkpoint(folder / "large-checkpoint", num_hidden_layers=6, **LIVELY)
    weights = load_file(checkpoint / "model.safetensors") | load_file(folder / "small-checkpoint/model.safetensors")
    for name, weight in weights.items():
        if any(f"layers.{layer}." in name for layer in range(2, 6)) and ("o_proj" in name or "down_proj" in name):
            weight.zero_()
    save_file(weights, checkpoint / "model.safetensors", metadata={"format": "pt"})
    return export_bundle(checkpoint, folder / "large")


@pytest.fixture(scope="module")
def unrelated(folder: Path) -> Path:
    """A model of the size of `small` with other weights."""
    return export_bundle(tiny.save_checkpoint(folder / "unrelated-checkpoint", seed=5, **LIVELY), folder / "unrelated")


@pytest.fixture(scope="module")
def plain(large: Path) -> Model:
    """The large model without a draft model."""
    return Model.load(large, "fp32", provider="cpu", threads=1)


@pytest.fixture(scope="module")
def drafted(large: Path, small: Path) -> Model:
    return Model.load(large, "fp32", provider="cpu", threads=1, draft=small)


# Which draft tokens are proposed


@pytest.fixture
def draft(small: Path) -> DraftModel:
    return DraftModel(session_of(small), 320, 0.4)


@pytest.fixture(scope="module")
def small_greedy(small: Path) -> Callable[[list[int], int], list[int]]:
    """Greedy continuations of the small model alone."""
    model = Model.load(small, "fp32", provider="cpu", threads=1)
    model.speculative = False
    banned = replace(GREEDY, banned_tokens=tuple(range(320, 331)))

    def answer(tokens: list[int], count: int) -> list[int]:
        found: list[int] = []
        while len(found) < count:  # an end token does not end the loop
            params = replace(banned, max_tokens=count - len(found))
            found += model.generate([*tokens, *found], params).result().tokens
        return found

    return answer


def test_draft_tokens_are_the_draft_models_greedy_continuation(
    draft: DraftModel, small_greedy: Callable[[list[int], int], list[int]]
) -> None:
    order = random.Random(0)
    text = [order.randrange(320) for _ in range(30)]
    for _ in range(25):
        draft_tokens = draft.propose(text, count := order.randrange(1, 9))
        assert draft_tokens == small_greedy(text, count)
        right = order.randrange(count + 1)
        text = [*text, *draft_tokens[:right], order.randrange(320)]  # sometimes equal to the next draft token
        if order.random() < 0.3:
            text = text[: order.randrange(2, len(text))]
            draft.start(text)


def test_a_long_text_is_prefilled_in_chunks(
    draft: DraftModel, small_greedy: Callable[[list[int], int], list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    order = random.Random(1)
    text = [order.randrange(320) for _ in range(3 * PREFILL_CHUNK)]
    steps = record_steps(draft, monkeypatch)
    empty = 0
    while not (draft_tokens := draft.propose(text, 4)):
        empty += 1
        assert len(steps) == empty
    assert (empty, draft_tokens) == (2, small_greedy(text, 4))
    assert steps == [PREFILL_CHUNK, PREFILL_CHUNK, PREFILL_CHUNK, 1, 1, 1]


def test_a_shared_prefix_is_not_computed_again(draft: DraftModel, monkeypatch: pytest.MonkeyPatch) -> None:
    order = random.Random(2)
    text = [order.randrange(320) for _ in range(100)]
    draft.propose(text, 4)
    steps = record_steps(draft, monkeypatch)
    draft.start(text)  # the last two tokens are always computed, and chunks start at multiples of 8
    draft.propose(text, 1)
    assert steps == [4]
    draft.start([*text[:50], 0, 0, 0])
    draft.propose([*text[:50], 0, 0, 0], 1)
    assert steps == [4, 5]
    draft.clear_cache()
    draft.propose(text, 1)
    assert steps == [4, 5, 100]


def test_tokens_outside_the_draft_vocabulary_are_accepted_as_input(draft: DraftModel) -> None:
    draft_tokens = draft.propose([5, 6, 331, 100_000, 7], 5)
    assert len(draft_tokens) == 5
    assert all(0 <= token < 320 for token in draft_tokens)


def test_draft_tokens_stay_within_the_draft_models_context(draft: DraftModel) -> None:
    limit = draft._session.limit
    text = [3, 4] * (limit // 2)
    for _ in range(limit // PREFILL_CHUNK):
        draft.propose(text[: limit - 2], 1)
    assert [len(draft.propose(text[:length], 5)) for length in (limit - 2, limit - 1, limit)] == [3, 2, 1]
    assert draft.propose([*text, 3], 5) == []


# How many draft tokens are proposed


@pytest.mark.parametrize("cost_ratio", [0.05, 0.3, 0.6, 0.95, 1.0, 2.0])
def test_optimal_draft_length_maximizes_the_speedup(cost_ratio: float) -> None:
    lengths = []
    for percent in range(100):
        acceptance_rate = percent / 100

        def speed(count: int, acceptance_rate: float = acceptance_rate) -> float:
            return sum(acceptance_rate**index for index in range(count + 1)) / (1 + count * cost_ratio)

        lengths.append(optimal_draft_length(acceptance_rate, cost_ratio, 12))
        assert speed(lengths[-1]) == pytest.approx(max(speed(count) for count in range(13)))
        assert (lengths[-1] > 0) == (acceptance_rate > cost_ratio)
    assert lengths == sorted(lengths)


class Oracle(DraftModel):
    """A fake draft model that proposes the given text, or tokens that are all wrong."""

    def __init__(self, text: list[int], cost_ratio: float = 0.4) -> None:
        self.cost_ratio = cost_ratio
        self.right = True
        self.missing_tokens = 0
        self._text = text

    def start(self, tokens: Any) -> None:
        pass

    def propose(self, tokens: list[int], count: int) -> list[int]:
        draft_tokens = self._text[len(tokens) : len(tokens) + count]
        return draft_tokens if self.right else [token + 1 for token in draft_tokens]

    def missing(self, tokens: list[int]) -> int:
        return self.missing_tokens


def simulate(oracle: Oracle, proposer: DraftModelProposer, known: int, until: int) -> list[tuple[int, int, int]]:
    """Generate the oracle's text up to `until`; return (text length, draft tokens, accepted tokens) of each step."""
    text, tokens, steps = oracle._text, oracle._text[:known], []
    while len(tokens) < until:
        draft_tokens = proposer.propose(tokens, 1000)
        right = 0
        while right < len(draft_tokens) and draft_tokens[right] == text[len(tokens) + right]:
            right += 1
        if draft_tokens:
            steps.append((len(tokens), len(draft_tokens), right))
        tokens = text[: len(tokens) + right + 1]
        proposer.record_acceptance(len(draft_tokens), right, len(tokens))
    return steps


def test_draft_length_grows_on_acceptance_and_drafting_pauses_on_rejection() -> None:
    oracle = Oracle(list(range(0, 40_000, 2)))  # no repetitions, so prompt lookup finds nothing
    proposer = DraftModelProposer(oracle)
    lengths = [length for _, length, _ in simulate(oracle, proposer, 10, 500)]
    assert lengths == sorted(lengths)
    assert lengths[0] < MAX_DRAFT_TOKENS == lengths[-1]

    oracle.right = False
    wrong = simulate(oracle, proposer, 600, 10_000)
    gaps = [after - before for (before, *_), (after, *_) in pairwise(wrong)]
    assert gaps == sorted(gaps)
    assert gaps[0] == 1
    assert gaps[-1] > 1000
    assert sum(length for _, length, _ in wrong) < 300
    assert wrong[-1][1] == 1  # a trial

    oracle.right = True
    tries = simulate(oracle, proposer, 10_000, 19_000)
    assert sum(right for *_, right in tries) > 1000  # drafting resumes


def test_draft_tokens_depend_only_on_the_text() -> None:
    order = random.Random(3)
    runs = []
    text = [order.randrange(1000) for _ in range(2000)]
    for _ in range(2):
        oracle = Oracle(text)
        proposer = DraftModelProposer(oracle)
        steps = []
        for start in range(10, 1500, 100):
            oracle.right = start % 300 < 200
            steps += simulate(oracle, proposer, start, start + 100)
        runs.append(steps)
    assert runs[0] == runs[1]


def test_prompt_lookup_takes_precedence_over_the_draft_model() -> None:
    text = [*range(1, 40), *range(1, 40)]
    oracle = Oracle(text)
    oracle.right = False
    assert all(right for _, _, right in simulate(oracle, DraftModelProposer(oracle), 45, 70))


def test_nothing_is_proposed_if_the_draft_model_costs_too_much() -> None:
    oracle = Oracle(list(range(1000)), cost_ratio=1.07)  # as large as the model itself
    assert simulate(oracle, DraftModelProposer(oracle), 10, 900) == []


def test_a_long_prompt_is_not_computed_for_a_short_answer() -> None:
    oracle = Oracle(list(range(1000)))
    oracle.missing_tokens = 500
    assert DraftModelProposer(oracle).propose(oracle._text[:500], 10) == []
    assert DraftModelProposer(oracle).propose(oracle._text[:500], 100)


# Texts


@pytest.mark.parametrize("params", WAYS)
def test_a_draft_model_does_not_change_texts(
    plain: Model, drafted: Model, large: Path, unrelated: Path, params: SamplingParams
) -> None:
    with_unrelated = Model.load(large, "fp32", provider="cpu", threads=1, draft=unrelated)
    for prompt in (PROMPT, "What is the capital of France?", list(range(3, 300, 7))):
        wanted = plain.generate(prompt, params).result()
        alike, other = (model.generate(prompt, params).result() for model in (drafted, with_unrelated))
        assert outcome(alike) == outcome(other) == outcome(wanted)
        assert alike.timings.accepted_tokens > wanted.timings.accepted_tokens + 15
        assert other.timings.accepted_tokens <= wanted.timings.accepted_tokens + 3
        assert wanted.timings.draft_tokens < other.timings.draft_tokens < 15
    assert len(wanted.tokens) == 60


def test_accepted_draft_tokens_save_steps(drafted: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    steps = []
    step = drafted._session.step
    monkeypatch.setattr(drafted._session, "step", lambda *given: steps.append(len(given[0])) or step(*given))
    result = drafted.generate(PROMPT, replace(GREEDY, max_tokens=200)).result()
    timings = result.timings
    assert timings.draft_tokens >= timings.accepted_tokens >= 0.8 * timings.draft_tokens
    assert len(steps) - 1 == timings.completion_tokens - timings.accepted_tokens - 1 < 50
    assert max(steps) <= MAX_DRAFT_TOKENS + 1 or steps.index(max(steps)) == 0


def test_the_turn_after_a_cancelled_one_is_unchanged(large: Path, small: Path, plain: Model) -> None:
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
        assert outcome(result) == outcome(wanted)
        assert result.timings.cached_tokens > wanted.timings.cached_tokens == 0
        assert result.timings.accepted_tokens >= 5
        messages += [{"role": "assistant", "content": result.text}, {"role": "user", "content": f"And {number}?"}]


def test_the_next_turn_reuses_the_draft_cache(large: Path, small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model.load(large, "fp32", provider="cpu", threads=1, draft=small)
    assert model._draft is not None
    steps = record_steps(model._draft, monkeypatch)
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


def test_a_draft_model_with_a_shorter_context_stops_proposing(
    plain: Model, large: Path, small: Path, folder: Path
) -> None:
    short = changed_copy(small, folder / "short", "config.json", str, max_position_embeddings=40)
    model = Model.load(large, "fp32", provider="cpu", threads=1, draft=short)
    assert model.context_length == plain.context_length == 1024
    wanted = plain.generate(PROMPT, GREEDY).result()
    result = model.generate(PROMPT, GREEDY).result()
    assert outcome(result) == outcome(wanted)
    assert 5 < result.timings.accepted_tokens - wanted.timings.accepted_tokens <= 40 - result.timings.prompt_tokens
    assert outcome(model.generate(PROMPT * 10, GREEDY).result()) == outcome(
        plain.generate(PROMPT * 10, GREEDY).result()
    )


def test_constraints_work_with_a_draft_model(plain: Model, drafted: Model) -> None:
    for params in WAYS:
        held = replace(params, constraint=Constraint.regex("[a-z ]{30,60}"))
        result = drafted.generate(PROMPT, held).result()
        assert outcome(result) == outcome(plain.generate(PROMPT, held).result())
        assert 30 <= len(result.text) <= 60


def test_drafting_can_be_switched_off(drafted: Model) -> None:
    drafted.speculative = False
    try:
        assert drafted.generate(PROMPT, GREEDY).result().timings.draft_tokens == 0
    finally:
        drafted.speculative = True


def test_a_draft_model_as_large_as_the_model_is_never_used(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model.load(small, "fp32", provider="cpu", threads=1, draft=small, draft_precision="fp32")
    assert model._draft is not None
    steps = record_steps(model._draft, monkeypatch)
    assert len(model.generate(PROMPT, GREEDY).result().tokens) == 60
    assert steps == []


def test_an_engine_with_one_active_sequence_accepts_a_draft_model(large: Path, small: Path, plain: Model) -> None:
    with Engine.load(large, "fp32", threads=1, draft=small, active=1) as engine:
        answers = [(params, engine.generate(PROMPT, params)) for params in [*WAYS, *WAYS]]
        for params, answer in answers:
            assert outcome(answer.result()) == outcome(plain.generate(PROMPT, params).result())
        assert engine.counters().accepted_tokens > 6 * 15


# Rejected draft models


@pytest.mark.parametrize("options", [{}, {"active": 2}])
def test_an_engine_with_several_active_sequences_rejects_a_draft_model(
    large: Path, small: Path, options: dict[str, Any]
) -> None:
    with pytest.raises(ParameterError, match="draft: it needs an engine with active=1, or a Model"):
        Engine.load(large, "fp32", threads=1, draft=small, **options)


def test_a_draft_model_with_another_vocabulary_is_rejected(large: Path, small: Path, folder: Path) -> None:
    def swap(text: str) -> str:
        content = json.loads(text)
        ids = content["model"]["vocab"]
        ids["a"], ids["b"] = ids["b"], ids["a"]
        return json.dumps(content)

    other = changed_copy(small, folder / "other", "tokenizer.json", swap)
    with pytest.raises(ParameterError, match=r"other has another vocabulary than .*\(token \d+ is '.', not '.'\)"):
        Model.load(large, draft=other)


def test_a_graph_that_cannot_discard_draft_tokens_is_rejected(folder: Path, large: Path, small: Path) -> None:
    portable = export_bundle(folder / "small-checkpoint", folder / "portable", GraphChoice.PORTABLE)
    for bundle, draft in ((large, portable), (portable, small)):
        with pytest.raises(ParameterError, match=r"draft: .*portable in fp32 cannot rewind its cache: export it with"):
            Model.load(bundle, draft=draft)


def test_a_path_that_is_not_a_bundle_is_rejected(large: Path, small: Path, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no such bundle folder"):
        Model.load(large, draft=tmp_path / "none")
    with pytest.raises(BundleError, match="small: no precision 'int4'"):
        Model.load(large, draft=small, draft_precision="int4")
    with pytest.raises(ParameterError, match="draft_precision is 'fp32' without draft"):
        Model.load(large, draft_precision="fp32")


def test_the_chat_accepts_a_draft_model(
    large: Path, small: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("llm-chat", large, "--ask", "Who jumps?", "--max-tokens", 20, "--temperature", 0)
    alone = call(cli.main, capsys, *words)
    assert call(cli.main, capsys, *words, "--draft", small) == alone
    assert alone[0] == 0
    code, out, errors = call(cli.main, capsys, *words, "--draft", tmp_path)
    assert (code, out) == (2, "")
    assert "is not an llm-edge bundle" in errors


def test_the_benchmark_measures_a_draft_model(large: Path, small: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = call(measured.main, capsys, "bench.draft", large, small, "--tokens", 4, "--rounds", 1)
    assert code == 0
    ratio = r"\d+\.\d\d x"
    line = (
        rf"(prose|copying), (greedy|drawn): {ratio} without speculation, {ratio} with prompt lookup alone, "
        r"\d+% of the draft tokens accepted\n"
    )
    assert re.fullmatch(f"({line}){{4}}", out)
    assert call(measured.main, capsys, "bench.draft", large, small, "--precision", "int3")[0] == 2
