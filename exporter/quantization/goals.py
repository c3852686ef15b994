"""What a calibrated precision is: which mix of formats is the best one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass

from llm_edge.exporter.quantization.allocation import Mix, Options, fastest, most_faithful, smallest
from llm_edge.exporter.quantization.gguf_sizes import gguf_bytes
from llm_edge.model.config import ModelConfig
from llm_edge.model.decoder import count_parameters


@dataclass(frozen=True, slots=True)
class Model:
    """What goals need to know of a model.

    Attributes:
        config: its shape.
        other_bytes: of the graph and of all weights that are not quantized.
        q8_0: mean KL divergence of all weights and activations rounded to Q8_0, in nats.
    """

    config: ModelConfig
    other_bytes: int
    q8_0: float


class Goal(ABC):
    """Chooses a mix of formats. Subclasses are frozen dataclasses."""

    @abstractmethod
    def choose(self, options: Options, model: Model) -> Mix:
        """Return the best mix."""


@dataclass(frozen=True, slots=True)
class AsSmallAs(Goal):
    """The most faithful mix that is not larger than a GGUF file of a type, `Q4_0` or `Q4_K_M`."""

    file_type: str

    def choose(self, options: Options, model: Model) -> Mix:
        return most_faithful(options, gguf_bytes(model.config, self.file_type) - model.other_bytes)

    def __str__(self) -> str:
        return f"the most faithful mix at the size of {self.file_type}"


@dataclass(frozen=True, slots=True)
class AsFaithfulAsQ8(Goal):
    """The fastest mix whose divergence is at most a fraction of Q8_0's."""

    fraction: float = 1.0

    def choose(self, options: Options, model: Model) -> Mix:
        return fastest(options, self.fraction * model.q8_0)

    def __str__(self) -> str:
        part = "" if self.fraction == 1 else f"{self.fraction:g} times "
        return f"the fastest mix with {part}the divergence of Q8_0"


@dataclass(frozen=True, slots=True)
class MaxSize(Goal):
    """The most faithful mix of at most this many bytes."""

    bytes: int

    def choose(self, options: Options, model: Model) -> Mix:
        return most_faithful(options, self.bytes - model.other_bytes)

    def __str__(self) -> str:
        return f"the most faithful mix of {self.bytes / 1e6:.0f} MB"


@dataclass(frozen=True, slots=True)
class MaxBitsPerWeight(Goal):
    """The most faithful mix of at most this many bits per weight on average."""

    bits: float

    def choose(self, options: Options, model: Model) -> Mix:
        return most_faithful(options, self.bits / 8 * count_parameters(model.config) - model.other_bytes)

    def __str__(self) -> str:
        return f"the most faithful mix of {self.bits:g} bits per weight"


@dataclass(frozen=True, slots=True)
class MaxDivergence(Goal):
    """The smallest mix with at most this mean KL divergence, in nats."""

    divergence: float

    def choose(self, options: Options, model: Model) -> Mix:  # noqa: ARG002 (the divergence does not depend on it)
        return smallest(options, self.divergence)

    def __str__(self) -> str:
        return f"the smallest mix with a mean KL divergence of {self.divergence:g}"
