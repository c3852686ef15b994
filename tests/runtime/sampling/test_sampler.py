from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import (
    LogitsProcessor,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from llm_edge.runtime.errors import LlmEdgeError, LogitsError, ParameterError
from llm_edge.runtime.sampling import transforms as module
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.runtime.sampling.sampler import Sampler
from llm_edge.runtime.sampling.transforms import Row


def row(*values: float) -> Row:
    out: Row = np.array(values, dtype=np.float32)
    return out


def logs(*probabilities: float) -> Row:
    return row(*map(math.log, probabilities))


def ids(*values: int) -> module.Ids:
    return np.array(values, dtype=np.intp)


def draws(params: SamplingParams, logits: Row, count: int, prompt: tuple[int, ...] = ()) -> tuple[int, ...]:
    sampler = Sampler(params, prompt)
    for _ in range(count):
        sampler.sample(logits)
    return sampler.generated


# --- each transform on four elements ------------------------------------------------------------------------


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits() -> None:
    out = module.repetition_penalty(row(2.0, -2.0, 3.0, -3.0), ids(0, 1), 2.0)
    assert out.tolist() == [1.0, -4.0, 3.0, -3.0]
    assert out.dtype == np.float32


def test_repetition_penalty_counts_a_token_once_and_skips_ids_without_a_logit() -> None:
    out = module.repetition_penalty(row(2.0, -2.0, 3.0, -3.0), ids(2, 2, 2, 4, 99), 1.5)
    assert out.tolist() == [2.0, -2.0, 2.0, -3.0]


def test_presence_counts_once_and_frequency_every_time() -> None:
    out = module.presence_frequency(row(1.0, 1.0, 1.0, 1.0), ids(3, 1), row(1.0, 4.0), 0.5, 0.25)
    assert out.tolist() == [1.0, -0.5, 1.0, 0.25]


def test_temperature_divides() -> None:
    assert module.temperature(row(1.0, -2.0, 0.0, 3.0), 0.5).tolist() == [2.0, -4.0, 0.0, 6.0]


@pytest.mark.parametrize(
    ("k", "kept"), [(1, [3]), (2, [1, 2, 3]), (3, [1, 2, 3]), (4, [0, 1, 2, 3]), (9, [0, 1, 2, 3])]
)
def test_top_k_keeps_ties_with_the_kth(k: int, kept: list[int]) -> None:
    assert module.keep_top_k(row(0.0, 1.0, 1.0, 2.0), k).tolist() == kept


@pytest.mark.parametrize(
    ("p", "kept"),
    [
        (0.0, [2]),  # at least one token is kept
        (0.49, [2]),
        (0.51, [0, 2]),
        (0.74, [0, 2]),
        (0.76, [0, 2, 3]),
        (0.89, [0, 2, 3]),
        (0.91, [0, 1, 2, 3]),
    ],
)
def test_top_p_keeps_the_smallest_set_that_reaches_p(p: float, kept: list[int]) -> None:
    assert module.keep_top_p(logs(0.25, 0.1, 0.5, 0.15), p).tolist() == kept


@pytest.mark.parametrize(("p", "kept"), [(0.25, [3]), (0.26, [2, 3]), (0.5, [2, 3]), (0.75, [1, 2, 3])])
def test_top_p_may_reach_p_exactly_and_prefers_high_positions_among_ties(p: float, kept: list[int]) -> None:
    assert module.keep_top_p(row(1.0, 1.0, 1.0, 1.0), p).tolist() == kept


@pytest.mark.parametrize(
    ("p", "kept"),
    [(1.0, [1, 3]), (0.51, [1, 3]), (0.49, [0, 1, 3]), (0.24, [0, 1, 2, 3]), (1e-30, [0, 1, 2, 3])],
)
def test_min_p_is_relative_to_the_most_probable(p: float, kept: list[int]) -> None:
    assert module.keep_min_p(logs(0.2, 0.4, 0.1, 0.4), p).tolist() == kept


@pytest.mark.parametrize(
    ("uniform", "position"),
    [(0.0, 1), (0.24, 1), (0.26, 2), (0.74, 2), (0.76, 3), (math.nextafter(1.0, 0.0), 3)],
)
def test_draw_inverts_the_cumulative_sum_and_never_returns_weight_zero(uniform: float, position: int) -> None:
    assert module.draw(row(-math.inf, math.log(0.25), math.log(0.5), math.log(0.25)), uniform) == position


def test_draw_across_blocks_inverts_the_whole_cumulative_sum() -> None:
    random = np.random.default_rng(5)
    logits = random.normal(0, 3, 5 * module.BLOCK + 17).astype(np.float32)
    logits[: module.BLOCK + 3] = -np.inf  # includes a whole block of weight 0
    logits[-9:] = -np.inf
    running = np.cumsum(np.exp(logits.astype(np.float64)))
    running /= running[-1]
    for uniform in [*random.random(2000), 0.0]:
        position = module.draw(logits, uniform)
        low = running[position - 1] if position else 0.0
        assert low - 1e-6 <= uniform <= running[position] + 1e-6
        assert np.isfinite(logits[position])


def test_draw_just_below_one_returns_the_last_token_with_weight() -> None:
    for seed in range(100):
        logits = np.random.default_rng(seed).normal(0, 2, 300).astype(np.float32)
        logits[290:] = -np.inf
        assert module.draw(logits, math.nextafter(1.0, 0.0)) == 289


# --- optimized filters equal a full sort ---------------------------------------------------------------------


def logit_samples(size: int, seed: int) -> list[Row]:
    random = np.random.default_rng(seed)
    flat = random.normal(0, 1, size)
    peaked = random.normal(0, 3, size)
    peaked[random.integers(0, size, 1 + size // 200)] += random.exponential(6, 1 + size // 200)
    tied = np.round(random.normal(0, 2, size))
    holes = np.where(random.random(size) < 0.7, -np.inf, peaked)
    holes[random.integers(size)] = 1.0
    return [item.astype(np.float32) for item in (flat, peaked, tied, holes, np.zeros(size), peaked * 8 - 500)]


@pytest.mark.parametrize("size", [1, 4, 255, 257, 1000, 4096, 50_257])
def test_filters_keep_what_a_full_sort_keeps(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    for logits in logit_samples(size, seed=size):
        for k in (1, 2, 40, 300, 5000):
            kth = np.sort(logits)[max(0, size - k)]
            assert np.array_equal(module.keep_top_k(logits, k), np.flatnonzero(logits >= kth))
        for p in (1e-9, 1e-3, 0.05, 0.5, 1.0):
            expected = np.flatnonzero(np.exp(logits - logits.max()) >= np.float32(p))
            assert np.array_equal(module.keep_min_p(logits, p), expected)
        for p in (0.0, 0.1, 0.5, 0.9, 0.95, 0.999):
            short = module.keep_top_p(logits, p)
            with monkeypatch.context() as patch:
                patch.setattr(module, "NUCLEUS_FLOORS", ())
                assert np.array_equal(short, module.keep_top_p(logits, p))


# --- parity with transformers -------------------------------------------------------------------------------


# No top_p here covers a whole number of tokens of the all-equal row, where rounding decides; see below.
COMBINATIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.7},
    {"temperature": 1.6},
    {"top_k": 1},
    {"top_k": 40},
    {"top_p": 0.0},
    {"top_p": 0.3003},
    {"top_p": 0.9501},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.8, "top_k": 5},
    {"temperature": 0.8, "top_k": 50, "top_p": 0.9003},
    {"temperature": 1.3, "top_p": 0.8003, "min_p": 0.1},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.9501, "min_p": 0.02, "repetition_penalty": 1.1},
]


Outcome = tuple[module.Ids, Row]  # the ids that are kept, the probabilities [V]


def transformers_outcome(params: SamplingParams, logits: Row, history: list[int]) -> Outcome:
    steps: list[LogitsProcessor] = []
    if params.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(params.repetition_penalty))
    steps.append(TemperatureLogitsWarper(params.temperature))
    if params.top_k:
        steps.append(TopKLogitsWarper(params.top_k))
    if params.top_p < 1:
        steps.append(TopPLogitsWarper(params.top_p))
    if params.min_p:
        steps.append(MinPLogitsWarper(params.min_p))
    scores, tokens = torch.from_numpy(logits.copy())[None], torch.tensor([history])
    for step in steps:
        scores = step(tokens, scores)
    return np.flatnonzero(scores[0].isfinite().numpy()), scores.double().softmax(dim=-1)[0].float().numpy()


def our_outcome(params: SamplingParams, logits: Row, history: list[int]) -> Outcome:
    kept, left = Sampler(params, history).candidates(logits)
    if kept is None:
        kept = np.arange(logits.size)
    weights = np.exp(left.astype(np.float64) - left.max())
    probabilities = np.zeros(logits.size, np.float32)
    probabilities[kept] = weights / weights.sum()
    return kept[np.isfinite(left)], probabilities


@pytest.fixture
def _stable_torch_sort(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make torch.sort stable: TopPLogitsWarper uses it to choose among equal logits."""
    monkeypatch.setattr(torch, "sort", partial(torch.sort, stable=True))


@pytest.mark.usefixtures("_stable_torch_sort")
@pytest.mark.parametrize("combination", COMBINATIONS, ids=str)
@pytest.mark.parametrize(("size", "seeds"), [(4, 5), (50, 5), (1000, 5), (50_257, 1)])
def test_parity_with_transformers(combination: dict[str, Any], size: int, seeds: int) -> None:
    params = SamplingParams(repetition_window=-1, **combination)
    for seed in range(seeds):
        history = np.random.default_rng(seed).integers(0, size, 30).tolist()
        for logits in logit_samples(size, seed):
            kept, probabilities = our_outcome(params, logits, history)
            kept_there, probabilities_there = transformers_outcome(params, logits, history)
            assert np.array_equal(kept, kept_there)
            assert np.abs(probabilities - probabilities_there).max() < 1e-6


@pytest.mark.parametrize("size", [2, 4, 8, 16])
def test_parity_with_transformers_where_p_is_reached_exactly(size: int) -> None:
    logits = np.zeros(size, np.float32)
    for reached in range(1, size):
        params = SamplingParams(top_p=reached / size)
        kept, kept_there = our_outcome(params, logits, [])[0], transformers_outcome(params, logits, [0])[0]
        assert kept.tolist() == kept_there.tolist() == list(range(size - reached, size))


def test_top_p_is_reached_despite_rounding_errors() -> None:
    # Rounding in transformers' sum over the less probable tokens sometimes keeps one more token here.
    for size in range(2, 120):
        for reached in range(1, size):
            assert module.keep_top_p(np.zeros(size, np.float32), reached / size).size == reached


# --- draws --------------------------------------------------------------------------------------------------


# The 99.9 % point of chi-square with 5 degrees of freedom (six outcomes) is 20.5, with 2 it is 13.8.
@pytest.mark.parametrize(
    ("params", "expected", "limit"),
    [
        (SamplingParams(seed=1), [0.3, 0.05, 0.25, 0.15, 0.05, 0.2], 20.5),
        (SamplingParams(seed=2, top_k=3), [0.4, 0, 1 / 3, 0, 0, 4 / 15], 13.8),
        (SamplingParams(seed=3, top_p=0.7), [0.4, 0, 1 / 3, 0, 0, 4 / 15], 13.8),
        (SamplingParams(seed=4, min_p=0.6), [0.4, 0, 1 / 3, 0, 0, 4 / 15], 13.8),
    ],
)
def test_draws_follow_the_distribution(params: SamplingParams, expected: list[float], limit: float) -> None:
    count = 6000
    found = np.bincount(draws(params, logs(0.3, 0.05, 0.25, 0.15, 0.05, 0.2), count), minlength=6)
    wanted = np.array(expected) * count
    possible = wanted > 0
    assert found[~possible].sum() == 0
    assert ((found - wanted)[possible] ** 2 / wanted[possible]).sum() < limit


def test_the_same_seed_repeats_and_another_seed_differs() -> None:
    logits = np.random.default_rng(0).normal(0, 2, 500).astype(np.float32)
    first = draws(SamplingParams(seed=7, repetition_penalty=1.2), logits, 50)
    assert first == draws(SamplingParams(seed=7, repetition_penalty=1.2), logits, 50)
    assert first != draws(SamplingParams(seed=8, repetition_penalty=1.2), logits, 50)
    assert draws(SamplingParams(), logits, 50) != draws(SamplingParams(), logits, 50)


def test_a_seed_gives_known_tokens() -> None:
    # PCG64(0) begins .637, .270, .041, .017, .813, .913; the running sums are .1, .3, .6, 1.
    assert draws(SamplingParams(seed=0), logs(0.1, 0.2, 0.3, 0.4), 6) == (3, 1, 0, 0, 3, 3)


def test_each_token_uses_one_uniform_number_even_with_one_candidate() -> None:
    sampler, certain, uncertain = (
        Sampler(SamplingParams(seed=0), []),
        row(0, -math.inf),
        logs(0.1, 0.2, 0.3, 0.4),
    )
    assert [sampler.sample(x) for x in (certain[:1], uncertain, certain, uncertain)] == [0, 1, 0, 0]


@pytest.mark.parametrize("temperature", [0.0, 0, 1e-6])
def test_greedy_takes_the_largest_logit_and_the_lowest_id_among_equals(temperature: float) -> None:
    params = SamplingParams(temperature=temperature, top_k=3, top_p=0.9)
    assert draws(params, row(1.0, 5.0, 5.0, 5.0), 3) == (1, 1, 1)


def test_greedy_applies_the_penalties() -> None:
    params = SamplingParams(temperature=0, frequency_penalty=0.5)
    assert draws(params, row(1.0, 1.9, 0.0, -9.0), 5) == (1, 1, 0, 1, 0)
    assert draws(SamplingParams(temperature=0, repetition_penalty=2.0), row(1.0, 1.9, 0.0, -9.0), 2, (1,)) == (0, 1)


# --- history ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("window", "penalised"),
    [(0, []), (1, [3]), (2, [2, 3]), (3, [2, 3]), (4, [1, 2, 3]), (99, [0, 1, 2, 3]), (-1, [0, 1, 2, 3])],
)
def test_the_window_is_the_latest_tokens_including_the_prompt(window: int, penalised: list[int]) -> None:
    params = SamplingParams(repetition_penalty=2.0, repetition_window=window)
    _, out = Sampler(params, [0, 1, 2, 2, 3]).candidates(row(2.0, 2.0, 2.0, 2.0, 2.0))
    assert np.flatnonzero(out == 1.0).tolist() == penalised


@pytest.mark.parametrize("window", [2, -1])
def test_generated_tokens_enter_the_window(window: int) -> None:
    sampler = Sampler(SamplingParams(repetition_penalty=2.0, repetition_window=window), [0])
    for token in (1, 2):
        sampler.sample(np.where(np.arange(4) == token, np.float32(8), np.float32(-np.inf)))
    _, out = sampler.candidates(row(2.0, 2.0, 2.0, 2.0))
    assert out.tolist() == ([2.0, 1.0, 1.0, 2.0] if window == 2 else [1.0, 1.0, 1.0, 2.0])


def test_presence_and_frequency_count_generated_tokens_only() -> None:
    sampler = Sampler(SamplingParams(presence_penalty=0.5, frequency_penalty=0.25), [0, 0, 3])
    for token in (1, 1, 2):
        sampler.sample(np.where(np.arange(4) == token, np.float32(8), np.float32(-np.inf)))
    _, out = sampler.candidates(row(1.0, 1.0, 1.0, 1.0))
    assert out.tolist() == [1.0, 0.0, 0.25, 1.0]


def test_counts_grow_beyond_their_initial_capacity() -> None:
    params = SamplingParams(temperature=0, presence_penalty=2.0, repetition_penalty=1.1, repetition_window=-1)
    logits = np.linspace(1.0, 0.5, 300).astype(np.float32)
    assert draws(params, logits, 300) == tuple(range(300))


def test_history_can_be_read() -> None:
    sampler = Sampler(SamplingParams(temperature=0), np.array([5, 6]))  # type: ignore[arg-type]
    assert (sampler.tokens, sampler.generated) == ((5, 6), ())
    assert sampler.sample(row(0.0, 1.0)) == 1
    assert (sampler.tokens, sampler.generated) == ((5, 6, 1), (1,))


# --- input logits ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "combination", [{}, {"temperature": 0.0}, *COMBINATIONS[-4:], {"presence_penalty": 1.0}], ids=str
)
def test_the_callers_logits_are_not_modified(combination: dict[str, Any]) -> None:
    for logits in logit_samples(700, seed=3):
        before = logits.copy()
        logits.setflags(write=False)
        sampler = Sampler(SamplingParams(seed=0, **combination), [1, 2, 3])
        for _ in range(3):
            sampler.sample(logits)
        assert np.array_equal(logits, before)


@pytest.mark.parametrize(
    "logits",
    [
        row(0.0, math.nan, 1.0),
        row(math.nan, math.nan),
        row(0.0, math.inf),
        row(math.inf, math.nan),
        row(-math.inf, -math.inf, -math.inf),
        row(3e38, 3e38),  # finite, until the penalty below 1
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.0, 1.0, 0.5])
def test_logits_without_a_finite_maximum_are_rejected(logits: Row, temperature: float) -> None:
    params = SamplingParams(temperature=temperature, repetition_penalty=0.5, top_k=2, top_p=0.5, min_p=0.1)
    sampler = Sampler(params, [0, 1])
    with pytest.raises(LogitsError, match=r"^logits: the largest of \d is (nan|inf|-inf), [^\n]*$") as caught:
        sampler.sample(logits)
    assert isinstance(caught.value, LlmEdgeError)
    assert sampler.generated == ()


@pytest.mark.parametrize("shape", [(0,), (1, 4), ()])
def test_anything_but_a_vector_of_logits_is_rejected(shape: tuple[int, ...]) -> None:
    with pytest.raises(ParameterError, match=r"logits: \(.*\) is not allowed, give one row of logits"):
        Sampler(SamplingParams(), []).sample(np.zeros(shape, np.float32))


def test_extreme_but_allowed_values_draw_a_token() -> None:
    for combination in (
        {"temperature": 1.1e-5},
        {"temperature": 100},
        {"min_p": 1e-300},
        {"repetition_penalty": 100},
    ):
        params = SamplingParams(seed=0, **combination)
        assert 0 <= Sampler(params, [0]).sample(row(1e4, -1e30, -3e38, -math.inf)) < 3


def test_a_negative_prompt_token_is_rejected() -> None:
    with pytest.raises(ParameterError, match="prompt_tokens: -1 is not allowed, give token ids of 0 or more"):
        Sampler(SamplingParams(), [3, -1])


# --- processors ---------------------------------------------------------------------------------------------


def banning(*ids: int) -> Callable[[Row, Sequence[int]], Row]:
    def process(row: Row, tokens: Sequence[int]) -> Row:
        out = row.copy()
        out[[*ids]] = -np.inf
        return out

    return process


@pytest.mark.parametrize("params", [SamplingParams(temperature=0), SamplingParams(seed=1), SamplingParams(top_p=0.9)])
def test_tokens_banned_by_a_processor_are_not_drawn(params: SamplingParams) -> None:
    logits = row(9.0, 8.0, 7.0, 1.0)
    sampler = Sampler(params, [0], [banning(0), banning(2)])
    assert {sampler.sample(logits) for _ in range(50)} <= {1, 3}
    assert list(logits) == [9.0, 8.0, 7.0, 1.0]


def test_processors_run_before_the_penalties_and_see_all_tokens() -> None:
    seen: list[list[int]] = []

    def process(logits: Row, tokens: Sequence[int]) -> Row:
        seen.append(list(tokens))
        return row(0.0, 0.0, 4.0, 3.9)

    params = SamplingParams(temperature=0, repetition_penalty=2, repetition_window=-1)
    sampler = Sampler(params, [1], [process])
    assert [sampler.sample(row(9.0, 0.0, 0.0, 0.0)) for _ in range(3)] == [2, 3, 2]
    assert seen == [[1], [1, 2], [1, 2, 3]]


def test_a_processor_that_bans_everything_is_ignored() -> None:
    sampler = Sampler(SamplingParams(temperature=0), [0], [banning(1), banning(0, 2), banning(2)])
    assert sampler.sample(row(1.0, 9.0, 2.0)) == 0  # the second would ban everything that the first allows
    with pytest.raises(LogitsError):
        Sampler(SamplingParams(temperature=0), [0], [banning(0)]).sample(row(-math.inf, -math.inf))


def test_nan_logits_from_a_processor_are_rejected() -> None:
    with pytest.raises(LogitsError):
        Sampler(SamplingParams(), [0], [banning(0)]).sample(row(1.0, math.nan, 2.0))


# --- parameters ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "values", "wanted"),
    [
        (
            "temperature",
            [-0.1, 100.1, math.nan, math.inf, "1", None, True, 10**400],
            "a number from 0.0 to 100.0",
        ),
        ("top_p", [-0.1, 1.1, math.nan, False, [0.5]], "a number from 0.0 to 1.0"),
        ("min_p", [-0.1, 1.1, math.nan, "0"], "a number from 0.0 to 1.0"),
        ("repetition_penalty", [0, 0.0, -1.0, 101, math.inf, math.nan], "a number from 0.01 to 100.0"),
        ("presence_penalty", [-2.1, 2.1, math.nan, None], "a number from -2.0 to 2.0"),
        ("frequency_penalty", [-2.1, 2.1, -math.inf], "a number from -2.0 to 2.0"),
        ("top_k", [-1, 2.0, True, "5", None, 2**31], "an integer from 0 to 2147483647"),
        ("repetition_window", [-2, 1.5, False], "an integer from -1 to 2147483647"),
        ("max_tokens", [0, -5, 1.0, True, None], "an integer from 1 to 2147483647"),
        ("seed", [-1, 2**64, 1.0, True, "x"], "an integer from 0 to 18446744073709551615"),
        (
            "stop",
            ["", ("a", ""), (1,), None, 5, {"a"}, b"x", ["two\nlines", ""]],
            "a list of strings, none of them empty",
        ),
        ("stop_token_ids", [(-1,), (True,), (1.0,), 5, "12", None], "a list of integers of 0 or more"),
        ("max_newlines", [-1, 2.0, True, "2", 2**31], "an integer from 0 to 2147483647"),
        ("single_think_end", [0, 1, "true", None], "true or false"),
        (
            "logit_bias",
            [
                *({1: 100.1}, {-1: 1}, {"x": 1}, {"9" * 5000: 1}, {"٣": 1}, {1: math.nan}, {1: True}, {True: 1}),
                *({1.0: 1}, {1: "1"}, 5, None, "12", [1, 2], [(1, 2, 3)], [([], 1)], [None]),
            ],
            "a mapping of token ids of 0 or more to numbers from -100.0 to 100.0",
        ),
        ("banned_tokens", [(-1,), (True,), (1.0,), 5, "12", None], "a list of integers of 0 or more"),
        ("min_tokens", [-1, 1.0, True, None], "an integer from 0 to 2147483647"),
        ("no_repeat_ngram", [-1, 65, 2.0, False], "an integer from 0 to 64"),
        ("dry_multiplier", [-0.1, 101, math.inf, None], "a number from 0.0 to 100.0"),
        ("dry_base", [0.99, 10.1, math.nan, "2"], "a number from 1.0 to 10.0"),
        ("dry_allowed_length", [0, 65, 2.5, True], "an integer from 1 to 64"),
        ("dry_range", [-2, 1.5, None], "an integer from -1 to 2147483647"),
        ("dry_breakers", ["", ("a", ""), (1,), None], "a list of strings, none of them empty"),
        ("mirostat_tau", [-1, 101, math.nan, None], "a number from 0.0 to 100.0"),
        ("mirostat_eta", [-0.1, 1.1, math.inf], "a number from 0.0 to 1.0"),
        ("top_n_sigma", [-0.1, 100.1, math.nan, "1"], "a number from 0.0 to 100.0"),
        ("typical_p", [-0.1, 1.1, math.nan, True], "a number from 0.0 to 1.0"),
        ("xtc_probability", [-0.1, 1.1, None], "a number from 0.0 to 1.0"),
        ("xtc_threshold", [-0.1, 1.1, [0.1]], "a number from 0.0 to 1.0"),
        ("logprobs", [-1, 21, 1.0, True, "5"], "an integer from 0 to 20"),
    ],
)
def test_values_out_of_range_are_rejected_in_one_line(field: str, values: list[object], wanted: str) -> None:
    for value in values:
        with pytest.raises(ParameterError) as caught:
            SamplingParams(**{field: value})  # type: ignore[arg-type]
        message = str(caught.value)
        assert message.startswith(f"{field}: ")
        assert message.endswith(f" is not allowed, give {wanted}")
        assert "\n" not in message
        assert len(message) < 200


@pytest.mark.parametrize(
    ("field", "values"),
    [
        ("temperature", [0, 100]),
        ("top_p", [0, 1]),
        ("min_p", [0, 1]),
        ("repetition_penalty", [0.01, 100]),
        ("presence_penalty", [-2, 2]),
        ("frequency_penalty", [-2, 2]),
        ("top_k", [0, 2**31 - 1]),
        ("repetition_window", [-1, 0, 2**31 - 1]),
        ("max_tokens", [1, 2**31 - 1]),
        ("seed", [None, 0, 2**64 - 1]),
        ("max_newlines", [0, 2**31 - 1]),
        ("single_think_end", [False, True]),
        ("min_tokens", [0, 2**31 - 1]),
        ("no_repeat_ngram", [0, 1, 64]),
        ("dry_multiplier", [0, 100]),
        ("dry_base", [1, 10]),
        ("dry_allowed_length", [1, 64]),
        ("dry_range", [-1, 0, 2**31 - 1]),
        ("mirostat_tau", [0, 100]),
        ("mirostat_eta", [0, 1]),
        ("top_n_sigma", [0, 100]),
        ("typical_p", [0, 1]),
        ("xtc_probability", [0, 1]),
        ("xtc_threshold", [0, 1]),
        ("logprobs", [None, 0, 20]),
    ],
)
def test_the_limits_of_every_range_are_allowed_and_work(field: str, values: list[Any]) -> None:
    for value in values:
        params = SamplingParams(**{field: value})
        assert getattr(params, field) == value
        assert 0 <= Sampler(params, [0, 1]).sample(row(0.0, 1.0, 2.0, 3.0)) < 4


def test_parameters_are_normalised_and_frozen() -> None:
    params = SamplingParams(temperature=1, stop="end", stop_token_ids=[1, 2])  # type: ignore[arg-type]
    assert params == SamplingParams(temperature=1.0, stop=("end",), stop_token_ids=(1, 2))
    assert type(params.temperature) is float
    assert SamplingParams(stop=["a", "b"]).stop == ("a", "b")  # type: ignore[arg-type]
    assert hash(params)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.top_k = 3  # type: ignore[misc]
    with pytest.raises(ParameterError):
        dataclasses.replace(params, top_k=-1)


def test_default_values() -> None:
    assert dataclasses.asdict(SamplingParams()) == {
        "max_newlines": 0,
        "single_think_end": False,
        "logit_bias": (),
        "banned_tokens": (),
        "banned_first_tokens": (),
        "min_tokens": 0,
        "no_repeat_ngram": 0,
        "repetition_penalty": 1.0,
        "repetition_window": 64,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "dry_multiplier": 0.0,
        "dry_base": 1.75,
        "dry_allowed_length": 2,
        "dry_range": -1,
        "dry_breakers": ("\n", ":", '"', "*"),
        "temperature": 1.0,
        "mirostat_tau": 0.0,
        "mirostat_eta": 0.1,
        "top_n_sigma": 0.0,
        "top_k": 0,
        "top_p": 1.0,
        "min_p": 0.0,
        "typical_p": 1.0,
        "epsilon_cutoff": 0.0,
        "eta_cutoff": 0.0,
        "xtc_probability": 0.0,
        "xtc_threshold": 0.1,
        "seed": None,
        "max_tokens": 512,
        "stop": (),
        "stop_token_ids": (),
        "constraint": None,
        "reasoning_budget": None,
        "logprobs": None,
    }
