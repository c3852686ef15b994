"""Pass that quantizes the KV cache to int8."""

from __future__ import annotations

from collections.abc import Sequence

import onnx_ir as ir
from torch import Tensor

from llm_edge.exporter.graph.editor import Editor, name_of
from llm_edge.exporter.graph.trace import GraphStyle
from llm_edge.exporter.quantization.observe import CacheRange
from llm_edge.exporter.quantization.recipes import Recipe
from llm_edge.model.config import ModelConfig
from llm_edge.model.rope import Rope
from llm_edge.runtime.errors import ParameterError

_MIN_SCALE = 1e-6  # of a channel that was zero throughout calibration
_SCALES = 12  # index of the input of GroupQueryAttention with the scales of keys; those of values follow


def check_cache(recipe: Recipe, style: GraphStyle) -> None:
    """Raise ParameterError if a graph style does not support a recipe's cache: standard operators have no 8-bit one."""
    if recipe.cache_bits and style is not GraphStyle.FUSED:
        raise ParameterError(
            f"--precision {recipe.name}: portable graphs do not support a {recipe.cache_bits}-bit cache: "
            "omit it, or use --graph fused"
        )


def quantize_cache(model: ir.Model, config: ModelConfig, caches: Sequence[CacheRange]) -> None:
    """Store the cache in int8, with a fixed scale per channel of each head.

    Requires: a fused graph with one GroupQueryAttention per layer, and the cache range of each layer.
    Does: adds the scales (float32 [1, K, 1, D]) to these nodes, and changes the dtype of past and present to int8.
    Ensures: the keys and values of each token are quantized once and independently of other tokens, so that chunking
        a prompt or batching does not change them. Attention itself is computed in float32.
    """
    editor = Editor(model)
    nodes = {name_of(node.inputs[3]): node for node in model.graph if node.op_type == "GroupQueryAttention"}
    for number, (layer, cache) in enumerate(zip(config.layers, caches, strict=True)):
        node = nodes[f"past_key_values.{number}.key"]
        node.resize_inputs(_SCALES + 2)
        ranges = {"key": _key_range(cache.key, layer.rope), "value": cache.value}
        for index, (kind, largest) in enumerate(ranges.items()):
            scales = (largest / 127).clamp(min=_MIN_SCALE)[None, :, None]
            name = f"layers.{number}.attention.{kind}_scales"
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
    """Return the range of rotated keys [K, D] at any position: rotation moves magnitude between the two halves."""
    if rope is None:
        return largest
    half = rope.dim // 2
    bounds = largest.clone()
    both = largest[:, :half].hypot(largest[:, half : 2 * half])
    bounds[:, :half] = bounds[:, half : 2 * half] = both
    return bounds
