"""Pass that fuses residual additions with the norms that follow them."""

from __future__ import annotations

import onnx_ir as ir


def fuse_skip_norms(model: ir.Model) -> None:
    """Fuse Add + RMSNormalization into `com.microsoft` SkipSimplifiedLayerNormalization.

    Requires: norms over the last axis; additions of two [B, S, hidden] tensors.
    Does: replaces each norm that directly follows an addition, and the addition, by one node that returns both results.
    Ensures: the same values; other norms (for example of a projection with a bias) remain RMSNormalization.
    """
    graph = model.graph
    for norm in list(graph):
        if norm.op_type != "RMSNormalization" or norm.inputs[0] is None:
            continue
        add = norm.inputs[0].producer()
        if add is None or add.op_type != "Add" or any(x is None or x.is_initializer() for x in add.inputs):
            continue  # an initializer would be a bias
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
    model.opset_imports["com.microsoft"] = 1
