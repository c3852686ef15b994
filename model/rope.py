"""Rotary position embeddings (RoPE, arXiv:2104.09864) in half-split form, with the scalings that checkpoints use."""

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
class FrequencyDivisors:
    """Each frequency divided by its own factor, the form in which GGUF stores llama3 scaling (`rope_freqs.weight`)."""

    factors: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class Llama3Scaling:
    """Llama 3.1: low frequencies are divided by `factor`, high ones kept, those between interpolated.

    Attributes:
        factor: divisor of the low frequencies.
        low_freq_factor: a frequency is low if fewer periods than this fit into `original_length`.
        high_freq_factor: a frequency is high if more periods than this fit into `original_length`.
        original_length: context length of pre-training, in tokens.
    """

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_length: int


@dataclass(frozen=True, slots=True)
class YarnScaling:
    """YaRN (arXiv:2309.00071): low frequencies are divided by `factor`, high ones kept, with a linear ramp between.

    Attributes:
        factor: divisor of the low frequencies.
        original_length: context length of pre-training, in tokens.
        beta_fast: rotations within `original_length` at the high-frequency end of the ramp.
        beta_slow: rotations within `original_length` at the low-frequency end of the ramp.
        amplitude: factor of cosines and sines.
        truncate: whether the ends of the ramp are rounded to whole dimensions.
    """

    factor: float
    original_length: int
    beta_fast: float
    beta_slow: float
    amplitude: float
    truncate: bool


@dataclass(frozen=True, slots=True)
class LongRopeScaling:
    """LongRoPE (arXiv:2402.13753): one set of frequency divisors up to `original_length` tokens, another beyond.

    As in transformers, the length of the whole sequence selects the set for all its positions.

    Attributes:
        short: divisors for sequences of at most `original_length` tokens.
        long: divisors for longer sequences.
        original_length: context length of pre-training, in tokens.
        amplitude: factor of cosines and sines.
    """

    short: tuple[float, ...]
    long: tuple[float, ...]
    original_length: int
    amplitude: float


RopeScaling = LinearScaling | FrequencyDivisors | Llama3Scaling | YarnScaling | LongRopeScaling


@dataclass(frozen=True, slots=True)
class Rope:
    """Rotary positions of a layer.

    Attributes:
        theta: base of the frequencies.
        dim: number of leading dimensions of each head that are rotated; even.
        scaling: scaling of the frequencies, or None.
    """

    theta: float
    dim: int
    scaling: RopeScaling | None = None

    @property
    def long_from(self) -> int:
        """Number of tokens above which the second half of the tables is used; 0 if the tables have no second half."""
        return self.scaling.original_length if isinstance(self.scaling, LongRopeScaling) else 0

    @property
    def amplitude(self) -> float:
        """Factor of cosines and sines."""
        return self.scaling.amplitude if isinstance(self.scaling, YarnScaling | LongRopeScaling) else 1.0

    def frequencies(self) -> Tensor:
        """Return the angles per position, float32 [1, dim / 2]; with `LongRopeScaling` [2, dim / 2], short and long."""
        exponents = torch.arange(0, self.dim, 2, dtype=torch.int64).float() / self.dim
        bases = self.theta**exponents
        frequencies = 1.0 / bases
        match self.scaling:
            case LinearScaling(factor):
                frequencies = frequencies / factor
            case FrequencyDivisors(factors):
                frequencies = frequencies / torch.tensor(factors)
            case Llama3Scaling():
                frequencies = _llama3(frequencies, self.scaling)
            case YarnScaling():
                frequencies = _yarn(bases, self.theta, self.dim, self.scaling)
            case LongRopeScaling(short, long):
                frequencies = torch.stack([1.0 / (torch.tensor(divisors) * bases) for divisors in (short, long)])
        return frequencies.reshape(-1, self.dim // 2)

    def tables(self, length: int) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of positions 0 to `length` - 1, both float32 [length, dim / 2].

        With `LongRopeScaling` they are [2 * length, dim / 2]: first for the short divisors, then for the long ones.
        """
        frequencies = self.frequencies()
        angles = torch.arange(length).float()[:, None] * frequencies[:, None]
        angles = angles.reshape(-1, self.dim // 2)
        # MKL selects its implementation of cos at the first call. If several threads make that call at once, some of
        # them compute different last bits (about once in a hundred processes), so it is made here on one element.
        torch.zeros(1).cos()
        return angles.cos() * self.amplitude, angles.sin() * self.amplitude


def _llama3(frequencies: Tensor, scaling: Llama3Scaling) -> Tensor:
    periods = scaling.original_length * frequencies / (2 * math.pi)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    kept = ((periods - low) / (high - low)).clamp(0, 1)  # 0 for low frequencies, 1 for high ones
    return frequencies * (kept + (1 - kept) / scaling.factor)


def _yarn(bases: Tensor, theta: float, dim: int, scaling: YarnScaling) -> Tensor:
    def dimension_of(rotations: float) -> float:
        """Dimension that makes this many rotations within the original context."""
        return dim * math.log(scaling.original_length / (rotations * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_of(scaling.beta_fast), dimension_of(scaling.beta_slow)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    ramp = (torch.arange(dim // 2).float() - low) / (high - low if high != low else 0.001)
    kept = 1 - ramp.clamp(0, 1)
    return (1.0 / (scaling.factor * bases)) * (1 - kept) + (1.0 / bases) * kept


def longrope_amplitude(factor: float, original_length: int) -> float:
    """Return LongRoPE's default amplitude for a context extended by `factor`."""
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original_length))


def yarn_amplitude(factor: float, scale: float = 1.0) -> float:
    """Return YaRN's default amplitude for a context extended by `factor`."""
    return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0
