"""The choice of a format for each weight, against every possible choice."""

from __future__ import annotations

import itertools
import math
import random

import pytest

from llm_edge.exporter.quantization.allocation import Mix, Option, Options, fastest, frontier, most_faithful, smallest
from llm_edge.exporter.quantization.formats.blocks import Blocks
from llm_edge.exporter.quantization.formats.int8_static import Int8Static

FORMATS = (Blocks(4, 128, False), Blocks(4, 32, False), Int8Static(), Int8Static(activation_bits=16))


def some_options(seed: int, modules: int = 6) -> Options:
    """Larger formats are more faithful on average, but not always."""
    rng = random.Random(seed)
    found = {}
    for number in range(modules):
        weights, scale = rng.randrange(100, 1000), rng.random()
        found[f"layers.{number}.mlp.down"] = [
            Option(each, round(weights * size), scale * 4**-size * rng.uniform(0.5, 2), weights * time)
            for each, size, time in zip(FORMATS, (0.53, 0.64, 1.0, 1.0), (3, 3, 1, 2), strict=True)
        ]
    return found


def total(mix: Mix, field: str) -> float:
    return sum(getattr(option, field) for option in mix.values())


def all_mixes(options: Options) -> list[Mix]:
    return [dict(zip(options, chosen, strict=True)) for chosen in itertools.product(*options.values())]


@pytest.mark.parametrize("seed", range(8))
def test_mixes_keep_to_their_limit_and_are_nearly_the_best_possible(seed: int) -> None:
    options = some_options(seed)
    mixes = all_mixes(options)
    for choose, limit_field, field in (
        (most_faithful, "bytes", "divergence"),
        (fastest, "divergence", "cost"),
        (smallest, "divergence", "bytes"),
    ):
        values = sorted(total(mix, limit_field) for mix in mixes)
        for limit in (values[len(values) // 8], values[len(values) // 2], values[-1]):
            mix = choose(options, limit)
            best = min(total(each, field) for each in mixes if total(each, limit_field) <= limit)
            step = max(
                max(getattr(each, field) for each in formats) - min(getattr(each, field) for each in formats)
                for formats in options.values()
            )
            assert total(mix, limit_field) <= limit
            assert total(mix, field) <= best + step  # a knapsack solved by multipliers: one step from the optimum


def test_the_mix_that_needs_least_is_the_answer_to_an_impossible_limit() -> None:
    options = some_options(0)
    mixes = all_mixes(options)
    assert total(most_faithful(options, 0), "bytes") == min(total(mix, "bytes") for mix in mixes)
    assert total(fastest(options, 0), "divergence") == min(total(mix, "divergence") for mix in mixes)


def test_without_a_limit_each_weight_has_its_best_format() -> None:
    options = some_options(1)
    for module, option in most_faithful(options, math.inf).items():
        assert option.divergence == min(each.divergence for each in options[module])


def test_the_frontier_loses_divergence_as_it_grows() -> None:
    points = frontier(some_options(2))
    assert len(points) > 5
    for (small, less_faithful), (large, more_faithful) in itertools.pairwise(points):
        assert small < large
        assert less_faithful > more_faithful
