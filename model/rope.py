"""Rotary positions: the angles of every position, in all the ways checkpoints scale them. Knows no model.

RoFormer (arXiv:2104.09864) in half-split form. Each scaling changes the frequencies, and some of them also the
amplitude of cosines and sines.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LinearScaling:
    """Position interpolation (arXiv:2306.15595): every frequency divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True)
class DividedFrequencies:
    """Every frequency divided by a number of its own, as GGUF files keep llama3's scaling (`rope_freqs.weight`)."""

    factors: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1: long waves divided by `factor`, short ones left, those between interpolated.

    `original_length` is the context of pre-training, in tokens; a wave is long where fewer than `low_freq_factor` of
    them fit into it, and short where more than `high_freq_factor` do.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (arXiv:2309.00071): a ramp between dimensions that turn `beta_slow` and `beta_fast` times.

    `truncate` rounds the ramp's ends to whole dimensions; `amplitude` multiplies cosines and sines.
    """

    factor: float
    original_length: int
    beta_fast: float
    beta_slow: float
    amplitude: float
    truncate: bool


@dataclass(frozen=True, slots=True)
class LongScaling:
    """LongRoPE (arXiv:2402.13753): one set of divisors up to `original_length` tokens, another one for longer texts.

    As in transformers, the length of the whole text chooses, also for the tokens at its beginning.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_length: int
    amplitude: float


RopeScaling = LinearScaling | DividedFrequencies | Llama3Scaling | YarnScaling | LongScaling


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions of a layer.

    Attributes:
        theta: base of the frequencies.
        dim: how much of each head, from its beginning, is rotated; even.
        scaling: of the frequencies, or None.
    """

    theta: float
    dim: int
    scaling: RopeScaling | None = None

    @property
    def long_from(self) -> int:
        """Texts of more tokens than this use the second half of the tables; 0 where there is one half only."""
        return self.scaling.original_length if isinstance(self.scaling, LongScaling) else 0

    def tables(self, length: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines of positions 0 to `length` - 1, both float32 [length, dim / 2].

        With `LongScaling` they are [2 * length, dim / 2]: the short set, then the long one.
        """
        exponents = torch.arange(0, self.dim, 2, dtype=torch.int64).float() / self.dim
        bases = self.theta**exponents
        frequencies, amplitude = 1.0 / bases, 1.0
        match self.scaling:
            case LinearScaling(factor):
                frequencies = frequencies / factor
            case DividedFrequencies(factors):
                frequencies = frequencies / torch.tensor(factors)
            case Llama3Scaling():
                frequencies = _llama3(frequencies, self.scaling)
            case YarnScaling():
                frequencies = _yarn(bases, self.theta, self.dim, self.scaling)
                amplitude = self.scaling.amplitude
            case LongScaling(short, long):
                amplitude = self.scaling.amplitude
                frequencies = torch.stack([1.0 / (torch.tensor(divisors) * bases) for divisors in (short, long)])
        angles = torch.arange(length).float()[:, None] * frequencies.reshape(-1, 1, self.dim // 2)
        angles = angles.reshape(-1, self.dim // 2)
        # MKL chooses its code for such functions at the first call. Where several threads made that one, some of them
        # would, once in a hundred processes, compute other last bits.
        torch.zeros(1).cos()
        return angles.cos() * amplitude, angles.sin() * amplitude


def _llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    turns = scaling.original_length * frequencies / (2 * math.pi)  # in the context of pre-training
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    share = ((turns - low) / (high - low)).clamp(0, 1)  # 0 for long waves, 1 for short ones
    return frequencies * (share + (1 - share) / scaling.factor)


def _yarn(bases: Tensor, theta: float, dim: int, scaling: YarnScaling) -> Tensor:
    def dimension_of(turns: float) -> float:
        """The dimension that turns so often in the context of pre-training."""
        return dim * math.log(scaling.original_length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2).float() - low) / (high - low if high != low else 0.001)
    kept = 1 - ramp.clamp(0, 1)
    return (1.0 / (scaling.factor * bases)) * (1 - kept) + (1.0 / bases) * kept


def long_amplitude(factor: float, original_length: int) -> float:
    """LongRoPE's amplitude for a context stretched by `factor`."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original_length))


def yarn_amplitude(factor: float, scale: float = 1.0) -> float:
    """YaRN's amplitude for a context stretched by `factor`."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
