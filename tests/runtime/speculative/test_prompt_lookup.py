"""Prompt lookup: which draft tokens are proposed, and that texts and their probabilities do not change."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sessions import open_file

from llm_edge.runtime import Bundle, GenerationResult, Model, SamplingParams
from llm_edge.runtime.engine import Engine
from llm_edge.runtime.speculative.prompt_lookup import MAX_DRAFT_TOKENS, PromptLookup

DRAWN = SamplingParams(temperature=1.0, max_tokens=30, seed=1)
COUNTED = list(range(1, 40))
PASSAGE = (
    "def area(width, height):\n    if width < 0 or height < 0:\n        raise ValueError('a side is negative')\n"
    "    return width * height\n\n\ndef volume(width, height, depth):\n    return area(width, height) * depth\n"
)


def outcome(result: GenerationResult) -> tuple[Any, ...]:
    return result.text, result.tokens, result.finish_reason


def simulate(text: Sequence[int], known: int, lookup: PromptLookup) -> list[tuple[int, int]]:
    """Generate `text[known:]` speculatively; return the number of draft and of accepted tokens of each step."""
    tokens, steps = list(text[:known]), []
    while len(tokens) < len(text):
        draft = lookup.propose(tokens, len(text) - len(tokens))
        right = 0
        while right < min(len(draft), len(text) - len(tokens) - 1) and draft[right] == text[len(tokens) + right]:
            right += 1
        tokens = list(text[: len(tokens) + right + 1])
        lookup.record_acceptance(len(draft), right, len(tokens))
        steps.append((len(draft), right))
    return steps


# Which draft tokens are proposed


def test_the_continuation_of_an_earlier_match_is_proposed() -> None:
    lookup = PromptLookup()
    draft = lookup.propose([*COUNTED, 7, 8, 9, 10, 11], MAX_DRAFT_TOKENS)
    assert draft
    assert draft == list(range(12, 12 + len(draft)))


@pytest.mark.parametrize("tokens", [[], [1], [1, 1], [1, 2], COUNTED, [*COUNTED, 50, 12]])
def test_nothing_is_proposed_without_an_earlier_match(tokens: list[int]) -> None:
    assert PromptLookup().propose(tokens, MAX_DRAFT_TOKENS) == []


def test_at_most_the_requested_number_is_proposed() -> None:
    text = [*COUNTED, *COUNTED[:8]]
    for limit in range(1, 2 * MAX_DRAFT_TOKENS):
        draft = PromptLookup().propose(text, limit)
        assert 1 <= len(draft) <= min(limit, MAX_DRAFT_TOKENS)


def test_the_longest_match_wins_and_then_the_latest() -> None:
    text = [1, 2, 3, 4, 5, 60, 61, 62, 9, 3, 4, 5, 70, 71, 72, 1, 2, 3, 4, 5]
    assert PromptLookup().propose(text, 1) == [60]
    assert PromptLookup().propose([*text[:-5], 9, 8, 3, 4, 5], 1) == [70]  # equally long: the latest


def test_draft_tokens_are_copied_from_after_an_earlier_match() -> None:
    order = random.Random(0)
    proposals = 0
    for _ in range(200):
        tokens = [order.randrange(4) for _ in range(order.randrange(80))]
        lookup = PromptLookup()
        for _ in range(20):
            draft = lookup.propose(tokens, order.randrange(1, 20))
            proposals += bool(draft)
            wanted = [*tokens[-3:], *draft]
            starts = range(len(tokens) - 3) if draft else [0]
            assert not draft or any(tokens[start : start + len(wanted)] == wanted for start in starts)
            right = order.randrange(len(draft) + 1)
            tokens = [*tokens, *draft[:right], order.randrange(4)]
            lookup.record_acceptance(len(draft), right, len(tokens))
    assert proposals > 1000


def test_draft_length_grows_while_tokens_are_accepted() -> None:
    text = list(range(1, 300))
    steps = simulate([*text, *text], len(text) + 5, PromptLookup())
    lengths = [length for length, _ in steps]
    assert all(length == right for length, right in steps[:-1])
    assert lengths[:-1] == sorted(lengths[:-1])
    assert lengths[0] < MAX_DRAFT_TOKENS == max(lengths)
    assert len(steps) < len(text) / 10


def test_drafting_pauses_while_tokens_are_rejected() -> None:
    order = random.Random(1)
    noise = [order.randrange(5) for _ in range(1000)]  # every 3-gram occurs earlier, followed by random tokens
    lookups = [PromptLookup(), PromptLookup()]
    wrong = [(length, 0) for length, right in simulate(noise, 400, lookups[0]) if length and not right]
    rejected = 0
    tokens = list(noise[:400])
    for token in noise[400:]:
        draft = lookups[1].propose(tokens, MAX_DRAFT_TOKENS)
        rejected += len(draft)
        tokens.append(token)
        lookups[1].record_acceptance(len(draft), 0, len(tokens))  # never accepted
    assert 0 < rejected < 60
    assert wrong
    passage = list(range(100, 200))  # resumes where the text repeats itself
    steps = simulate([*tokens, *passage, *passage], len(tokens) + 105, lookups[1])
    assert sum(right for _, right in steps) > 20


def test_draft_tokens_depend_only_on_the_text() -> None:
    order = random.Random(2)
    text = [order.randrange(3) for _ in range(300)]
    assert simulate(text, 10, PromptLookup()) == simulate(text, 10, PromptLookup())


# Texts and probabilities


def test_speculation_does_not_change_texts(load_engine: Callable[..., Engine]) -> None:
    """With the same seeds, fp32 texts are equal at low temperatures (which repeat themselves) and high ones."""
    prompts = ["lazy dog. " * 6, "a user asked an assistant, " * 5, "0123456789" * 4]
    results = {}
    for speculative in (True, False):
        engine = load_engine(speculative=speculative, active=16, waiting=1000)
        params = [replace(DRAWN, temperature=temperature, logprobs=0) for temperature in (1.0, 0.03, 0.02)]
        answers = [engine.generate_many(prompt, each, 40) for prompt in prompts for each in params]
        results[speculative] = [answer.result() for several in answers for answer in several]
        counters = engine.counters()
        assert (counters.accepted_tokens > 100) == speculative
        assert (counters.draft_tokens > counters.accepted_tokens) == speculative
    for drafted, plain in zip(results[True], results[False], strict=True):
        assert outcome(drafted) == outcome(plain)
        one, other = ([each.logprob for each in result.logprobs] for result in (drafted, plain))
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert len({result.text for result in results[True]}) > 120


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("speculative", [True, False])
def test_speculation_does_not_change_probabilities(
    load_engine: Callable[..., Engine], tiny_bundle: Path, precision: str, speculative: bool
) -> None:
    """Over 1,500 seeds, the first tokens follow the model's distribution (Pearson's chi-squared test)."""
    prompt, count = [200] * 24, 1500
    params = SamplingParams(temperature=0.1, max_tokens=4)
    engine = load_engine(precision, active=32, waiting=1000, speculative=speculative)
    drawn = Counter[tuple[int, ...]]()
    for seed in range(0, count, 100):
        drawn.update(answer.result().tokens for answer in engine.generate_many(prompt, replace(params, seed=seed), 100))
    counters = engine.counters()
    assert (counters.accepted_tokens > 300) == speculative
    assert (counters.draft_tokens > counters.accepted_tokens + 100) == speculative
    bundle = Bundle.open(tiny_bundle)
    info = bundle.precision(precision)
    session = open_file(bundle.file(info.model), bundle.shape, info.share_buffer, "cpu", 1)
    for prefix in ((), (200,), (200, 200)):
        found = Counter[int]()
        for tokens, times in drawn.items():
            if tokens[: len(prefix)] == prefix and len(tokens) > len(prefix):
                found[tokens[len(prefix)]] += times
        session.clear_cache()
        logits = session.step([*prompt, *prefix])[0].astype(np.float64) / params.temperature
        expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum() * found.total()  # [V]
        often = np.flatnonzero(expected >= 5)
        seen = np.array([found[int(token)] for token in often])
        pairs = [*zip(seen, expected[often], strict=True), (found.total() - seen.sum(), expected[expected < 5].sum())]
        statistic = sum((have - want) ** 2 / want for have, want in pairs)
        freedom = len(often)
        assert freedom >= 3
        assert statistic < freedom + 4 * (2 * freedom) ** 0.5 + 4  # exceeded by chance in fewer than 1 of 1,000 runs


def test_repeated_text_is_generated_several_tokens_per_step(smollm2_bundle: Path) -> None:
    model = Model.load(smollm2_bundle, "fp32", provider="cpu", threads=2)
    prompt = PASSAGE * 2 + PASSAGE[:40]
    for params in (SamplingParams(temperature=0, max_tokens=40), SamplingParams(temperature=1, seed=3, max_tokens=40)):
        model.speculative = True
        drafted = model.generate(prompt, params).result()
        model.speculative = False
        plain = model.generate(prompt, params).result()
        assert outcome(drafted) == outcome(plain)
        assert plain.timings.draft_tokens == 0
        assert drafted.timings.accepted_tokens >= 10
