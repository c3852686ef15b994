"""Chooses a format for each weight: the most faithful mix within a size, or the fastest within a divergence."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from llm_edge.exporter.quantization.formats.base import WeightFormat


@dataclass(frozen=True, slots=True)
class Option:
    """A format of a weight, and what it costs.

    Attributes:
        format: the format.
        bytes: size on disk.
        divergence: share of the mean KL divergence from the unquantized model, in nats.
        cost: time of a prefill; see `WeightFormat.prefill_cost`.
    """

    format: WeightFormat
    bytes: int
    divergence: float
    cost: float


Options = Mapping[str, Sequence[Option]]
"""By module path."""
Mix = dict[str, Option]
"""A choice by module path."""


def most_faithful(options: Options, max_bytes: float) -> Mix:
    """Return the mix with the least divergence within a size, or the smallest one."""
    return _allocate(options, _divergence, _bytes, max_bytes)


def fastest(options: Options, max_divergence: float) -> Mix:
    """Return the fastest mix within a divergence, or the most faithful one."""
    return _allocate(options, lambda option: option.cost, _divergence, max_divergence)


def smallest(options: Options, max_divergence: float) -> Mix:
    """Return the smallest mix within a divergence, or the most faithful one."""
    return _allocate(options, _bytes, _divergence, max_divergence)


def frontier(options: Options, points: int = 16) -> list[tuple[int, float]]:
    """Return bytes and divergence of the most faithful mixes between the smallest and the largest."""
    sizes = [[option.bytes for option in _hull(each, _divergence, _bytes)] for each in options.values()]
    low, high = sum(map(min, sizes)), sum(map(max, sizes))
    mixes = [most_faithful(options, low + (high - low) * point / (points - 1)) for point in range(points)]
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
