"""Gives each projection of a traced graph the form its recipe asks for, and the graph its weights.

Knows nothing of checkpoints' formats or of bundles. Weights are read, rounded and written one at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from torch import Tensor

from llm_edge.exporter.block_forms import BlockForm, FusedBlocks, PortableBlocks
from llm_edge.exporter.config import ModelConfig
from llm_edge.exporter.editor import Array, Editor, lazy_tensor, name_of, shape_of
from llm_edge.exporter.graph import EMBEDDING, LINEAR_DOMAIN, GraphStyle
from llm_edge.exporter.model import rotary_tables
from llm_edge.exporter.recipes import HEAD, Blocks, Recipe


def apply_recipe(
    model: ir.Model, config: ModelConfig, weights: Mapping[str, Tensor], recipe: Recipe, style: GraphStyle
) -> None:
    """Turn a traced graph (see `graph.trace`) into the graph of a precision, in place."""
    editor = Editor(model)
    blocks: BlockForm = (FusedBlocks if style is GraphStyle.FUSED else PortableBlocks)(editor, weights)
    for node in list(model.graph):
        if node.domain == LINEAR_DOMAIN:
            _linear(node, editor, blocks, weights, recipe)
    for node in list(model.graph):  # behind the projections: a tied embedding follows its head
        if node.op_type == "Gather" and name_of(node.inputs[0]) == EMBEDDING:
            _embedding(node, editor, blocks, config, recipe)
    del model.opset_imports[LINEAR_DOMAIN]
    _fill(model, config, weights)


def _linear(node: ir.Node, editor: Editor, blocks: BlockForm, weights: Mapping[str, Tensor], recipe: Recipe) -> None:
    """Replace `Linear(x, weight [N, K])`."""
    x, weight = node.inputs
    assert x is not None
    assert weight is not None
    assert node.name is not None
    path = node.name.removesuffix("/Linear")
    form = recipe.format_of(path.strip("/").replace("/", "."))
    if isinstance(form, Blocks):
        replacement = blocks.linear(x, weight, form, path)
    elif name_of(weight) == EMBEDDING:
        replacement = _tied(x, weight, path, editor)
    else:
        replacement = _dense(x, weight, path, editor, weights)
    editor.replace(node, replacement)


def _dense(x: ir.Value, weight: ir.Value, path: str, editor: Editor, weights: Mapping[str, Tensor]) -> list[ir.Node]:
    name = name_of(weight)
    rows, width = shape_of(weight)
    transposed = editor.initializer(
        f"{name}.transposed",
        ir.DataType.FLOAT,
        (width, rows),
        lambda: np.ascontiguousarray(weights[name].float().numpy().T),
    )
    return [editor.node("MatMul", [x, transposed], f"{path}/MatMul")]


def _tied(x: ir.Value, weight: ir.Value, path: str, editor: Editor) -> list[ir.Node]:
    """Read the embedding [V, hidden] as it lies; Gemm transposes without a copy."""
    rows, width = shape_of(weight)
    flat = editor.node("Reshape", [x, editor.constant(f"{path}/flat", [-1, width])], f"{path}/Flatten")
    gemm = editor.node("Gemm", [flat.outputs[0], weight], f"{path}/Gemm", transB=1)
    shape = editor.node("Shape", [x], f"{path}/Shape", start=0, end=2)
    vocab = editor.constant(f"{path}/vocab", [rows])
    whole = editor.node("Concat", [shape.outputs[0], vocab], f"{path}/Concat", axis=0)
    unflat = editor.node("Reshape", [gemm.outputs[0], whole.outputs[0]], f"{path}/Unflatten")
    return [flat, gemm, shape, whole, unflat]


def _embedding(node: ir.Node, editor: Editor, blocks: BlockForm, config: ModelConfig, recipe: Recipe) -> None:
    """Replace `Gather(weight [V, hidden], input_ids)` where the recipe asks for it and the width allows it."""
    weight, ids = node.inputs
    assert weight is not None
    assert ids is not None
    form = recipe.format_of(HEAD) if config.tie_word_embeddings else recipe.embedding
    if isinstance(form, Blocks) and config.hidden_size % form.size == 0:
        editor.replace(node, blocks.gather(weight, ids, form, "/embed_tokens"))


def _fill(model: ir.Model, config: ModelConfig, weights: Mapping[str, Tensor]) -> None:
    """Give the initializers of the trace their numbers; those that nothing reads any more go."""
    tables = rotary_tables(config)
    for name, value in list(model.graph.initializers.items()):
        if name in tables:
            value.const_value = ir.tensor(tables[name].numpy(), name=name)
        elif name in weights and not value.uses():
            del model.graph.initializers[name]
        elif name in weights:
            dense = functools.partial(_float32, weights, name)
            value.const_value = lazy_tensor(name, ir.DataType.FLOAT, shape_of(value), dense)


def _float32(weights: Mapping[str, Tensor], name: str) -> Array:
    return weights[name].float().numpy()
