"""`Emitter`, the base class of what writes the graph nodes that use a weight; each weight format has its own."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Generic, TypeVar

import onnx_ir as ir
from torch import Tensor

from llm_edge.exporter.graph.editor import Editor

Format = TypeVar("Format")


@dataclass(frozen=True, slots=True)
class EmitContext:
    """What emitters need of the graph that is being written.

    Attributes:
        editor: adds nodes and initializers to the graph.
        fused: whether onnxruntime's own operators may be used; otherwise standard ONNX operators only.
        weights: weights of the model by initializer name.
        load: returns a weight, given by initializer name, quantized in a format. Only the most recent result is
            kept, so that the tensors of one weight should be written one after another.
    """

    editor: Editor
    fused: bool
    weights: Mapping[str, Tensor]
    load: Callable[[str, Any], Any]


class Emitter(ABC, Generic[Format]):
    """Creates nodes that are not in the graph yet; the results are the outputs of the last ones.

    Attributes:
        can_split: whether `linear` supports more than one split.
    """

    can_split: ClassVar[bool] = True

    def __init__(self, context: EmitContext, weight_format: Format) -> None:
        self._context = context
        self._editor = context.editor
        self._format = weight_format

    def _load(self, name: str) -> Any:
        """Return a weight, given by initializer name, quantized in the format."""
        return self._context.load(name, self._format)

    @abstractmethod
    def linear(self, x: ir.Value, weight: ir.Value, path: str, num_splits: int = 1) -> list[ir.Node]:
        """Multiply `x [B, S, K]` by the transpose of `weight [N, K]`.

        Args:
            x: inputs.
            weight: initializer of the unquantized weight.
            path: prefix of the node names.
            num_splits: number of equal splits of the weight's rows. Each split has a separate result.
        """

    def gather(self, weight: ir.Value, ids: ir.Value, path: str) -> list[ir.Node] | None:  # noqa: ARG002
        """Gather rows `ids [B, S]` of `weight [V, K]`; None keeps the Gather node of the trace and a float32 weight."""
        return None


def split_suffix(index: int, num_splits: int) -> str:
    """Return the name suffix of a split of a weight; empty if the weight is not split."""
    return "" if num_splits == 1 else f"_{index}"
