"""What a calibrated precision is: which mix of formats is the best one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from llm_edge.exporter.quantization.allocation import Mix, Options, fastest, most_faithful, smallest
from llm_edge.exporter.quantization.gguf_sizes import gguf_bytes
from llm_edge.model.config import ModelConfig
from llm_edge.model.decoder import count_parameters
from llm_edge.runtime.errors import ParameterError


@dataclass(frozen=True, slots=True)
class MeasuredModel:
    """What goals need to know of a model.

    Attributes:
        config: its shape.
        other_bytes: of the graph and of all weights that are not quantized.
    """

    config: ModelConfig
    other_bytes: int


class Goal(ABC):
    """Chooses a mix of formats. Subclasses are frozen dataclasses."""

    @abstractmethod
    def choose(self, options: Options, model: MeasuredModel) -> Mix:
        """Return the best mix.

        Raises:
            ParameterError: no mix reaches what the user asked for.
        """


class SizeGoal(Goal):
    """The most faithful mix within a size.

    Attributes:
        option: of the command line that asks for the size; empty if the smallest mix will do.
    """

    option: ClassVar[str] = ""

    @abstractmethod
    def max_bytes(self, config: ModelConfig) -> float:
        """Return the size of all files."""

    def choose(self, options: Options, model: MeasuredModel) -> Mix:
        mix = most_faithful(options, self.max_bytes(model.config) - model.other_bytes)
        self.check(model.config, model.other_bytes + sum(option.bytes for option in mix.values()))
        return mix

    def check(self, config: ModelConfig, smallest: float) -> None:
        """Raise ParameterError if the smallest mix is larger than what the user asked for."""
        if self.option and smallest > self.max_bytes(config):
            bits = 8 * smallest / count_parameters(config)
            raise ParameterError(
                f"{self.option} is too small: the smallest mix of formats takes {smallest / 1e6:,.0f} MB, "
                f"{bits:.2f} bits per weight"
            )


@dataclass(frozen=True, slots=True)
class AsSmallAs(SizeGoal):
    """The most faithful mix that is not larger than a GGUF file of a type, `Q4_0` or `Q4_K_M`."""

    file_type: str

    def max_bytes(self, config: ModelConfig) -> float:
        return gguf_bytes(config, self.file_type)

    def __str__(self) -> str:
        return f"the most faithful mix at the size of {self.file_type}"


@dataclass(frozen=True, slots=True)
class MaxSize(SizeGoal):
    """The most faithful mix of at most this many bytes."""

    bytes: int

    option: ClassVar[str] = "--target-size"

    def max_bytes(self, config: ModelConfig) -> float:  # noqa: ARG002 (it does not depend on the model)
        return self.bytes

    def __str__(self) -> str:
        return f"the most faithful mix of {self.bytes / 1e6:g} MB"


@dataclass(frozen=True, slots=True)
class MaxBitsPerWeight(SizeGoal):
    """The most faithful mix of at most this many bits per weight on average."""

    bits: float

    option: ClassVar[str] = "--target-bpw"

    def max_bytes(self, config: ModelConfig) -> float:
        return self.bits / 8 * count_parameters(config)

    def __str__(self) -> str:
        return f"the most faithful mix of {self.bits:g} bits per weight"


@dataclass(frozen=True, slots=True)
class AsFaithfulAsQ8(Goal):
    """The fastest mix whose divergence is at most a fraction of Q8_0's.

    The default leaves a margin for texts on which 8-bit activations with fixed scales lose more than on average.
    """

    fraction: float = 0.9

    def choose(self, options: Options, model: MeasuredModel) -> Mix:  # noqa: ARG002 (shares do not depend on it)
        return fastest(options, self.fraction)

    def __str__(self) -> str:
        return f"the fastest mix with {self.fraction:g} times the divergence of Q8_0"


@dataclass(frozen=True, slots=True)
class MaxDivergence(Goal):
    """The smallest mix with at most this mean KL divergence, in nats."""

    divergence: float

    def choose(self, options: Options, model: MeasuredModel) -> Mix:  # noqa: ARG002 (the divergence does not depend on it)
        mix = smallest(options, self.divergence)
        found = sum(option.divergence for option in mix.values())
        if found > self.divergence:
            raise ParameterError(f"--target-kl is too small: the most faithful mix of formats has {found:.2g}")
        return mix

    def __str__(self) -> str:
        return f"the smallest mix with a mean KL divergence of {self.divergence:g}"
