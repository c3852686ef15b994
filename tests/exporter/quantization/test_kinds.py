"""Means by kind of text."""

from __future__ import annotations

import pytest
import torch

from llm_edge.exporter.quantization.kinds import Means, Positions
from llm_edge.exporter.texts import Window


def test_means_are_those_of_all_positions_of_a_kind() -> None:
    windows = [Window((1, 2), "code"), Window((3,), "chat"), Window((4, 5, 6), "code")]
    means = Positions(windows).means(torch.tensor([1.0, 2.0, 10.0, 3.0, 4.0, 5.0]))
    assert means.kinds == pytest.approx((3.0, 10.0))
    assert means.whole == pytest.approx(25 / 6)
    assert Means.from_list(means.to_list()) == means
    assert (means + means.scaled(2)).kinds == pytest.approx((9.0, 30.0))
    assert means.relative_to(Means(1.0, (6.0, 5.0))) == pytest.approx((0.5, 2.0))


def test_numbers_that_are_not_finite_count_as_large_ones() -> None:
    means = Positions([Window((1, 2), "code")]).means(torch.tensor([float("nan"), float("inf")]))
    assert 1e5 < means.whole < 1e7
