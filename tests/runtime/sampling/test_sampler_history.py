"""The sampler's state across tokens: bans, biases, n-grams, DRY, mirostat and XTC."""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from test_sampler import row
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from llm_edge.runtime.errors import LogitsError, ParameterError
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.runtime.sampling.sampler import Sampler
from llm_edge.runtime.sampling.transforms import MAX_DRY, Row

GREEDY = SamplingParams(temperature=0)


def forced(token: int, size: int) -> Row:
    """Logits that allow one token."""
    out: Row = np.where(np.arange(size) == token, np.float32(0), np.float32(-np.inf))
    return out


def transformed(sampler: Sampler, logits: Row) -> Row:
    """The logits [V] after all transforms; no filter may be active."""
    kept, out = sampler.candidates(logits)
    assert kept is None
    return out


def texts(seed: int) -> Iterator[list[int]]:
    """Texts of token ids below 6 with various repetitions."""
    random = np.random.default_rng(seed)
    phrase = random.integers(0, 6, 7).tolist()
    yield []
    yield [3]
    yield [2] * 40
    yield [1, 2] * 25 + [1]
    yield random.integers(0, 3, 80).tolist()
    yield phrase * 4 + random.integers(0, 6, 9).tolist() + phrase[:5]


# --- bans and biases ----------------------------------------------------------------------------------------


def test_a_bias_is_added_before_all_penalties() -> None:
    params = SamplingParams(logit_bias=((0, -2.5), (1, 3.0), (7, 9.0), (10**30, 1.0)), repetition_penalty=2.0)
    assert transformed(Sampler(params, [1]), row(0.0, -1.0, 0.5)).tolist() == [-2.5, 1.0, 0.5]


def test_biases_are_normalized() -> None:
    wanted = ((2, 1.0), (7, -3.5))
    for given in ({7: -3.5, 2: 1}, {"7": -3.5, "2": 1.0}, [(7, -3.5), (2, 1)], [[2, 9], [2, 1], [7, -3.5]]):
        params = SamplingParams(logit_bias=given)  # type: ignore[arg-type]
        assert params.logit_bias == wanted
        assert hash(params) == hash(SamplingParams(logit_bias=wanted))
        assert dataclasses.replace(params, seed=1).logit_bias == wanted


def test_banned_tokens_are_not_drawn() -> None:
    sampler = Sampler(SamplingParams(banned_tokens=(0, 2, 10**30), seed=1), [])
    assert {sampler.sample(row(9.0, 1.0, 9.0, 1.0)) for _ in range(60)} == {1, 3}


@pytest.mark.parametrize("base", [GREEDY, SamplingParams(seed=1), SamplingParams(top_k=2, top_p=0.9, seed=1)])
@pytest.mark.parametrize(
    ("bans", "named"),
    [
        ({"banned_tokens": (0, 1, 2)}, "banned_tokens"),
        ({"banned_first_tokens": (0, 1, 2)}, "banned_first_tokens"),
        ({"banned_tokens": (1,), "banned_first_tokens": (0, 2)}, "banned_tokens, banned_first_tokens"),
        ({"banned_tokens": (1,), "min_tokens": 5}, "banned_tokens, min_tokens"),  # only end tokens are left
        ({"no_repeat_ngram": 1}, "no_repeat_ngram"),
    ],
)
def test_banning_every_token_is_an_error(base: SamplingParams, bans: dict[str, Any], named: str) -> None:
    sampler = Sampler(dataclasses.replace(base, **bans), [0, 1, 2], end_tokens={0, 2})
    with pytest.raises(ParameterError, match=f"^{named}: no token is left to draw as token 1 of the answer") as caught:
        sampler.sample(row(1.0, 3.0, 2.0))
    assert "\n" not in str(caught.value)


def test_bans_beside_logits_that_are_not_finite_are_errors_too() -> None:
    with pytest.raises(LogitsError):
        Sampler(dataclasses.replace(GREEDY, banned_tokens=(0,)), []).sample(row(-math.inf, -math.inf))
    with pytest.raises(ParameterError, match="no token is left"):
        Sampler(dataclasses.replace(GREEDY, banned_tokens=(1,)), []).sample(row(-math.inf, 2.0))


def test_a_ban_of_what_a_processor_allows_is_an_error_but_a_repetition_is_not() -> None:
    def only(row: Row, tokens: Sequence[int]) -> Row:
        out = np.full_like(row, -np.inf)
        out[1] = row[1]
        return out

    with pytest.raises(ParameterError, match="banned_tokens: no token is left"):
        Sampler(dataclasses.replace(GREEDY, banned_tokens=(1,)), [], [only]).sample(row(1.0, 3.0, 2.0))
    sampler = Sampler(dataclasses.replace(GREEDY, no_repeat_ngram=1), [], [only])
    assert [sampler.sample(row(1.0, 3.0, 2.0)) for _ in range(3)] == [1, 1, 1]


@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 5},
        {"top_p": 0.5},
        {"min_p": 0.5},
        {"typical_p": 0.2},
        {"epsilon_cutoff": 0.9},
        {"eta_cutoff": 0.9},
        {"top_n_sigma": 1.0},
        {"mirostat_tau": 3.0},
        {"xtc_probability": 1.0},
    ],
    ids=str,
)
def test_filters_never_bring_back_a_banned_token(filters: dict[str, float]) -> None:
    for allowed in ({3}, {1, 4}):
        banned = tuple(set(range(7)) - allowed)
        sampler = Sampler(SamplingParams(banned_tokens=banned, seed=1, **filters), [])  # type: ignore[arg-type]
        assert {sampler.sample(row(9, 1, 9, 0, 2, 9, 9)) for _ in range(50)} <= allowed


def test_banned_first_tokens_may_follow_later() -> None:
    sampler = Sampler(dataclasses.replace(GREEDY, banned_first_tokens=(1, 10**30)), [1, 1])
    assert [sampler.sample(row(1.0, 3.0, 2.0)) for _ in range(3)] == [2, 1, 1]


def test_min_tokens_delays_end_tokens() -> None:
    sampler = Sampler(dataclasses.replace(GREEDY, min_tokens=3), [5, 5, 5], end_tokens={2, 3, 10**30})
    assert [sampler.sample(row(0.0, 1.0, 9.0, 8.0)) for _ in range(5)] == [1, 1, 1, 2, 2]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 64])
def test_no_repeat_ngram_matches_transformers(size: int) -> None:
    for history in texts(seed=size):
        for begun in {0, len(history) // 2, len(history)}:  # the split into prompt and generated tokens does not matter
            sampler = Sampler(SamplingParams(no_repeat_ngram=size), history[:begun], generated=history[begun:])
            tokens = torch.tensor([history], dtype=torch.long)
            expected = NoRepeatNGramLogitsProcessor(size)(tokens, torch.zeros(1, 7))
            assert transformed(sampler, np.zeros(7, np.float32)).tolist() == expected[0].tolist()


def test_all_transforms_together_match_transformers() -> None:
    params = SamplingParams(
        logit_bias=((3, 2.5), (17, -4.0)),
        banned_tokens=(5, 900),
        min_tokens=3,
        no_repeat_ngram=2,
        repetition_penalty=1.3,
        repetition_window=-1,
        temperature=0.9,
        top_k=60,
        top_p=0.9503,
        min_p=0.01,
        typical_p=0.8503,
    )
    bias: Any = [[[3], 2.5], [[17], -4.0]]
    random = np.random.default_rng(3)
    for _ in range(30):
        prompt = random.integers(0, 8, 40).tolist()
        logits = random.normal(0, 3, 1000).astype(np.float32)
        steps: list[LogitsProcessor] = [
            SequenceBiasLogitsProcessor(bias),
            SuppressTokensLogitsProcessor([5, 900]),
            MinNewTokensLengthLogitsProcessor(40, 3, [1, 2]),
            NoRepeatNGramLogitsProcessor(2),
            RepetitionPenaltyLogitsProcessor(1.3),
            TemperatureLogitsWarper(0.9),
            TopKLogitsWarper(60),
            TopPLogitsWarper(0.9503),
            MinPLogitsWarper(0.01),
            TypicalLogitsWarper(0.8503),
        ]
        scores, tokens = torch.from_numpy(logits.copy())[None], torch.tensor([prompt])
        for step in steps:
            scores = step(tokens, scores)
        kept, left = Sampler(params, prompt, end_tokens={1, 2}).candidates(logits)
        assert kept is not None
        assert kept.tolist() == np.flatnonzero(scores[0].isfinite().numpy()).tolist()
        assert np.abs(left - scores[0].numpy()[kept]).max() < 1e-5


# --- DRY ----------------------------------------------------------------------------------------------------


def literal_dry(history: Sequence[int], params: SamplingParams, breakers: set[int], size: int) -> list[float]:
    """A literal implementation of llama.cpp's description."""
    window = list(history) if params.dry_range < 0 else list(history)[max(0, len(history) - params.dry_range) :]
    longest: dict[int, int] = {}
    for end in range(len(window) - 1):
        length = 0
        while length <= end and window[end - length] == window[-1 - length] and window[end - length] not in breakers:
            length += 1
        if length >= params.dry_allowed_length:
            longest[window[end + 1]] = max(longest.get(window[end + 1], 0), length)
    out = [0.0] * size
    for token, length in longest.items():
        if token not in breakers and token < size:
            amount = params.dry_multiplier * params.dry_base ** (length - params.dry_allowed_length)
            out[token] = -min(amount, MAX_DRY)
    return out


@pytest.mark.parametrize("breakers", [set(), {0}, {1, 4, 10**30}])
@pytest.mark.parametrize(
    "given", [{}, {"dry_base": 1.0}, {"dry_allowed_length": 4}, {"dry_range": 12}, {"dry_range": 1}, {"dry_range": 0}]
)
def test_dry_matches_its_definition(given: dict[str, Any], breakers: set[int]) -> None:
    params = SamplingParams(dry_multiplier=0.7, **given)
    for history in texts(seed=len(breakers)):
        for begun in {0, len(history) // 2, len(history)}:
            sampler = Sampler(params, history[:begun], dry_breakers=breakers)
            for token in history[begun:]:
                sampler.sample(forced(token, 5 if token < 5 else 6))
            wanted = literal_dry(history, params, breakers, 5) if params.dry_range else [0.0] * 5
            assert transformed(sampler, np.zeros(5, np.float32)).tolist() == pytest.approx(wanted, rel=1e-6)


def test_dry_history_grows_beyond_its_initial_capacity() -> None:
    params = SamplingParams(dry_multiplier=0.01, dry_base=1.01)
    history = np.random.default_rng(0).integers(0, 3, 1500).tolist()
    sampler = Sampler(params, history[:5])
    for token in history[5:]:
        sampler.sample(forced(token, 3))
    wanted = literal_dry(history, params, set(), 3)
    assert min(wanted) < 0
    assert transformed(sampler, np.zeros(3, np.float32)).tolist() == pytest.approx(wanted, rel=1e-5)


def test_dry_on_a_single_repeated_token_is_fast_and_finite() -> None:
    began = time.perf_counter()
    sampler = Sampler(SamplingParams(dry_multiplier=100, dry_base=10), [1] * 20_000)
    for _ in range(300):
        sampler.sample(forced(1, 3))
    assert transformed(sampler, np.zeros(3, np.float32)).tolist() == [0.0, -MAX_DRY, 0.0]
    assert time.perf_counter() - began < 5  # quadratic time would take minutes


def test_dry_ends_a_loop() -> None:
    loop = {0: 1, 1: 2, 2: 3, 3: 0}
    params, tokens = SamplingParams(temperature=0, dry_multiplier=1.0), [0]
    with_dry, without_dry = Sampler(params, tokens), Sampler(GREEDY, tokens)
    for sampler in (with_dry, without_dry):
        for _ in range(40):
            logits = np.zeros(6, np.float32)
            logits[loop.get(sampler.tokens[-1], 0)] = 8.0
            sampler.sample(logits)
    assert without_dry.tokens == tuple([0, 1, 2, 3] * 10 + [0])
    assert with_dry.tokens[:8] == (0, 1, 2, 3, 0, 1, 2, 3)
    assert {4, 5} & set(with_dry.tokens)


# --- draws --------------------------------------------------------------------------------------------------


def test_mirostat_holds_the_mean_surprise() -> None:
    logits = np.random.default_rng(0).normal(0, 2.5, 5000).astype(np.float32)
    p = np.exp(logits.astype(np.float64))
    p /= p.sum()
    for tau in (2.0, 4.0, 6.0):
        sampler = Sampler(SamplingParams(mirostat_tau=tau, seed=1), [])
        limit, surprises = 2 * tau, []
        for _ in range(400):
            kept, left = sampler.candidates(logits)
            assert kept is not None
            allowed = -np.log2(p) <= limit
            allowed[p.argmax()] = True
            assert kept.tolist() == np.flatnonzero(allowed).tolist()
            token = sampler.sample(logits)
            surprises.append(-math.log2(p[token] / p[allowed].sum()))
            limit -= 0.1 * (surprises[-1] - tau)
            assert left.size == kept.size
        assert np.mean(surprises[100:]) == pytest.approx(tau, abs=0.2)


def test_mirostat_replaces_the_filters_but_not_earlier_transforms() -> None:
    logits = np.random.default_rng(1).normal(0, 2, 300).astype(np.float32)
    others: dict[str, Any] = {"top_k": 1, "top_p": 0.1, "min_p": 0.9, "typical_p": 0.1, "top_n_sigma": 0.1}
    others |= {"xtc_probability": 1.0, "xtc_threshold": 0.001}
    alone = SamplingParams(mirostat_tau=5.0, seed=2, temperature=1.5, banned_tokens=(3,))
    beside = dataclasses.replace(alone, **others)
    one, two = Sampler(alone, []), Sampler(beside, [])
    for _ in range(50):
        assert one.sample(logits) == two.sample(logits)
    assert len(set(one.generated)) > 10
    assert 3 not in one.generated


def test_xtc_is_applied_with_its_probability() -> None:
    logits = row(3.0, 2.5, 2.0, -3.0)
    for probability in (0.0, 0.3, 1.0):
        sampler = Sampler(SamplingParams(xtc_probability=probability, xtc_threshold=0.15, seed=3), [])
        acted = 0
        for _ in range(2000):
            kept, _ = sampler.candidates(logits)
            acted += kept is not None and kept.tolist() == [2, 3]
            sampler.sample(logits)
        assert acted == pytest.approx(2000 * probability, abs=90)  # more than four standard deviations


def test_xtc_uses_one_number_per_token_from_a_separate_stream() -> None:
    # With a single candidate XTC does nothing, and it must not change the other draws.
    logits = row(0.0, 0.1, 0.2, 0.3)
    off = Sampler(SamplingParams(seed=5), [])
    on = Sampler(SamplingParams(seed=5, xtc_probability=0.5, xtc_threshold=0.9), [])
    assert [off.sample(logits) for _ in range(50)] == [on.sample(logits) for _ in range(50)]
    # Whether XTC is applied to one token does not affect later tokens.
    params = SamplingParams(seed=5, xtc_probability=0.5, xtc_threshold=0.1)
    for first in (logits, logits[:1]):
        sampler, kept = Sampler(params, []), []
        for step in range(20):
            kept.append(sampler.candidates(logits)[0] is None)
            sampler.sample(first if step % 2 else logits)
        if first is logits:
            wanted = kept
    assert kept == wanted
    assert {True, False} == set(kept)


def test_a_seed_gives_known_choices_of_xtc() -> None:
    # The second stream of seed 0 starts .677, .243, .612, .423, .823, .771.
    sampler, acted = Sampler(SamplingParams(seed=0, xtc_probability=0.5), []), []
    for _ in range(6):
        acted.append(sampler.candidates(row(0.0, 0.0))[0] is not None)
        sampler.sample(row(0.0, 0.0))
    assert acted == [False, True, False, True, False, False]


EVERYTHING: dict[str, Any] = {
    "logit_bias": {3: 1.0, 4: -1.0},
    "banned_tokens": (7, 8),
    "min_tokens": 10,
    "no_repeat_ngram": 3,
    "repetition_penalty": 1.1,
    "presence_penalty": 0.1,
    "frequency_penalty": 0.1,
    "dry_multiplier": 0.8,
    "temperature": 1.2,
    "top_n_sigma": 3.0,
    "top_k": 200,
    "top_p": 0.97,
    "min_p": 0.001,
    "typical_p": 0.95,
    "xtc_probability": 0.5,
    "xtc_threshold": 0.05,
}


@pytest.mark.parametrize("mirostat", [0.0, 5.0])
def test_a_seed_repeats_with_everything_on(mirostat: float) -> None:
    params = SamplingParams(seed=11, mirostat_tau=mirostat, **EVERYTHING)
    rows = np.random.default_rng(4).normal(0, 3, (60, 1000)).astype(np.float32)
    rows.setflags(write=False)

    def drawn(seed: int | None) -> list[int]:
        given = dataclasses.replace(params, seed=seed)
        sampler = Sampler(given, [1, 2, 3, 1, 2], end_tokens={5, 6}, dry_breakers={9})
        found = []
        for logits in rows:
            sampler.candidates(logits)  # inspecting the candidates has no side effects
            found.append(sampler.sample(logits))
        return found

    first = drawn(11)
    assert first == drawn(11)
    assert first != drawn(12)
    assert drawn(None) != drawn(None)
    assert not {7, 8} & set(first)
    assert not {5, 6} & set(first[:10])


def test_all_parameters_together_handle_single_token_and_extreme_logits() -> None:
    for mirostat in (0.0, 5.0):
        params = SamplingParams(seed=1, mirostat_tau=mirostat, **EVERYTHING)
        params = dataclasses.replace(params, banned_tokens=(), min_tokens=0, no_repeat_ngram=0)  # ban all of so few
        for logits in (row(1.0), row(1e4, -1e30, -3e38, -math.inf), np.zeros(300, np.float32)):
            sampler = Sampler(params, [0, 0, 0], end_tokens={0})
            for _ in range(10):
                assert np.isfinite(logits[sampler.sample(logits)])
