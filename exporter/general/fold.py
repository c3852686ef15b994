"""Computes the parts of a graph that depend on weights and constants alone."""

from __future__ import annotations

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from onnxscript.optimizer import fold_constants

_MAX_ELEMENTS = 1 << 20  # of an input or result; larger ones are weights


def fold(model: ir.Model) -> None:
    """Replace nodes with constant inputs by their results, in place.

    Requires: initializers have their values.
    Ensures: no node but casts and reshapes has constant inputs only, unless these are large. The runtime rejects
        others, because a small file could compute anything while it is loaded.
    """
    fold_constants(model, input_size_limit=_MAX_ELEMENTS, output_size_limit=_MAX_ELEMENTS)
    common_passes.CommonSubexpressionEliminationPass()(model)
    common_passes.RemoveUnusedNodesPass()(model)
