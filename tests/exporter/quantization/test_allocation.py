"""The choice of a format for each weight, against every possible choice."""

from __future__ import annotations

import itertools
import math
import random
from functools import partial

import pytest

from llm_edge.exporter.quantization.allocation import Mix, Option, Options, fastest, frontier, most_faithful, smallest
from llm_edge.exporter.quantization.formats.blocks import Blocks
from llm_edge.exporter.quantization.formats.int8_static import Int8Static

KINDS = 3  # of text
FORMATS = (Blocks(4, 128, False), Blocks(4, 32, False), Int8Static(), Int8Static(activation_bits=16))


def some_options(seed: int, modules: int = 6) -> Options:
    """Larger formats are more faithful on average, but not always."""
    rng = random.Random(seed)
    found = {}
    for number in range(modules):
        weights, scale = rng.randrange(100, 1000), rng.random()
        found[f"layers.{number}.mlp.down"] = [
            Option(
                each,
                round(weights * size),
                scale * 4**-size * rng.uniform(0.5, 2),
                tuple(scale * 4**-size * rng.uniform(0.5, 2) for _ in range(KINDS)),
                weights * time,
            )
            for each, size, time in zip(FORMATS, (0.53, 0.64, 1.0, 1.0), (3, 3, 1, 2), strict=True)
        ]
    return found


def total(mix: Mix, field: str) -> float:
    return sum(getattr(option, field) for option in mix.values())


def share(mix: Mix) -> float:
    """On the kind of text where it is largest."""
    return max(sum(option.q8_shares[kind] for option in mix.values()) for kind in range(KINDS))


def all_mixes(options: Options) -> list[Mix]:
    return [dict(zip(options, chosen, strict=True)) for chosen in itertools.product(*options.values())]


@pytest.mark.parametrize("seed", range(8))
def test_mixes_keep_to_their_limit_and_are_nearly_the_best_possible(seed: int) -> None:
    options = some_options(seed)
    mixes = all_mixes(options)
    for choose, limited, field in (
        (most_faithful, partial(total, field="bytes"), "divergence"),
        (fastest, share, "cost"),
        (smallest, partial(total, field="divergence"), "bytes"),
    ):
        values = sorted(map(limited, mixes))
        for limit in (values[len(values) // 8], values[len(values) // 2], values[-1]):
            mix = choose(options, limit)
            best = min(total(each, field) for each in mixes if limited(each) <= limit)
            step = max(
                max(getattr(each, field) for each in formats) - min(getattr(each, field) for each in formats)
                for formats in options.values()
            )
            assert limited(mix) <= limit
            assert total(mix, field) <= best + step  # a knapsack solved by multipliers: one step from the optimum


@pytest.mark.parametrize("seed", range(8))
def test_the_format_of_a_weight_as_large_as_all_others_is_not_left_to_the_order_of_steps(seed: int) -> None:
    options = dict(some_options(seed, 5))
    size = sum(max(each.bytes for each in formats) for formats in options.values())
    options["lm_head"] = [
        Option(each, round(size * bits), divergence, (divergence,) * KINDS, 3.0)
        for each, bits, divergence in zip(FORMATS[:3], (0.5, 0.6, 1.0), (0.3, 0.2, 0.01), strict=True)
    ]
    mixes = all_mixes(options)
    for part in range(1, 8):
        low, high = (choose(total(mix, "bytes") for mix in mixes) for choose in (min, max))
        limit = low + (high - low) * part / 8
        found = total(most_faithful(options, limit), "divergence")
        best = min(total(mix, "divergence") for mix in mixes if total(mix, "bytes") <= limit)
        small = max(
            max(each.divergence for each in formats) - min(each.divergence for each in formats)
            for module, formats in options.items()
            if module != "lm_head"
        )
        assert found <= 1.05 * best + small


def test_a_faster_format_of_the_same_size_is_taken_if_it_is_nearly_as_faithful() -> None:
    accurate, fast = Int8Static(activation_bits=16), Int8Static()

    def choices(slower: float, faster: float) -> list[Option]:
        return [Option(accurate, 100, slower, (slower,), 2.0), Option(fast, 100, faster, (faster,), 1.0)]

    options = {"layers.0.mlp.down": choices(1.0, 1.02), "layers.0.mlp.up": choices(1.0, 1.5)}
    mix = most_faithful(options, 200)
    assert [mix[module].format for module in options] == [fast, accurate]


def test_the_mix_that_needs_least_is_the_answer_to_an_impossible_limit() -> None:
    options = some_options(0)
    mixes = all_mixes(options)
    assert total(most_faithful(options, 0), "bytes") == min(total(mix, "bytes") for mix in mixes)
    assert share(fastest(options, 0)) <= 1.1 * min(map(share, mixes))


def test_without_a_limit_weights_have_their_best_formats_or_nearly() -> None:
    options = some_options(1)
    best = sum(min(each.divergence for each in formats) for formats in options.values())
    assert best <= total(most_faithful(options, math.inf), "divergence") <= 1.05 * best


def test_the_frontier_loses_divergence_as_it_grows() -> None:
    points = frontier(some_options(2))
    assert len(points) > 5
    for (small, less_faithful), (large, more_faithful) in itertools.pairwise(points):
        assert small < large
        assert less_faithful > more_faithful
