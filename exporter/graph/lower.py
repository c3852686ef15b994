"""Gives each projection of a traced graph the form its recipe asks for, and the graph its weights.

Knows nothing of checkpoints' formats or of bundles. Weights are read, rounded and written one at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping

import numpy as np
import onnx_ir as ir
from torch import Tensor

from llm_edge.exporter.graph.editor import Array, Editor, lazy_tensor, name_of, shape_of
from llm_edge.exporter.graph.emitters.blocks import BlockForm, FusedBlocks, PortableBlocks
from llm_edge.exporter.graph.emitters.integer import FusedIntegers, IntegerForm, PortableIntegers
from llm_edge.exporter.graph.emitters.source import SourceForm
from llm_edge.exporter.graph.passes.half import to_half
from llm_edge.exporter.graph.passes.int8_cache import check_cache, quantize_cache
from llm_edge.exporter.graph.trace import EMBEDDING, LINEAR_DOMAIN, GraphStyle
from llm_edge.exporter.quantization.activations import QuantizedInteger
from llm_edge.exporter.quantization.blocks import QuantizedBlocks, quantize_blocks
from llm_edge.exporter.quantization.calibrate import Rounding
from llm_edge.exporter.quantization.recipes import HEAD, Blocks, Dense, Format, Recipe, Source
from llm_edge.model.config import ModelConfig
from llm_edge.model.decoder import rotary_tables
from llm_edge.runtime.errors import CheckpointError


def apply_recipe(
    model: ir.Model,
    config: ModelConfig,
    weights: Mapping[str, Tensor],
    recipe: Recipe,
    style: GraphStyle,
    rounding: Rounding | None = None,
) -> None:
    """Turn a traced graph (see `graph.trace`) into the graph of a precision, in place.

    Args:
        model: the trace.
        config: of the model that was traced, rotated where the recipe is calibrated.
        weights: of the same model.
        recipe: the precision.
        style: of the trace.
        rounding: projections that are rounded already; the others are rounded to nearest.
    """
    check_cache(recipe, style)
    _Lowering(model, config, weights, recipe, style, rounding).run()


class _Lowering:
    def __init__(
        self,
        model: ir.Model,
        config: ModelConfig,
        weights: Mapping[str, Tensor],
        recipe: Recipe,
        style: GraphStyle,
        rounding: Rounding | None,
    ) -> None:
        self._model = model
        self._config = config
        self._weights = weights
        self._recipe = recipe
        self._rounding = rounding
        self._editor = Editor(model)
        fused = style is GraphStyle.FUSED
        # Data, scales and zero points of a weight follow each other: it is rounded, or read, once.
        self._blocks: BlockForm = (FusedBlocks if fused else PortableBlocks)(
            self._editor, functools.lru_cache(maxsize=1)(self._load_blocks)
        )
        self._integers: IntegerForm = (FusedIntegers if fused else PortableIntegers)(
            self._editor, functools.lru_cache(maxsize=1)(self._load_integer)
        )
        self._source = SourceForm(self._editor, weights, fused)

    def run(self) -> None:
        """See `apply_recipe`."""
        graph = self._model.graph
        for node in list(graph):
            if node.domain == LINEAR_DOMAIN:
                self._linear(node)
        for node in list(graph):  # behind the projections: a tied embedding follows its head
            if node.op_type == "Gather" and name_of(node.inputs[0]) == EMBEDDING:
                self._embedding(node)
        del self._model.opset_imports[LINEAR_DOMAIN]
        _fill(self._model, self._config, self._weights)
        if self._recipe.cache_bits:
            assert self._rounding is not None
            quantize_cache(self._model, self._config, self._rounding.caches)
        if self._recipe.half:
            to_half(self._model)

    def _load_blocks(self, name: str, form: Blocks) -> QuantizedBlocks:
        module = name.removesuffix(".weight")
        if self._rounding is not None and module in self._rounding.choices:
            found = self._rounding.load(module)
            assert isinstance(found, QuantizedBlocks)
            return found
        try:
            return quantize_blocks(self._weights[name], form)
        except CheckpointError as error:
            raise CheckpointError(f"{name}: {error}") from error

    def _load_integer(self, name: str) -> QuantizedInteger:
        assert self._rounding is not None
        found = self._rounding.load(name.removesuffix(".weight"))
        assert isinstance(found, QuantizedInteger)
        return found

    def _format_of(self, module: str) -> Format:
        if self._rounding is not None and module in self._rounding.choices:
            return self._rounding.choices[module].form
        return self._recipe.format_of(module)

    def _settled(self, form: Format, weight: ir.Value) -> Format:
        """The format as it suits a weight: what its source and its width allow."""
        if isinstance(form, Source) and self._source.kind(weight) is None:
            form = form.otherwise
        return form.fitting(shape_of(weight)[1]) if isinstance(form, Blocks) else form

    def _linear(self, node: ir.Node) -> None:
        """Replace `Linear(x, weight [N, K])`."""
        x, weight = node.inputs
        assert x is not None
        assert weight is not None
        assert node.name is not None
        path = node.name.removesuffix("/Linear")
        form = self._settled(self._format_of(path.strip("/").replace("/", ".")), weight)
        if isinstance(form, Dense):
            if name_of(weight) == EMBEDDING:
                self._editor.replace(node, _tied(x, weight, path, self._editor))
            else:
                self._editor.replace(node, _dense(x, weight, path, self._editor, self._weights))
            return
        split = _split_behind(node)  # two products cost less than one and a copy of its halves
        last, parts = (node, 1) if split is None else (split, len(split.outputs))
        if isinstance(form, Blocks):
            replacement = self._blocks.linear(x, weight, form, path, parts)
        elif isinstance(form, Source):
            replacement = self._source.linear(x, weight, path, parts)
        else:
            replacement = self._integers.linear(x, weight, form, path, parts)
        self._editor.replace(last, replacement, [made.outputs[0] for made in replacement[-parts:]])
        if split is not None:
            self._editor.graph.remove(node, safe=True)

    def _embedding(self, node: ir.Node) -> None:
        """Replace `Gather(weight [V, hidden], input_ids)` where the recipe asks for it and the width allows it."""
        weight, ids = node.inputs
        assert weight is not None
        assert ids is not None
        width = self._config.hidden_size
        form = self._format_of(HEAD) if self._config.tie_word_embeddings else self._recipe.embedding
        form = self._settled(form, weight)
        if isinstance(form, Blocks) and width % form.size == 0:
            self._editor.replace(node, self._blocks.gather(weight, ids, form, "/embed_tokens"))
        elif isinstance(form, Source):
            self._editor.replace(node, self._source.gather(weight, ids, "/embed_tokens"))


def _split_behind(node: ir.Node) -> ir.Node | None:
    """The Split that takes a projection apart, where nothing else reads it."""
    uses = node.outputs[0].uses()
    split = next(iter(uses)).node if len(uses) == 1 else None
    return split if split is not None and split.op_type == "Split" else None


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
