"""Less common transforms, each compared with transformers or with a literal float64 implementation."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from test_sampler import ids, logit_samples, logs, row
from transformers.generation.logits_process import EpsilonLogitsWarper, EtaLogitsWarper, TypicalLogitsWarper

from llm_edge.runtime.errors import ParameterError
from llm_edge.runtime.sampling import transforms
from llm_edge.runtime.sampling.logprobs import log_probabilities
from llm_edge.runtime.sampling.params import SamplingParams
from llm_edge.runtime.sampling.sampler import Sampler
from llm_edge.runtime.sampling.transforms import Row


def probabilities(logits: Row) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


SIZES = [1, 2, 4, 50, 1000, 50_257]


# --- changes ------------------------------------------------------------------------------------------------


def test_add_adds_and_skips_ids_without_a_logit() -> None:
    given = row(1.0, -math.inf, 3.0)
    assert transforms.add(given, ids(0, 1, 3), row(-2.0, 5.0, 7.0)).tolist() == [-1.0, -math.inf, 3.0]
    assert given[0] == 1.0


def test_without_masks_tokens_and_returns_the_same_array_if_nothing_changes() -> None:
    given = row(1.0, 2.0, 3.0)
    assert transforms.mask_tokens(given, ids(2, 0, 3, 99)).tolist() == [-math.inf, 2.0, -math.inf]
    assert transforms.mask_tokens(given, ids(3)) is given
    assert transforms.mask_tokens(given, ids()) is given


def test_dry_grows_with_the_repetition_up_to_its_limit() -> None:
    out = transforms.dry(row(0, 0, 0, 0), ids(1, 0, 2, 9), np.array([5, 2, 60, 3]), 0.5, 2.0, 2)
    assert out.tolist() == [-0.5, -4.0, -transforms.MAX_DRY, 0.0]


# --- filters ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "kept"), [(0.0, [3]), (0.5, [3]), (1.0, [2, 3]), (2.0, [0, 2, 3]), (3.0, [0, 1, 2, 3])])
def test_top_n_sigma_counts_standard_deviations_below_the_maximum(n: float, kept: list[int]) -> None:
    # The finite logits have mean 3 and standard deviation 2.236.
    assert transforms.keep_top_n_sigma(row(2.0, 0.0, 4.0, 6.0), n).tolist() == kept


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("n", [0.3, 1.0, 2.7])
def test_top_n_sigma_matches_its_definition(size: int, n: float) -> None:
    for logits in logit_samples(size, seed=size):
        exact = logits.astype(np.float64)
        finite = exact[exact > -np.inf]
        sigma = math.sqrt(sum((finite - finite.sum() / finite.size) ** 2) / finite.size)
        assert np.array_equal(transforms.keep_top_n_sigma(logits, n), np.flatnonzero(exact >= exact.max() - n * sigma))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("p", [1e-3, 0.2003, 0.5003, 0.9003, 0.9953])
def test_typical_matches_transformers(size: int, p: float) -> None:
    for seed in range(3 if size < 2000 else 1):
        for logits in logit_samples(size, seed):
            scores = TypicalLogitsWarper(p)(torch.zeros(1, 1), torch.from_numpy(logits.copy())[None].double())
            expected = np.flatnonzero(scores[0].isfinite().numpy())
            kept = transforms.keep_typical(logits, p)
            assert np.array_equal(kept[np.isfinite(logits[kept])], expected)


def test_typical_may_drop_the_most_probable() -> None:
    # The mean surprise is 0.94 nats; those here are 0.36 (0.58 away) and 2.30 (1.36 away).
    assert transforms.keep_typical(logs(0.7, 0.1, 0.1, 0.1), 0.3).tolist() == [0]
    # The mean surprise is 2.06 nats; those here are 0.92 (1.14 away) and 2.81 (0.75 away).
    assert transforms.keep_typical(logs(0.4, *[0.06] * 10), 0.3).tolist() == list(range(1, 11))


@pytest.mark.parametrize("size", [1, 2, 300, 49_152])
@pytest.mark.parametrize("epsilon", [1e-6, 3e-4, 0.05, 0.9])
def test_epsilon_cutoff_matches_transformers(size: int, epsilon: float) -> None:
    for seed in range(3):
        for logits in logit_samples(size, seed):
            scores = EpsilonLogitsWarper(epsilon)(torch.zeros(1, 1), torch.from_numpy(logits.copy())[None].double())
            expected = np.flatnonzero(scores[0].isfinite().numpy())
            kept = transforms.keep_epsilon_cutoff(logits, epsilon)
            assert np.array_equal(kept[np.isfinite(logits[kept])], expected)


def test_epsilon_cutoff_keeps_at_least_the_most_probable_token() -> None:
    assert transforms.keep_epsilon_cutoff(logs(0.5, 0.125, 0.25, 0.125), 0.2).tolist() == [0, 2]
    assert transforms.keep_epsilon_cutoff(logs(0.4, 0.2, 0.4), 0.9).tolist() == [0, 2]
    sampler = Sampler(SamplingParams(epsilon_cutoff=0.2, seed=1), ())
    ids, _ = sampler.candidates(logs(0.5, 0.125, 0.25, 0.125))
    assert ids is not None
    assert ids.tolist() == [0, 2]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("eta", [3e-4, 2e-3, 0.05, 0.7])
def test_eta_cutoff_matches_transformers(size: int, eta: float) -> None:
    for seed in range(4):
        for logits in logit_samples(size, seed):
            scores = EtaLogitsWarper(eta)(torch.zeros(1, 1), torch.from_numpy(logits.copy())[None].double())
            expected = np.flatnonzero(scores[0].isfinite().numpy())
            kept = transforms.keep_eta_cutoff(logits, eta)
            assert np.array_equal(kept[np.isfinite(logits[kept])], expected)


@pytest.mark.parametrize(
    ("threshold", "kept"),
    [(0.0, [2]), (0.05, [2]), (0.1, [1, 2]), (0.15, [0, 1, 2]), (0.25, [0, 1, 2, 3]), (0.7, [0, 1, 2, 3])],
)
def test_xtc_keeps_only_the_least_probable_of_the_top_tokens(threshold: float, kept: list[int]) -> None:
    assert transforms.keep_xtc(logs(0.2, 0.12, 0.08, 0.6), threshold).tolist() == kept


def test_xtc_among_equals_keeps_the_last_drawable_token() -> None:
    assert transforms.keep_xtc(row(1.0, 1.0, 1.0, -9.0), 0.1).tolist() == [2, 3]
    assert transforms.keep_xtc(row(1.0, -math.inf, 0.0, -math.inf), 0.0).tolist() == [1, 2, 3]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("threshold", [0.0013, 0.013, 0.13])
def test_xtc_matches_its_definition(size: int, threshold: float) -> None:
    for logits in logit_samples(size, seed=size):
        p = probabilities(logits)
        # As llama.cpp: sorted by probability, all tokens above the threshold except the last are dropped.
        order = sorted(range(size), key=lambda position: -p[position])
        last = sum(p >= threshold) - 1
        expected = sorted(order[max(last, 0) :])
        assert transforms.keep_xtc(logits, threshold).tolist() == expected


@pytest.mark.parametrize(
    ("limit", "kept"), [(-1.0, [2]), (0.9, [2]), (1.1, [2]), (2.1, [1, 2]), (3.1, [0, 1, 2, 3]), (9.0, [0, 1, 2, 3])]
)
def test_mirostat_keeps_tokens_up_to_a_surprise_in_bits(limit: float, kept: list[int]) -> None:
    assert transforms.keep_mirostat(logs(0.125, 0.25, 0.5, 0.125), limit).tolist() == kept


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("limit", [0.203, 3.003, 7.7, 14.3])
def test_mirostat_matches_its_definition(size: int, limit: float) -> None:
    for logits in logit_samples(size, seed=size):
        p = probabilities(logits)
        with np.errstate(divide="ignore"):
            expected = (-np.log2(p) <= limit) | ((logits == logits.max()) & ~(-np.log2(p) <= limit).any())
        assert np.array_equal(transforms.keep_mirostat(logits, limit), np.flatnonzero(expected))


def test_surprise_is_in_bits() -> None:
    given = logs(0.125, 0.25, 0.5, 0.125)
    assert [transforms.surprise(given, i) for i in range(4)] == pytest.approx([3, 2, 1, 3], abs=1e-6)


# --- log-probabilities --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("top", [0, 1, 5, 20])
def test_log_probabilities_match_torch(size: int, top: int) -> None:
    for logits in logit_samples(size, seed=size):
        expected = torch.from_numpy(logits.copy()).double().log_softmax(dim=0)
        order = np.lexsort((np.arange(size), -logits.astype(np.float64)))[:top]
        for token in (0, size // 2, size - 1):
            found = log_probabilities(logits, token, top)
            assert found.token == token
            assert found.logprob == pytest.approx(float(expected[token]), rel=2e-7, abs=2e-6)
            assert [i for i, _ in found.top] == order.tolist()
            assert [x for _, x in found.top] == pytest.approx(expected[order].tolist(), rel=2e-7, abs=2e-6)
            if token in order:
                assert (token, found.logprob) in found.top


def test_log_probabilities_are_python_floats_and_logits_are_not_modified() -> None:
    logits = row(1.0, 2.0, 3.0)
    logits.setflags(write=False)
    found = log_probabilities(logits, 2, 1)
    assert repr(found).startswith("TokenLogprob(token=2, logprob=-0.40760")
    assert type(found.logprob) is type(found.top[0][1]) is float
    assert type(found.top[0][0]) is int


@pytest.mark.parametrize("token", [-1, 3, 10**30])
def test_a_token_without_a_logit_has_no_log_probability(token: int) -> None:
    with pytest.raises(ParameterError, match=f"^token: {token} is not allowed, give a token within logits of shape"):
        log_probabilities(row(1.0, 2.0, 3.0), token, 0)
