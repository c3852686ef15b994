"""Guesses from the text itself: what is guessed, and that texts and their probabilities stay as they are."""

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


def said(result: GenerationResult) -> tuple[Any, ...]:
    return result.text, result.tokens, result.finish_reason


def answered(text: Sequence[int], known: int, lookup: PromptLookup) -> list[tuple[int, int]]:
    """Draw `text[known:]` with the help of guesses; the length of each guess, and how much of it was right."""
    tokens, steps = list(text[:known]), []
    while len(tokens) < len(text):
        guess = lookup.propose(tokens, len(text) - len(tokens))
        right = 0
        while right < min(len(guess), len(text) - len(tokens) - 1) and guess[right] == text[len(tokens) + right]:
            right += 1
        tokens = list(text[: len(tokens) + right + 1])
        lookup.record_acceptance(len(guess), right, len(tokens))
        steps.append((len(guess), right))
    return steps


# What is guessed


def test_what_followed_before_is_guessed() -> None:
    lookup = PromptLookup()
    guess = lookup.propose([*COUNTED, 7, 8, 9, 10, 11], MAX_DRAFT_TOKENS)
    assert guess
    assert guess == list(range(12, 12 + len(guess)))


@pytest.mark.parametrize("tokens", [[], [1], [1, 1], [1, 2], COUNTED, [*COUNTED, 50, 12]])
def test_nothing_is_guessed_of_what_is_new(tokens: list[int]) -> None:
    assert PromptLookup().propose(tokens, MAX_DRAFT_TOKENS) == []


def test_no_more_is_guessed_than_asked_for() -> None:
    text = [*COUNTED, *COUNTED[:8]]
    for most in range(1, 2 * MAX_DRAFT_TOKENS):
        guess = PromptLookup().propose(text, most)
        assert 1 <= len(guess) <= min(most, MAX_DRAFT_TOKENS)


def test_of_two_places_the_one_with_more_in_common_counts() -> None:
    text = [1, 2, 3, 4, 5, 60, 61, 62, 9, 3, 4, 5, 70, 71, 72, 1, 2, 3, 4, 5]
    assert PromptLookup().propose(text, 1) == [60]
    assert PromptLookup().propose([*text[:-5], 9, 8, 3, 4, 5], 1) == [70]  # or else the latest


def test_guesses_stand_in_the_text_behind_what_it_ends_with() -> None:
    order = random.Random(0)
    made = 0
    for _ in range(200):
        tokens = [order.randrange(4) for _ in range(order.randrange(80))]
        lookup = PromptLookup()
        for _ in range(20):
            guess = lookup.propose(tokens, order.randrange(1, 20))
            made += bool(guess)
            wanted = [*tokens[-3:], *guess]
            starts = range(len(tokens) - 3) if guess else [0]
            assert not guess or any(tokens[start : start + len(wanted)] == wanted for start in starts)
            right = order.randrange(len(guess) + 1)
            tokens = [*tokens, *guess[:right], order.randrange(4)]
            lookup.record_acceptance(len(guess), right, len(tokens))
    assert made > 1000


def test_guesses_grow_while_they_are_right() -> None:
    text = list(range(1, 300))
    steps = answered([*text, *text], len(text) + 5, PromptLookup())
    lengths = [length for length, _ in steps]
    assert all(length == right for length, right in steps[:-1])
    assert lengths[:-1] == sorted(lengths[:-1])
    assert lengths[0] < MAX_DRAFT_TOKENS == max(lengths)
    assert len(steps) < len(text) / 10


def test_guesses_rest_where_they_are_wrong() -> None:
    order = random.Random(1)
    noise = [order.randrange(5) for _ in range(1000)]  # three in a row stood somewhere, and followed by anything
    tells = [PromptLookup(), PromptLookup()]
    wrong = [(length, 0) for length, right in answered(noise, 400, tells[0]) if length and not right]
    vain = 0
    tokens = list(noise[:400])
    for token in noise[400:]:
        guess = tells[1].propose(tokens, MAX_DRAFT_TOKENS)
        vain += len(guess)
        tokens.append(token)
        tells[1].record_acceptance(len(guess), 0, len(tokens))  # never right
    assert 0 < vain < 60
    assert wrong
    passage = list(range(100, 200))  # and come back where the text repeats itself
    steps = answered([*tokens, *passage, *passage], len(tokens) + 105, tells[1])
    assert sum(right for _, right in steps) > 20


def test_guesses_depend_on_the_text_alone() -> None:
    order = random.Random(2)
    text = [order.randrange(3) for _ in range(300)]
    assert answered(text, 10, PromptLookup()) == answered(text, 10, PromptLookup())


# Texts and probabilities


def test_guesses_change_no_text(load_engine: Callable[..., Engine]) -> None:
    """Drawn with the same seeds, texts are the same in fp32, cold ones that repeat themselves and hot ones."""
    prompts = ["lazy dog. " * 6, "a user asked an assistant, " * 5, "0123456789" * 4]
    sides = {}
    for guess in (True, False):
        engine = load_engine(speculative=guess, active=16, waiting=1000)
        params = [replace(DRAWN, temperature=temperature, logprobs=0) for temperature in (1.0, 0.03, 0.02)]
        answers = [engine.generate_many(prompt, each, 40) for prompt in prompts for each in params]
        sides[guess] = [answer.result() for several in answers for answer in several]
        counters = engine.counters()
        assert (counters.accepted_tokens > 100) == guess
        assert (counters.draft_tokens > counters.accepted_tokens) == guess
    for guessed, plain in zip(sides[True], sides[False], strict=True):
        assert said(guessed) == said(plain)
        one, other = ([each.logprob for each in result.logprobs] for result in (guessed, plain))
        np.testing.assert_allclose(one, other, atol=1e-5)
    assert len({result.text for result in sides[True]}) > 120


@pytest.mark.parametrize("precision", ["fp32", "int8"])
@pytest.mark.parametrize("guess", [True, False])
def test_guesses_leave_probabilities_as_they_are(
    load_engine: Callable[..., Engine], tiny_bundle: Path, precision: str, guess: bool
) -> None:
    """Of 1,500 seeds, the first tokens come as often as the model's own logits say (Pearson's chi-squared test)."""
    prompt, count = [200] * 24, 1500
    params = SamplingParams(temperature=0.1, max_tokens=4)
    engine = load_engine(precision, active=32, waiting=1000, speculative=guess)
    drawn = Counter[tuple[int, ...]]()
    for seed in range(0, count, 100):
        drawn.update(answer.result().tokens for answer in engine.generate_many(prompt, replace(params, seed=seed), 100))
    counters = engine.counters()
    assert (counters.accepted_tokens > 300) == guess
    assert (counters.draft_tokens > counters.accepted_tokens + 100) == guess
    bundle = Bundle.open(tiny_bundle)
    info = bundle.precision(precision)
    session = open_file(bundle.file(info.model), bundle.shape, info.share_buffer, "cpu", 1)
    for behind in ((), (200,), (200, 200)):
        found = Counter[int]()
        for tokens, times in drawn.items():
            if tokens[: len(behind)] == behind and len(tokens) > len(behind):
                found[tokens[len(behind)]] += times
        session.clear_cache()
        logits = session.step([*prompt, *behind])[0].astype(np.float64) / params.temperature
        expected = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum() * found.total()  # [V]
        often = np.flatnonzero(expected >= 5)
        seen = np.array([found[int(token)] for token in often])
        pairs = [*zip(seen, expected[often], strict=True), (found.total() - seen.sum(), expected[expected < 5].sum())]
        statistic = sum((have - want) ** 2 / want for have, want in pairs)
        freedom = len(often)
        assert freedom >= 3
        assert statistic < freedom + 4 * (2 * freedom) ** 0.5 + 4  # more by chance: less than once in a thousand


def test_a_copy_comes_several_tokens_a_step(smollm2_bundle: Path) -> None:
    model = Model.load(smollm2_bundle, "fp32", provider="cpu", threads=2)
    prompt = PASSAGE * 2 + PASSAGE[:40]
    for params in (SamplingParams(temperature=0, max_tokens=40), SamplingParams(temperature=1, seed=3, max_tokens=40)):
        model.speculative = True
        guessed = model.generate(prompt, params).result()
        model.speculative = False
        plain = model.generate(prompt, params).result()
        assert said(guessed) == said(plain)
        assert plain.timings.draft_tokens == 0
        assert guessed.timings.accepted_tokens >= 10
