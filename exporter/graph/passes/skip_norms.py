"""One kernel for a residual sum and the norm behind it."""

from __future__ import annotations

import onnx_ir as ir


def fuse_skip_norms(model: ir.Model) -> None:
    """Fuse Add + RMSNormalization into `com.microsoft` SkipSimplifiedLayerNormalization.

    Requires: norms over the last axis; sums of two [B, S, hidden] tensors.
    Does: replaces each norm, and the sum it reads if the norm comes right behind it, by one node that
        yields both the norm and the sum.
    Ensures: the same values; norms of anything else (a projection with its bias, say) stay RMSNormalization.
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
