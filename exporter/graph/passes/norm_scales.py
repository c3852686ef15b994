"""Pass that gives norms without weights the scale that their operator requires."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from llm_edge.exporter.graph.editor import Editor

NAME = "norm_scale.ones"


def share_unit_scales(model: ir.Model, width: int) -> None:
    """Replace the computed scales of LayerNormalization by one initializer of ones.

    Requires: norms over `width` elements; the only scales that nodes compute are those of norms without weights.
    Does: adds the initializer if there are such norms.
    Ensures: the same values; the nodes that computed the scales are unused.
    """
    norms = [node for node in model.graph if node.op_type == "LayerNormalization" and _is_computed(node.inputs[1])]
    if norms:
        ones = Editor(model).initializer(NAME, ir.DataType.FLOAT, (width,), lambda: np.ones(width, dtype=np.float32))
        for node in norms:
            node.replace_input_with(1, ones)


def _is_computed(value: ir.Value | None) -> bool:
    return value is not None and value.producer() is not None
