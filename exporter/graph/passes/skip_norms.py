"""Pass that fuses residual additions with the norms that follow them."""

from __future__ import annotations

import onnx_ir as ir

from llm_edge.exporter.graph.passes.patterns import dims_of


def fuse_skip_norms(model: ir.Model) -> None:
    """Fuse Add + RMSNormalization into `com.microsoft` SkipSimplifiedLayerNormalization.

    Requires: norms over the last axis; shapes of values.
    Does: replaces each norm that directly follows an addition of two [B, S, hidden] tensors, and the addition, by one
        node that returns both results.
    Ensures: the same values; other norms (for example of a projection with a bias) remain RMSNormalization.
    """
    graph = model.graph
    for norm in list(graph):
        if norm.op_type != "RMSNormalization" or norm.inputs[0] is None:
            continue
        add = norm.inputs[0].producer()
        if add is None or add.op_type != "Add" or not _same_shapes(add, norm.inputs[1]):
            continue  # a vector would be a bias
        epsilon = norm.attributes["epsilon"].as_float()
        normed, total = norm.outputs[0], add.outputs[0]
        fused = ir.Node(
            "com.microsoft",
            "SkipSimplifiedLayerNormalization",
            [*add.inputs, norm.inputs[1]],
            [ir.AttrFloat32("epsilon", epsilon)],
            num_outputs=4,
            name=norm.name.replace("RMSNormalization", "SkipSimplifiedLayerNormalization") if norm.name else None,
        )
        fused.outputs[1].name = fused.outputs[2].name = ""
        for old, index in ((normed, 0), (total, 3)):
            fused.outputs[index].name = f"{fused.name}/output_{index}"
            fused.outputs[index].type, fused.outputs[index].shape = old.type, old.shape
            ir.convenience.replace_all_uses_with(old, fused.outputs[index])
        graph.insert_before(norm, fused)
        graph.remove([norm, add], safe=True)
    graph.sort()  # something between an addition and its norm may use the sum
    model.opset_imports["com.microsoft"] = 1


def _same_shapes(add: ir.Node, scale: ir.Value | None) -> bool:
    """Whether an addition is one of two [B, S, hidden] tensors, and the scale [hidden]."""
    shapes = [dims_of(value) for value in (*add.inputs, *add.outputs)]
    return shapes[0] is not None and len(shapes[0]) == 3 and len(set(shapes)) == 1 and dims_of(scale) == shapes[0][2:]
