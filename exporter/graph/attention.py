"""The two ONNX forms of `attention.cached_attention`: onnxruntime's own operator, and standard ones.

Knows nothing of models; the exporter of PyTorch calls these while it translates a trace.
"""

from __future__ import annotations

from typing import Any

import onnx.defs
import onnx_ir as ir
from onnxscript import opset23 as op
from onnxscript import values

_ROTATED_HEADS = 16
"""onnxruntime's GroupQueryAttention rotates heads of a multiple of this size, and parts of a multiple of 8."""
_INT32_MAX = 2**31 - 1


def contrib(domain: str, name: str, inputs: int, outputs: int, **attributes: Any) -> values.Op:
    """An operator of a domain whose schemas onnx does not know, typed just well enough to be called."""
    kinds = onnx.defs.OpSchema.AttrType
    parameter = onnx.defs.OpSchema.FormalParameter
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    every = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(int32)"]
    schema = onnx.defs.OpSchema(
        name,
        domain,
        1,
        inputs=[parameter(f"in{i}", f"T{i}", param_option=optional) for i in range(inputs)],
        outputs=[parameter(f"out{i}", f"U{i}") for i in range(outputs)],
        type_constraints=[
            *((f"T{i}", every, "") for i in range(inputs)),
            *((f"U{i}", every, "") for i in range(outputs)),
        ],
        attributes=[onnx.defs.OpSchema.Attribute(key, getattr(kinds, kind)) for key, kind in attributes.items()],
    )
    return values.Op(values.Opset(domain, 1), name, schema)


_GQA = contrib(
    "com.microsoft",
    "GroupQueryAttention",
    inputs=10,
    outputs=3,
    num_heads="INT",
    kv_num_heads="INT",
    do_rotary="INT",
    scale="FLOAT",
    local_window_size="INT",
)


def fused_attention(
    query: Any,
    key: Any,
    value: Any,
    past_key: Any,
    past_value: Any,
    mask: Any,
    cos: Any,
    sin: Any,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    window: int,
    long_from: int,
) -> Any:
    """`com.microsoft` GroupQueryAttention; it rotates too, where it can."""
    head_dim = past_key.shape[3]
    lengths = op.ReduceSum(mask, op.Constant(value_ints=[1]), keepdims=0)
    last_slots = op.Cast(op.Sub(lengths, op.Constant(value_int=1)), to=ir.DataType.INT32)
    total = op.Cast(op.Squeeze(op.Shape(mask, start=1, end=2)), to=ir.DataType.INT32)
    inside = cos is not None and head_dim % _ROTATED_HEADS == 0 and cos.shape[1] % 8 == 0 and not long_from
    if cos is not None and not inside:
        query, key, value = _unpacked(query, key, value, num_heads, num_kv_heads, head_dim)
        positions = _positions(query, mask, cos, long_from)
        query = _rotated(query, cos, sin, positions, num_heads, head_dim)
        key = _rotated(key, cos, sin, positions, num_kv_heads, head_dim)
    tables = (cos, sin) if inside else ()
    attributes = {"num_heads": num_heads, "kv_num_heads": num_kv_heads, "do_rotary": int(inside)}
    attributes |= _scale(scale, head_dim)
    if window:
        attributes["local_window_size"] = window
    return _GQA(query, key, value, past_key, past_value, last_slots, total, *tables, **attributes)


def portable_attention(
    query: Any,
    key: Any,
    value: Any,
    past_key: Any,
    past_value: Any,
    mask: Any,
    cos: Any,
    sin: Any,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    window: int,
    long_from: int,
) -> Any:
    """Attention and RotaryEmbedding of opset 23, with the causal mask written out."""
    head_dim = past_key.shape[3]
    axis_0, axis_1, axes_12 = (op.Constant(value_ints=axes) for axes in ([0], [1], [1, 2]))
    slots, new_slots = _slots(query, mask)
    columns, rows = op.Unsqueeze(slots, axis_0), op.Unsqueeze(new_slots, axis_1)
    unpadded = op.Unsqueeze(op.Cast(mask, to=ir.DataType.BOOL), axes_12)  # [B, 1, 1, T]
    visible = op.And(op.LessOrEqual(columns, rows), unpadded)  # [B, 1, S, T]
    if window:
        visible = op.And(visible, op.Greater(columns, op.Sub(rows, op.Constant(value_int=window))))
    visible = op.Or(visible, op.Equal(columns, rows))

    query, key, value = _unpacked(query, key, value, num_heads, num_kv_heads, head_dim)
    if cos is not None:
        positions = _positions(query, mask, cos, long_from)
        query = _rotated(query, cos, sin, positions, num_heads, head_dim)
        key = _rotated(key, cos, sin, positions, num_kv_heads, head_dim)
    attributes = {"q_num_heads": num_heads, "kv_num_heads": num_kv_heads, **_scale(scale, head_dim)}
    attended, present_key, present_value, _ = op.Attention(
        query, key, value, visible, past_key, past_value, **attributes
    )
    return attended, present_key, present_value


def _scale(scale: float, head_dim: int) -> dict[str, Any]:
    """The attribute, where it is not what both operators take by themselves."""
    return {} if scale == head_dim**-0.5 else {"scale": scale}


def _unpacked(query: Any, key: Any, value: Any, num_heads: int, num_kv_heads: int, head_dim: int) -> Any:
    """Queries, keys and values, each [B, S, heads * D]."""
    if key is not None:
        return query, key, value
    first, second = num_heads * head_dim, (num_heads + num_kv_heads) * head_dim
    axis = op.Constant(value_ints=[2])
    return tuple(
        op.Slice(query, op.Constant(value_ints=[start]), op.Constant(value_ints=[end]), axis)
        for start, end in ((0, first), (first, second), (second, _INT32_MAX))
    )


def _slots(query: Any, mask: Any) -> Any:
    """Numbers of all slots [T], and of the new ones [S]; a past that is one buffer with its present may be longer."""
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    total = op.Squeeze(op.Shape(mask, start=1, end=2))
    past_length = op.Sub(total, op.Squeeze(op.Shape(query, start=1, end=2)))
    return op.Range(zero, total, one), op.Range(past_length, total, one)


def _positions(query: Any, mask: Any, cos: Any, long_from: int) -> Any:
    """Rows of the rotary tables for the new tokens, [B, S]."""
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    _, new_slots = _slots(query, mask)
    counted = op.Clip(op.Sub(op.CumSum(mask, one), one), zero)
    positions = op.Gather(counted, new_slots, axis=1)
    if long_from:
        long = op.GreaterOrEqual(op.ReduceMax(positions, keepdims=0), op.Constant(value_int=long_from))
        half = op.Constant(value_int=cos.shape[0] // 2)
        positions = op.Add(positions, op.Mul(op.Cast(long, to=ir.DataType.INT64), half))
    return positions


def _rotated(x: Any, cos: Any, sin: Any, positions: Any, num_heads: int, head_dim: int) -> Any:
    dim = 2 * cos.shape[1]
    partial = {} if dim == head_dim else {"rotary_embedding_dim": dim}
    return op.RotaryEmbedding(x, cos, sin, positions, num_heads=num_heads, **partial)
