"""`WeightFormat`, the base class of all weight formats."""

from __future__ import annotations

import contextlib
import dataclasses
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

from torch import Tensor

from llm_edge.exporter.graph.emitter import EmitContext, Emitter
from llm_edge.exporter.quantization.hessian import Hessian
from llm_edge.model.block_weights import BlockKind
from llm_edge.runtime.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class ObservedInputs:
    """Inputs of a projection on the calibration text.

    Attributes:
        hessian: of the inputs.
        samples: a sample of the inputs, float32 [samples, K].
        shared: results that formats of the same weight have in common, by a key of theirs.
    """

    hessian: Hessian
    samples: Tensor
    shared: dict[Any, Any] = dataclasses.field(default_factory=dict)


class Quantized(Protocol):
    """A quantized weight [N, K]: a dataclass of arrays and numbers."""

    __dataclass_fields__: ClassVar[dict[str, dataclasses.Field[Any]]]

    def factors(self, inputs: Tensor) -> tuple[Tensor, Tensor]:
        """Return inputs [rows, K] and weight [N, K] as they are rounded; both float32."""


def apply(quantized: Quantized, inputs: Tensor) -> Tensor:
    """Multiply inputs [rows, K] as the graph does; float32 [rows, N]."""
    rounded, weight = quantized.factors(inputs)
    return rounded @ weight.T


@contextlib.contextmanager
def naming(weight: str) -> Iterator[None]:
    """Begin the messages of CheckpointErrors with the name of a weight."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{weight}: {error}") from error


class WeightFormat(ABC):
    """How the weight of a projection or embedding is quantized, stored and multiplied.

    Subclasses are frozen dataclasses whose fields are the parameters of the format. They implement `calibrate` if
    they can be calibrated, and `quantize` if they can be used without calibration.

    Attributes:
        kind: name of the format in the manifest.
        quantized_type: class of the quantized weights that `calibrate` returns; None if it is not implemented.
        static_activations: whether activations are quantized with fixed scales. Recipes can replace such a format by
            a fallback if its measured error is too large.
        needs_source_blocks: whether the format applies only to sources that store weights in blocks.
    """

    kind: ClassVar[str]
    quantized_type: ClassVar[type[Quantized] | None] = None
    static_activations: ClassVar[bool] = False
    needs_source_blocks: ClassVar[bool] = False

    @property
    @abstractmethod
    def bytes_per_weight(self) -> float:
        """Approximate size of a weight on disk."""

    @property
    def prefill_cost(self) -> float:
        """Time of a product with many inputs, relative to 8-bit weights with fixed 8-bit activations."""
        return 3.0

    @property
    @abstractmethod
    def label(self) -> str:
        """Short name for tables, for example `int4-128z`."""

    @abstractmethod
    def __str__(self) -> str:
        """Describe the format in a few words."""

    @abstractmethod
    def emitter(self, context: EmitContext) -> Emitter[Any]:
        """Return the emitter of the graph nodes that use a weight in this format."""

    def to_dict(self) -> dict[str, Any]:
        """Return the format as stored in the manifest: kind, parameters, label and description."""
        assert dataclasses.is_dataclass(self)
        return {"kind": self.kind, **dataclasses.asdict(self), "label": self.label, "description": str(self)}

    def for_source(self, kind: BlockKind | None) -> WeightFormat:  # noqa: ARG002 (most formats ignore it)
        """Return the format to use for a weight that the source stores in blocks of a kind, or not in blocks (None)."""
        return self

    def for_width(self, width: int) -> WeightFormat:  # noqa: ARG002 (most formats ignore it)
        """Return the format to use for a weight with this many columns."""
        return self

    def quantize(self, weights: Mapping[str, Tensor], name: str) -> object:  # noqa: ARG002
        """Quantize or read a weight without calibration; raises CheckpointError if it holds NaN or infinity."""
        raise TypeError(f"{self} requires calibration")

    def calibrate(self, weight: Tensor, observed: ObservedInputs) -> Quantized:  # noqa: ARG002
        """Quantize a float32 weight [N, K] so that its output on the observed inputs changes least.

        Raises:
            CheckpointError: the weight or its inputs hold NaN or infinity.
        """
        raise TypeError(f"{self} cannot be calibrated")
