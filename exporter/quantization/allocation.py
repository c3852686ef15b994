"""Chooses a format for each weight: the most faithful mix within a size, or the fastest within a divergence."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llm_edge.exporter.quantization.formats.base import WeightFormat

_LARGE = 0.05  # of a model: the formats of a larger weight are no small steps, so that all of them are tried
_LARGE_WEIGHTS = 2  # at most: the embedding and the head
_SPEED_FRACTION = 0.05  # of the divergence that is given up for speed
_SAME_SIZE = 0.99  # of the size of another format


@dataclass(frozen=True, slots=True)
class Option:
    """A format of a weight, and what it costs.

    Attributes:
        format: the format.
        bytes: size on disk.
        divergence: share of the mean KL divergence from the unquantized model, in nats.
        q8_shares: the same by kind of text, relative to the divergence of all weights in Q8_0: a mix whose shares add
            up to less than 1 loses less than Q8_0 on that kind of text.
        cost: time of a prefill; see `WeightFormat.prefill_cost`.
    """

    format: WeightFormat
    bytes: int
    divergence: float
    q8_shares: tuple[float, ...]
    cost: float


Options = Mapping[str, Sequence[Option]]
"""By module path."""
Mix = dict[str, Option]
"""A choice by module path."""


def most_faithful(options: Options, max_bytes: float) -> Mix:
    """Return the mix with the least divergence within a size, or the smallest one.

    It may have a little more if that makes it faster at the same size.
    """
    return _make_faster(_best_within(options, max_bytes), options)


def _best_within(options: Options, max_bytes: float) -> Mix:
    """Return the mix with the least divergence within a size, or the smallest one."""
    least = {module: min(option.bytes for option in each) for module, each in options.items()}
    largest = sorted(least, key=lambda module: -least[module])[:_LARGE_WEIGHTS]
    large = [module for module in largest if least[module] > _LARGE * sum(least.values())]
    mixes = []
    for chosen in itertools.product(*(options[module] for module in large)):
        fixed = {module: [option] for module, option in zip(large, chosen, strict=True)}
        mixes.append(_allocate({**options, **fixed}, _divergence, _bytes, max_bytes))
    return min(mixes, key=lambda mix: (max(_total(mix, _bytes), max_bytes), _total(mix, _divergence)))


def _make_faster(mix: Mix, options: Options) -> Mix:
    """Replace formats by faster ones of the same size, as long as the divergence rises by a small fraction."""
    left = _SPEED_FRACTION * _total(mix, _divergence)
    steps = [
        (option.divergence - mix[module].divergence, module, option)
        for module, each in options.items()
        for option in each
        if option.cost < mix[module].cost and _SAME_SIZE * mix[module].bytes <= option.bytes <= mix[module].bytes
    ]
    faster, spent = dict(mix), dict.fromkeys(mix, 0.0)
    for more, module, option in sorted(steps, key=lambda step: step[0]):
        if more - spent[module] <= left and option.cost < faster[module].cost:
            left -= more - spent[module]
            faster[module], spent[module] = option, more
    return faster


def fastest(options: Options, max_q8_share: float) -> Mix:
    """Return the fastest mix within a share of Q8_0's divergence on each kind of text, or the most faithful one.

    The fastest mix of all is made slower step by step, each the one that gains most per time on the kind of text that
    is worst at the moment.
    """
    mix = {
        module: min(each, key=lambda option: (option.cost, sum(option.q8_shares))) for module, each in options.items()
    }
    while True:
        totals = [sum(shares) for shares in zip(*(option.q8_shares for option in mix.values()), strict=True)]
        worst = max(range(len(totals)), key=totals.__getitem__)
        if totals[worst] <= max_q8_share:
            return mix
        steps = []
        for module, each in options.items():
            now = mix[module]
            for option in each:
                gained, lost = now.q8_shares[worst] - option.q8_shares[worst], option.cost - now.cost
                if gained > 0 and lost > 0:
                    steps.append((gained / lost, module, option))
        if not steps:
            return {module: min(each, key=lambda option: sum(option.q8_shares)) for module, each in options.items()}
        _, module, option = max(steps, key=lambda step: step[0])
        mix[module] = option


def smallest(options: Options, max_divergence: float) -> Mix:
    """Return the smallest mix within a divergence, or the most faithful one."""
    return _allocate(options, _bytes, _divergence, max_divergence)


def frontier(options: Options, points: int = 16) -> list[tuple[int, float]]:
    """Return bytes and divergence of the most faithful mixes between the smallest and the largest."""
    sizes = [[option.bytes for option in _hull(each, _divergence, _bytes)] for each in options.values()]
    low, high = sum(map(min, sizes)), sum(map(max, sizes))
    mixes = [_best_within(options, low + (high - low) * point / (points - 1)) for point in range(points)]
    found = {_total(mix, _bytes): _total(mix, _divergence) for mix in mixes}
    return [(round(size), divergence) for size, divergence in found.items()]


_Measure = Callable[[Option], float]


def _bytes(option: Option) -> float:
    return option.bytes


def _divergence(option: Option) -> float:
    return option.divergence


def _total(mix: Mix, measure: _Measure) -> float:
    return sum(map(measure, mix.values()))


def _allocate(options: Options, loss: _Measure, resource: _Measure, limit: float) -> Mix:
    """Minimize the total loss within a total resource: a knapsack with one choice per module.

    Each module starts with the option that needs least. On the lower convex hull of its options, the steps to the next
    ones gain ever less per resource, so that taking all steps in the order of their gain follows the Lagrangian
    optimum (Everett, 1963); a step that does not fit is skipped, with all later ones of its module.
    """
    hulls = {module: _hull(each, loss, resource) for module, each in options.items()}
    mix = {module: hull[0] for module, hull in hulls.items()}
    left = limit - sum(map(resource, mix.values()))
    steps = [
        (_gain(before, after, loss, resource), module, after)
        for module, hull in hulls.items()
        for before, after in itertools.pairwise(hull)
    ]
    steps.sort(key=lambda step: -step[0])
    full = set()
    for _, module, after in steps:
        needed = resource(after) - resource(mix[module])
        if module in full or needed > left:
            full.add(module)
            continue
        left -= needed
        mix[module] = after
    return mix


def _hull(options: Sequence[Option], loss: _Measure, resource: _Measure) -> list[Option]:
    """Return the options on the lower convex hull, by resource; the first one needs least."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda option: (resource(option), loss(option))):
        if hull and loss(option) >= loss(hull[-1]):
            continue
        while len(hull) > 1 and _gain(hull[-1], option, loss, resource) >= _gain(hull[-2], hull[-1], loss, resource):
            hull.pop()
        hull.append(option)
    return hull


def _gain(before: Option, after: Option, loss: _Measure, resource: _Measure) -> float:
    """Return the loss that a step saves per resource."""
    return (loss(before) - loss(after)) / max(resource(after) - resource(before), 1e-30)
