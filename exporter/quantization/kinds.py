"""Means over the positions of a text, and over those of each kind of text."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_edge.exporter.texts import Window

_LARGEST = 1e6


@dataclass(frozen=True, slots=True)
class Means:
    """Means of a number.

    Attributes:
        whole: over all positions.
        kinds: over the positions of each kind of text, in the order of the text.
    """

    whole: float
    kinds: tuple[float, ...]

    def __add__(self, other: Means) -> Means:
        return Means(self.whole + other.whole, tuple(map(sum, zip(self.kinds, other.kinds, strict=True))))

    def to_list(self) -> list[float]:
        """Return all means as they are stored in the journal."""
        return [self.whole, *self.kinds]

    @staticmethod
    def from_list(values: Sequence[float]) -> Means:
        """Reverse `to_list`."""
        return Means(values[0], tuple(values[1:]))

    def scaled(self, factor: float) -> Means:
        """Return the means of the number times a factor."""
        return Means(factor * self.whole, tuple(factor * mean for mean in self.kinds))

    def relative_to(self, other: Means) -> tuple[float, ...]:
        """Return the ratio to the means of another number for each kind of text."""
        return tuple(mean / max(base, 1e-30) for mean, base in zip(self.kinds, other.kinds, strict=True))


def finite(values: Tensor) -> Tensor:
    """Return numbers in float64, with large ones instead of NaN and infinity, so that they can be added."""
    return values.double().nan_to_num(_LARGEST).clamp(-_LARGEST, _LARGEST)


class Positions:
    """The positions of windows, by kind of text."""

    def __init__(self, windows: Sequence[Window]) -> None:
        numbers = {kind: number for number, kind in enumerate(dict.fromkeys(window.kind for window in windows))}
        self._kinds = torch.tensor([numbers[window.kind] for window in windows for _ in window.tokens])
        self._counts = torch.bincount(self._kinds)

    def means(self, values: Tensor) -> Means:
        """Return the means of a number [S] at all positions."""
        values = finite(values)
        sums = torch.bincount(self._kinds, weights=values)
        return Means((sums.sum() / len(values)).item(), tuple((sums / self._counts).tolist()))
