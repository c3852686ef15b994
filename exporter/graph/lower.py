"""Lowers a traced graph to the graph of a precision: emits each weight in the format that the recipe chooses.

Weights are read, quantized and written one at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import onnx_ir as ir
import onnx_ir.passes.common as common_passes
from torch import Tensor

from llm_edge.exporter.graph.attention import DOMAIN
from llm_edge.exporter.graph.editor import Array, Editor, lazy_tensor, name_of, shape_of
from llm_edge.exporter.graph.emitter import EmitContext
from llm_edge.exporter.graph.experts import EXPERT_WEIGHTS, EXPERTS, lower_experts
from llm_edge.exporter.graph.passes.float16 import to_float16
from llm_edge.exporter.graph.passes.int8_cache import check_cache, quantize_cache
from llm_edge.exporter.graph.trace import GraphStyle
from llm_edge.exporter.module_names import EMBEDDING, HEAD
from llm_edge.exporter.quantization.calibrate import CalibratedWeights, StoredFormat
from llm_edge.exporter.quantization.formats.base import WeightFormat
from llm_edge.exporter.quantization.formats.blocks import Blocks
from llm_edge.exporter.quantization.recipes import Recipe
from llm_edge.model.config import ModelConfig
from llm_edge.model.weights import Weights


def apply_recipe(
    model: ir.Model,
    weights: Mapping[str, Tensor],
    recipe: Recipe,
    style: GraphStyle,
    calibrated: CalibratedWeights | None = None,
    *,
    tied: bool,
    config: ModelConfig | None = None,
) -> dict[str, StoredFormat]:
    """Lower a traced graph (see `graph.trace`) to the graph of a precision, in place.

    Args:
        model: the graph.
        weights: of the traced model, rotated if the recipe is calibrated.
        recipe: of the precision.
        style: of the graph.
        calibrated: projections that it does not hold are quantized without calibration.
        tied: whether the output head has the weight of the embedding.
        config: of our own decoder, for a quantized cache.

    Returns:
        the formats of all projections and the embedding by module path.
    """
    check_cache(recipe, style)
    lowering = _Lowering(Editor(model), weights, recipe, calibrated, style is GraphStyle.FUSED, tied)
    for node in list(model.graph):
        if node.domain == DOMAIN and node.op_type == EXPERTS:
            lowering.lower_experts(node)
        elif node.domain == DOMAIN:
            lowering.lower_linear(node)
    for node in list(model.graph):  # after the projections: a tied embedding uses the format of the head
        if node.op_type == "Gather" and name_of(node.inputs[0]) == f"{EMBEDDING}.weight":
            lowering.lower_embedding(node)
    del model.opset_imports[DOMAIN]
    common_passes.RemoveUnusedNodesPass()(model)  # routing that operators for experts compute themselves
    _fill_initializers(model, weights)
    if recipe.cache_bits:
        assert calibrated is not None
        assert config is not None
        quantize_cache(model, config, calibrated.caches)
    if recipe.float16:
        to_float16(model)
    return lowering.stored


def remove_linear(model: ir.Model, module: str) -> None:
    """Remove a projection, if there is one at a module path, from a traced graph: its inputs become its outputs."""
    for node in model.graph:
        if node.domain == DOMAIN and _module_of(node) == module:
            x, weight = node.inputs
            assert x is not None
            ir.convenience.replace_all_uses_with(node.outputs[0], x)
            model.graph.remove(node, safe=True)
            del model.graph.initializers[name_of(weight)]
            return


class _Lowering:
    def __init__(
        self,
        editor: Editor,
        weights: Mapping[str, Tensor],
        recipe: Recipe,
        calibrated: CalibratedWeights | None,
        fused: bool,
        tied: bool,
    ) -> None:
        self._embedding = HEAD if tied else EMBEDDING  # module whose format the embedding has
        self.stored: dict[str, StoredFormat] = {}
        self._weights = weights
        self._recipe = recipe
        self._calibrated = calibrated
        # The tensors of a weight are written one after another, so that a cache of one weight is enough.
        self.editor = editor
        self._context = EmitContext(editor, fused, weights, functools.lru_cache(maxsize=1)(self._load))

    def _load(self, name: str, weight_format: WeightFormat) -> Any:
        """Return a quantized weight; see `EmitContext.load`."""
        module = name.removesuffix(".weight")
        module = self._embedding if module == EMBEDDING else module
        if self._calibrated is not None and module in self._calibrated.formats:
            return self._calibrated.load(module)
        return weight_format.quantize(self._weights, name)

    def _format_for(self, module: str, weight: ir.Value) -> StoredFormat:
        """Return the format of the projection at a module path, as it applies to its weight."""
        if self._calibrated is not None and module in self._calibrated.formats:
            return self._calibrated.formats[module]
        return StoredFormat(self._adapt(self._recipe.format_of(module), weight))

    def _adapt(self, weight_format: WeightFormat, weight: ir.Value) -> WeightFormat:
        """Return the format to use for a weight, given how its source stores it and its width."""
        kind = self._weights.block_kind(name_of(weight)) if isinstance(self._weights, Weights) else None
        return weight_format.for_source(kind).for_width(shape_of(weight)[1])

    def lower_linear(self, node: ir.Node) -> None:
        """Replace `Linear(x, weight [N, K])`."""
        x, weight = node.inputs
        assert x is not None
        assert weight is not None
        name = name_of(weight)
        module = _module_of(node) if name.endswith(".weight") else name  # a module may have several matrices
        path = f"/{module.replace('.', '/')}"
        stored = self._format_for(module, weight)
        self.stored[module] = stored
        emitter = stored.format.emitter(self._context)
        # A quantized weight is split along its rows: two matmuls cost less than one matmul and a copy of its halves.
        split = _following_split(node) if emitter.can_split else None
        last, num_splits = (node, 1) if split is None else (split, len(split.outputs))
        nodes = emitter.linear(x, weight, path, num_splits)
        self.editor.replace(last, nodes, [result.outputs[0] for result in nodes[-num_splits:]])
        if split is not None:
            self.editor.graph.remove(node, safe=True)

    def lower_experts(self, node: ir.Node) -> None:
        """Replace the experts of a layer."""
        module = _module_of(node)
        wanted = self._recipe.format_of(module)
        layout = lower_experts(
            self.editor, node, self._weights, wanted if isinstance(wanted, Blocks) else None, self._stored_experts
        )
        if layout is not None:
            stored = StoredFormat(Blocks(layout.bits, layout.size, layout.symmetric))
            self.stored |= {f"{module}.{name}": stored for name in EXPERT_WEIGHTS}

    def _stored_experts(self, name: str) -> Any:
        """Return the matrices of a layer's experts if they are calibrated."""
        calibrated = self._calibrated
        return None if calibrated is None or name not in calibrated.formats else calibrated.load(name)

    def lower_embedding(self, node: ir.Node) -> None:
        """Replace `Gather(weight [V, hidden], input_ids)` if the embedding can be stored in the recipe's format."""
        weight, ids = node.inputs
        assert weight is not None
        assert ids is not None
        stored = self._format_for(self._embedding, weight)
        nodes = stored.format.emitter(self._context).gather(weight, ids, f"/{EMBEDDING}")
        if nodes is not None:
            self.stored[EMBEDDING] = stored
            self.editor.replace(node, nodes)


def _module_of(node: ir.Node) -> str:
    """Return the module path of an abstract node, which is named after it."""
    assert node.name is not None
    return node.name.removesuffix(f"/{node.op_type}").strip("/").replace("/", ".")


def _following_split(node: ir.Node) -> ir.Node | None:
    """Return the Split node that is the only use of a projection, if there is one and its parts are equal."""
    uses = node.outputs[0].uses()
    split = next(iter(uses)).node if len(uses) == 1 else None
    if split is None or split.op_type != "Split" or "num_outputs" not in split.attributes:
        return None
    return split


def _fill_initializers(model: ir.Model, weights: Mapping[str, Tensor]) -> None:
    """Set the values of the initializers of the trace, and remove those that are no longer used."""
    for name, value in list(model.graph.initializers.items()):
        if name in weights and not value.uses():
            del model.graph.initializers[name]
        elif name in weights:
            assert value.dtype is not None
            kind = ir.DataType.FLOAT if value.dtype.is_floating_point() else value.dtype
            values = functools.partial(_values, weights, name)
            value.const_value = lazy_tensor(name, kind, shape_of(value), values)


def _values(weights: Mapping[str, Tensor], name: str) -> Array:
    """Return a weight as float32, but integers and masks as they are."""
    weight = weights[name]
    return (weight.float() if weight.is_floating_point() else weight).numpy()
