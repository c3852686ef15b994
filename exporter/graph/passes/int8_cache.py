"""A cache of 8-bit keys and values. Knows nothing of projections, nor of how the ranges were found."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from torch import Tensor

from llm_edge.exporter.graph.editor import Editor, name_of
from llm_edge.exporter.graph.trace import GraphStyle
from llm_edge.exporter.quantization.calibrate import CacheRange
from llm_edge.exporter.quantization.recipes import Recipe
from llm_edge.model.config import ModelConfig
from llm_edge.model.rope import Rope
from llm_edge.runtime.errors import ParameterError

_SMALLEST = 1e-6  # step, of a channel that calibration saw nothing in
_SCALES = 12  # input of GroupQueryAttention: those of keys, those of values behind them


def check_cache(recipe: Recipe, style: GraphStyle) -> None:
    """Refuse a recipe whose cache the style cannot hold.

    Raises:
        ParameterError: standard operators know no 8-bit cache.
    """
    if recipe.cache_bits and style is not GraphStyle.FUSED:
        raise ParameterError(
            f"--precision {recipe.name}: standard operators have no cache of {recipe.cache_bits} bits; "
            "leave it out, or export with --graph fused"
        )


def quantize_cache(model: ir.Model, config: ModelConfig, caches: Sequence[CacheRange]) -> None:
    """Let the cache hold int8, with a fixed scale for each channel of each head.

    Requires: a fused graph, with one GroupQueryAttention a layer; a range a layer.
    Does: gives each of these nodes its scales (float32 [1, K, 1, D]), and past and present the type int8.
    Ensures: a token's keys and values are rounded by themselves, once: prompts in pieces and rows of a batch see the
        same numbers as otherwise. Attention itself is float32.
    """
    editor = Editor(model)
    nodes = {name_of(node.inputs[3]): node for node in model.graph if node.op_type == "GroupQueryAttention"}
    for number, (layer, found) in enumerate(zip(config.layers, caches, strict=True)):
        node = nodes[f"past_key_values.{number}.key"]
        node.resize_inputs(_SCALES + 2)
        for index, (part, range_) in enumerate((("key", _key_range(found.key, layer.rope)), ("value", found.value))):
            scales = (range_ / 127).clamp(min=_SMALLEST)[None, :, None]
            name = f"layers.{number}.attention.{part}_scales"
            node.replace_input_with(
                _SCALES + index, editor.initializer(name, ir.DataType.FLOAT, (*scales.shape,), scales.numpy)
            )
            for tensor in (node.inputs[3 + index], node.outputs[1 + index]):
                assert tensor is not None
                tensor.type = ir.TensorType(ir.DataType.INT8)
        for attribute in (
            ir.AttrString("k_quant_type", "PER_CHANNEL"),
            ir.AttrString("v_quant_type", "PER_CHANNEL"),
            ir.AttrInt64("kv_cache_bit_width", 8),
        ):
            node.attributes.add(attribute)


def _key_range(largest: Tensor, rope: Rope | None) -> Tensor:
    """What rotated keys [K, D] can reach anywhere: positions beyond the calibration's turn one half into the other."""
    if rope is None:
        return largest
    half = rope.dim // 2
    reach = largest.clone()
    both = largest[:, :half].hypot(largest[:, half : 2 * half])
    reach[:, :half] = reach[:, half : 2 * half] = both
    return reach
