"""Models with states: reusing prefixes, drafting and batching do not change answers, though states cannot be cut."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from llm_edge.runtime import FinishReason, GenerationResult, Model, SamplingParams
from llm_edge.runtime.bundle import MANIFEST
from llm_edge.runtime.engine import Engine
from llm_edge.runtime.errors import BundleError, InputError, ParameterError
from llm_edge.runtime.scheduling.batch import Batch
from llm_edge.runtime.scheduling.prefixes import CHUNK_ALIGNMENT, aligned_prefix, common_prefix
from llm_edge.runtime.speculative import draft_model

# The penalty adds variety, as in the engine's tests; log-probabilities reveal what the texts may hide.
GREEDY = SamplingParams(temperature=0, repetition_penalty=10, repetition_window=-1, max_tokens=24, logprobs=0)
LONG = replace(GREEDY, max_tokens=400)
SYSTEM = "The quick brown fox jumps over the lazy dog. " * 5
PROMPTS = (
    "The quick brown fox",
    "What is the capital of France?",
    "Äpfel, señor, 你好",
    SYSTEM + "0123456789",
    SYSTEM + "a user asked an assistant",
    "lazy dog. " * 12,
    SYSTEM + SYSTEM,
    "🙂 and — dashes",
)


@pytest.fixture(scope="module")
def model(state_bundle: Path) -> Model:
    return Model.load(state_bundle, provider="cpu", threads=1)


@pytest.fixture
def load(state_bundle: Path) -> Iterator[Callable[..., Engine]]:
    """Loads engines, which are closed after the test."""
    loaded: list[Engine] = []

    def load_engine(**options: Any) -> Engine:
        loaded.append(Engine.load(state_bundle, threads=1, **options))
        return loaded[-1]

    yield load_engine
    for engine in loaded:
        engine.close()


def outcome(result: GenerationResult, bundle: Path) -> tuple[Any, ...]:
    """What must be equal; the matrix products of experts round by the number of tokens that they are for."""
    exact = "moe" not in bundle.name
    return result.text, result.tokens, result.finish_reason, result.logprobs if exact else None


def alone(model: Model, prompt: str | Sequence[int], params: SamplingParams = GREEDY) -> GenerationResult:
    """An answer that nothing cached or drafted contributes to."""
    model.clear_cache()
    model.speculative = False
    result = model.generate(prompt, params).result()
    assert result.timings.cached_tokens == 0
    model.clear_cache()
    return result


def ids(model: Model, text: str) -> list[int]:
    return model.encode_prompt(text)


class Proposer:
    """Proposes the tokens that a model generates without drafts, with a wrong one among them now and then."""

    def __init__(self, whole: Sequence[int]) -> None:
        self._whole = whole
        self._calls = 0

    def propose(self, tokens: list[int], limit: int) -> list[int]:
        self._calls += 1
        draft = [*self._whole[len(tokens) : len(tokens) + min(limit, 4)]]
        wrong = self._calls % 7
        return [331 - 1 - token if place == wrong else token for place, token in enumerate(draft)]

    def record_acceptance(self, proposed: int, accepted: int, total: int) -> None:
        pass


# One conversation


def test_a_second_turn_continues_from_the_first_one(model: Model) -> None:
    question = {"role": "user", "content": SYSTEM + "What is the capital of France?"}
    first = model.chat([question], GREEDY).result()
    turns = [question, {"role": "assistant", "content": first.text}, {"role": "user", "content": "And of Spain?"}]
    second = model.chat(turns, GREEDY).result()
    assert second.timings.cached_tokens >= aligned_prefix(first.timings.prompt_tokens, first.timings.prompt_tokens)
    assert second.tokens == alone(model, model.encode_chat(turns)).tokens


def test_what_was_generated_is_not_computed_again(model: Model) -> None:
    prompt = ids(model, SYSTEM)
    first = model.generate(prompt, GREEDY).result()
    turn = [*prompt, *first.tokens, *ids(model, "And the lazy dog?")]
    second = model.generate(turn, GREEDY).result()
    assert second.timings.cached_tokens == len(prompt) + len(first.tokens) - 1
    assert second.tokens == alone(model, turn).tokens


def test_a_repeated_prompt_gives_the_same_answer_from_the_cache(model: Model, state_bundle: Path) -> None:
    wanted = outcome(alone(model, SYSTEM), state_bundle)
    for cached in (0, aligned_prefix(1000, len(ids(model, SYSTEM)))):
        result = model.generate(SYSTEM, GREEDY).result()
        assert outcome(result, state_bundle) == wanted
        assert result.timings.cached_tokens == cached


def test_prompts_that_share_a_beginning_reuse_it_from_the_third_one_on(model: Model, state_bundle: Path) -> None:
    prompts = [ids(model, SYSTEM + end) for end in ("0123456789", "What is the capital?", "señor", "lazy dog")]
    wanted = [outcome(alone(model, prompt), state_bundle) for prompt in prompts]
    shared = min(common_prefix(*pair) for pair in itertools.combinations(prompts, 2))
    results = [model.generate(prompt, GREEDY).result() for prompt in prompts]
    assert [outcome(result, state_bundle) for result in results] == wanted
    at_most = shared // CHUNK_ALIGNMENT * CHUNK_ALIGNMENT
    cached = [result.timings.cached_tokens for result in results]
    assert cached[:2] == [0, 0]
    assert all(at_most <= each <= at_most + 2 * CHUNK_ALIGNMENT for each in cached[2:])


def test_a_cancelled_answer_can_be_continued(model: Model) -> None:
    wanted, other = alone(model, SYSTEM), replace(GREEDY, temperature=0.5, seed=3)
    prompt = [*ids(model, SYSTEM), *wanted.tokens[:9]]
    continued = alone(model, prompt, other).tokens
    generation = model.generate(SYSTEM, GREEDY)
    tokens = [chunk.token for chunk in itertools.islice(generation, 9)]
    generation.cancel()
    assert generation.result().finish_reason is FinishReason.CANCELLED
    assert tokens == list(wanted.tokens[:9])
    for _ in range(2):  # from the states where it was cancelled, then from those of its prompt
        result = model.generate(prompt, other).result()
        assert result.timings.cached_tokens > 0
        assert result.tokens == continued


def test_draft_tokens_do_not_change_answers(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    for prompt in PROMPTS:
        wanted = alone(model, prompt, replace(GREEDY, max_tokens=60))
        whole = [*ids(model, prompt), *wanted.tokens]
        with monkeypatch.context() as patch:
            patch.setattr(draft_model, "proposer_for", lambda _, whole=whole: Proposer(whole))
            model.speculative = True
            found = model.generate(prompt, replace(GREEDY, max_tokens=60)).result()
        assert found.tokens == wanted.tokens
        assert 0 < found.timings.accepted_tokens < found.timings.draft_tokens
        turn = [*whole, *ids(model, "And?")]
        again = model.generate(turn, GREEDY).result()  # rejected tokens are not part of what is cached
        assert again.timings.cached_tokens > 0
        assert again.tokens == alone(model, turn).tokens


def test_scores_and_clearing_start_from_empty_states(model: Model) -> None:
    first = model.score(SYSTEM)
    model.generate(PROMPTS[1], GREEDY).result()
    assert model.score(SYSTEM) == first
    assert model.generate(SYSTEM, GREEDY).result().timings.cached_tokens == 0  # scoring cleared the cache
    model.clear_cache()
    assert model.generate(SYSTEM, GREEDY).result().timings.cached_tokens == 0


def test_the_context_can_be_filled(model: Model) -> None:
    order, params = random.Random(1), replace(GREEDY, max_tokens=100, banned_tokens=(2,))
    prompt = [order.randrange(3, 300) for _ in range(1024 - 12)]
    wanted = alone(model, prompt, params)
    assert (len(wanted.tokens), wanted.finish_reason) == (12, FinishReason.LENGTH)
    model.generate(prompt[:-1], GREEDY).result()
    assert model.generate(prompt, params).result().tokens == wanted.tokens


# Many callers


@pytest.mark.parametrize("speculative", [False, True])
def test_every_caller_gets_the_answer_of_a_model(
    model: Model, load: Callable[..., Engine], state_bundle: Path, speculative: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    results = [alone(model, prompt) for prompt in PROMPTS]
    if speculative:
        by_prompt = {tuple(ids(model, p)): [*ids(model, p), *r.tokens] for p, r in zip(PROMPTS, results, strict=True)}

        class ByPrompt(Proposer):
            def __init__(self) -> None:
                super().__init__([])

            def propose(self, tokens: list[int], limit: int) -> list[int]:
                if not self._whole:
                    matches = [each for prompt, each in by_prompt.items() if tuple(tokens[: len(prompt)]) == prompt]
                    self._whole = max(matches, key=lambda each: common_prefix(each, tokens))
                return super().propose(tokens, limit)

        monkeypatch.setattr(draft_model, "proposer_for", lambda _: ByPrompt())
    engine = load(speculative=speculative)
    for _ in range(3):
        answers = [engine.generate(prompt, GREEDY) for prompt in PROMPTS]
        found = [answer.result() for answer in answers]
        if speculative:
            assert [result.tokens for result in found] == [result.tokens for result in results]
            assert sum(result.timings.accepted_tokens for result in found) > 0
            continue
        wanted = [outcome(result, state_bundle) for result in results]
        assert [outcome(result, state_bundle) for result in found] == wanted
    counters = engine.counters()
    assert counters.failed == 0
    assert counters.cached_tokens > counters.prompt_tokens / 2
    assert counters.draft_tokens > counters.accepted_tokens > 0 if speculative else counters.draft_tokens == 0


def test_callers_that_start_together_compute_what_they_share_once(
    model: Model, load: Callable[..., Engine], state_bundle: Path
) -> None:
    prompts = [SYSTEM + end for end in ("0123", "Paris", "señor", "fox")]
    wanted = [outcome(alone(model, prompt), state_bundle) for prompt in prompts]
    engine = load()
    results = [answer.result() for answer in [engine.generate(prompt, GREEDY) for prompt in prompts]]
    assert [outcome(result, state_bundle) for result in results] == wanted
    assert [result.timings.cached_tokens > 0 for result in results] == [False, True, True, True]
    together = [answer.result() for answer in engine.generate_many(SYSTEM * 2, GREEDY, 4)]
    assert {result.tokens for result in together} == {alone(model, SYSTEM * 2).tokens}
    assert sum(result.timings.cached_tokens for result in together) > 3 * len(ids(model, SYSTEM))


def test_random_traffic_does_not_change_answers(model: Model, load: Callable[..., Engine], state_bundle: Path) -> None:
    """Conversations of several turns in few slots, some of which are cancelled; slots are copied, moved and evicted."""
    order = random.Random(2)
    engine = load(active=3, kept=2, cache_bytes=200_000)
    openings = [[order.randrange(3, 300) for _ in range(order.randrange(2, 150))] for _ in range(4)]
    asked = [
        [*order.choice(openings), *(order.randrange(3, 300) for _ in range(order.randrange(1, 40)))] for _ in range(12)
    ]
    wanted = [alone(model, prompt) for prompt in asked]

    def converse(number: int) -> tuple[bool, bool]:
        chosen = random.Random(number)
        place = chosen.randrange(len(asked))
        if chosen.random() < 0.3:
            generation = engine.generate(asked[place], LONG)
            next(iter(generation))
            generation.cancel()
            generation.result()
        first = engine.generate(asked[place], GREEDY).result()
        turn = [*asked[place], *first.tokens, 5, 6, 7, number + 10]
        second = engine.generate(turn, GREEDY).result()
        return outcome(first, state_bundle)[:3] == outcome(wanted[place], state_bundle)[:3], second.tokens == turns[
            (place, number)
        ]

    turns = {}
    for number in range(24):
        place = random.Random(number).randrange(len(asked))
        turns[(place, number)] = alone(model, [*asked[place], *wanted[place].tokens, 5, 6, 7, number + 10]).tokens
    found: list[tuple[bool, bool]] = []
    lock = threading.Lock()

    def run(numbers: Sequence[int]) -> None:
        for number in numbers:
            result = converse(number)
            with lock:
                found.append(result)

    threads = [threading.Thread(target=run, args=(range(start, 24, 4),)) for start in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [(True, True)] * 24
    counters = engine.counters()
    assert counters.failed == 0
    assert counters.evictions > 0
    assert counters.cached_tokens > 0


def test_cancelling_one_caller_leaves_the_others(model: Model, load: Callable[..., Engine], state_bundle: Path) -> None:
    wanted = [outcome(alone(model, prompt), state_bundle) for prompt in PROMPTS]
    engine = load()
    cancelled = engine.generate(SYSTEM, LONG)
    chunks = iter(cancelled)
    first = [next(chunks).token for _ in range(5)]
    answers = [engine.generate(prompt, GREEDY) for prompt in PROMPTS[:7]]
    next(iter(engine.generate(PROMPTS[7], LONG)))
    cancelled.cancel()
    assert [outcome(answer.result(), state_bundle) for answer in answers] == wanted[:7]
    assert cancelled.result().finish_reason is FinishReason.CANCELLED
    again = engine.generate(SYSTEM, GREEDY).result()
    assert again.timings.cached_tokens > 0
    assert list(again.tokens[:5]) == first


def test_the_next_turn_of_a_conversation_continues_in_its_slot(model: Model, load: Callable[..., Engine]) -> None:
    engine, prompt = load(), ids(model, SYSTEM)
    for _ in range(3):
        result = engine.generate(prompt, GREEDY).result()
        assert result.tokens == alone(model, prompt).tokens
        cached = len(prompt) + len(result.tokens) - 1
        prompt = [*prompt, *result.tokens, *ids(model, " And?")]
        source, length = engine._slots.longest_prefix(prompt)
        assert length == cached == engine._batch.lengths[source]
    assert engine.counters().evictions == 0


def test_a_saved_cache_continues_in_another_engine(
    model: Model, load: Callable[..., Engine], state_bundle: Path, tmp_path: Path
) -> None:
    path, prompt = tmp_path / "cache.npz", ids(model, SYSTEM)
    first = load()
    first.generate(SYSTEM, GREEDY).result()
    saved = first.save_cache(path, prompt)
    assert saved == aligned_prefix(len(prompt), len(prompt))
    second = load()
    assert second.load_cache(path) == saved
    for text in (SYSTEM, SYSTEM + "0123", SYSTEM):
        result = second.generate(text, GREEDY).result()
        assert result.timings.cached_tokens >= saved
        assert outcome(result, state_bundle) == outcome(alone(model, text), state_bundle)
    damaged = path.with_name("damaged.npz")
    damaged.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(InputError, match=r"damaged\.npz: "):
        second.load_cache(damaged)
    with np.load(path) as file:
        arrays = dict(file)
    place = next(index for index, each in enumerate(model.bundle.shape.caches) if not each.grows)
    np.savez(damaged, **{**arrays, str(place): arrays[str(place)][..., :-1]})
    with pytest.raises(InputError, match=r"damaged\.npz: not a cache of this model, or damaged: create it again$"):
        second.load_cache(damaged)


def test_the_memory_of_idle_slots_stays_within_the_budget(model: Model, load: Callable[..., Engine]) -> None:
    shape = model.bundle.shape
    per_sequence = 4 * shape.state_numbers
    budget = 6 * per_sequence + 4 * 400 * shape.token_numbers
    engine = load(active=2, kept=14, cache_bytes=budget)
    for number in range(12):
        prompt = ids(model, f"{number} " + SYSTEM)
        engine.generate(prompt, GREEDY).result()
        counters = engine.counters()
        assert counters.kept_bytes <= budget
        states = counters.kept_bytes - 4 * counters.kept_tokens * shape.token_numbers
        assert states > 0
        assert states % per_sequence == 0
    assert counters.evictions > 0


# Bundles


def edited(bundle: Path, folder: Path, change: Callable[[dict[str, Any]], object]) -> Path:
    shutil.copytree(bundle, folder)
    manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    change(manifest)
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    return folder


def fixed(manifest: dict[str, Any]) -> dict[str, Any]:
    """The description of a state."""
    return next(entry for entry in manifest["model"]["caches"] if not entry["grows"])  # type: ignore[no-any-return]


CHANGES: dict[str, Callable[[dict[str, Any]], object]] = {
    "one too few": lambda manifest: manifest["model"]["caches"].pop(),
    "one too many": lambda manifest: manifest["model"]["caches"].append(
        {"name": "9.state.0", "shape": [2], "grows": False}
    ),
    "none": lambda manifest: manifest["model"]["caches"].clear(),
    "twice": lambda manifest: manifest["model"]["caches"].append(fixed(manifest)),
    "another name": lambda manifest: fixed(manifest).update(name="0.state.7"),
    "no name": lambda manifest: fixed(manifest).update(name="../0"),
    "another shape": lambda manifest: fixed(manifest)["shape"].append(2),
    "another size": lambda manifest: fixed(manifest)["shape"].__setitem__(0, 3),
    "no size": lambda manifest: fixed(manifest)["shape"].__setitem__(0, 0),
    "a size that is text": lambda manifest: fixed(manifest)["shape"].__setitem__(0, "8"),
    "a state of 8 GB": lambda manifest: fixed(manifest).update(shape=[1 << 20, 1 << 20, 1 << 20]),
    "growing": lambda manifest: fixed(manifest).update(grows=True),
    "not growing": lambda manifest: next(e for e in manifest["model"]["caches"] if e["grows"]).update(grows=False),
    "not fused": lambda manifest: manifest["precisions"]["fp32"].update(share_buffer=False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_manifest_that_contradicts_the_graph_is_rejected(state_bundle: Path, tmp_path: Path, change: str) -> None:
    bundle = edited(state_bundle, tmp_path / "bundle", CHANGES[change])
    for load in (Model.load, Engine.load):
        with pytest.raises(BundleError) as caught:
            load(bundle, threads=1)
        message = str(caught.value)
        assert str(bundle) in message or message.startswith(MANIFEST)
        assert "\n" not in message
        assert len(message) < 300 + len(str(bundle))


def test_a_model_with_states_cannot_draft(state_bundle: Path) -> None:
    with pytest.raises(
        ParameterError, match=r"^draft: .* keeps states, which cannot be rewound .*: use another model$"
    ):
        Model.load(state_bundle, threads=1, draft=state_bundle)


def test_another_model_can_draft_for_one_with_states(
    model: Model, state_bundle: Path, tiny_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(draft_model, "_step_cost", lambda bundle, _: 1 if bundle.path == tiny_bundle else 100)
    drafted = Model.load(state_bundle, threads=1, draft=tiny_bundle, draft_precision="fp32")
    copying = SamplingParams(temperature=0, max_tokens=40)
    for prompt in PROMPTS[:4]:
        result = drafted.generate(prompt, copying).result()
        assert result.tokens == alone(model, prompt, copying).tokens
        assert result.timings.draft_tokens > 0


def test_steps_over_the_slots_of_a_batch_are_not_repeated(load: Callable[..., Engine]) -> None:
    """States are copied between buffers when sequences begin and end, not in every step."""
    engine, copies = load(), []
    rows = {type(each) for side in engine._batch._states._sides for each in side.states}  # type: ignore[union-attr]
    (kind,) = rows
    whole = kind.copy_from
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(kind, "copy_from", lambda self, other: (copies.append(1), whole(self, other)))
        params = replace(GREEDY, max_tokens=100, logprobs=None, banned_tokens=(2,))
        answers = [engine.generate(prompt, params) for prompt in PROMPTS]
        assert all(len(answer.result().tokens) == 100 for answer in answers)
    assert isinstance(engine._batch, Batch)
    assert len(copies) < 6 * len(PROMPTS)
