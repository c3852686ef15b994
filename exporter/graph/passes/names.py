"""Pass that names nodes and values after the modules they were traced from."""

from __future__ import annotations

from collections.abc import Callable

import onnx_ir as ir

_SCOPES = "pkg.torch.onnx.name_scopes"


def name_by_module(model: ir.Model, public_name: Callable[[str], str] = lambda path: path) -> None:
    """Rename nodes and their outputs to paths; `public_name` returns the path to use for a traced module's.

    Requires: a graph as returned by PyTorch's exporter, whose nodes carry their module scopes.
    Does: names each node `/<module path>/<operator>`, with a numeric suffix if that is taken, and each of its outputs
        after the node.
    Ensures: names are unique and depend only on the model; inputs, outputs and initializers keep their names.
    """
    taken: set[str] = set()
    outputs = set(model.graph.outputs)
    for node in model.graph:
        scopes = str(node.metadata_props.get(_SCOPES, "")).strip("[]").replace("'", "").split(", ")
        module = public_name(scopes[-2]) if len(scopes) > 1 else ""  # the last scope is the operator's own
        base = f"/{module.replace('.', '/')}/{node.op_type}" if module else f"/{node.op_type}"
        name, count = base, 1
        while name in taken:
            name, count = f"{base}_{count}", count + 1
        taken.add(name)
        node.name = name
        for index, value in enumerate(node.outputs):
            if value not in outputs:
                value.name = f"{name}/output_{index}"
