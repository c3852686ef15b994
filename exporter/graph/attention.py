"""Translations of the operator `cached_attention` to ONNX: to onnxruntime's own operator, and to standard ones.

PyTorch's ONNX exporter calls them with the values of `AttentionInputs`.
"""

from __future__ import annotations

from typing import Any

import onnx.defs
import onnx_ir as ir
from onnxscript import opset23 as op
from onnxscript import values

from llm_edge.model.attention import AttentionInputs

DOMAIN = "llm_edge"
"""Domain of abstract nodes, which later passes replace."""
_INT32_MAX = 2**31 - 1


def contrib(domain: str, name: str, inputs: int, outputs: int, **attributes: Any) -> values.Op:
    """Return an operator whose schema is unknown to onnx, with types just precise enough to call it."""
    kinds = onnx.defs.OpSchema.AttrType
    parameter = onnx.defs.OpSchema.FormalParameter
    optional = onnx.defs.OpSchema.FormalParameterOption.Optional
    types = ["tensor(float)", "tensor(float16)", "tensor(bfloat16)", "tensor(int32)", "tensor(int64)"]
    schema = onnx.defs.OpSchema(
        name,
        domain,
        1,
        inputs=[parameter(f"in{i}", f"T{i}", param_option=optional) for i in range(inputs)],
        outputs=[parameter(f"out{i}", f"U{i}") for i in range(outputs)],
        type_constraints=[
            *((f"T{i}", types, "") for i in range(inputs)),
            *((f"U{i}", types, "") for i in range(outputs)),
        ],
        attributes=[onnx.defs.OpSchema.Attribute(key, getattr(kinds, kind)) for key, kind in attributes.items()],
    )
    return values.Op(values.Opset(domain, 1), name, schema)


_GQA = contrib(
    "com.microsoft",
    "GroupQueryAttention",
    inputs=12,
    outputs=3,
    num_heads="INT",
    kv_num_heads="INT",
    scale="FLOAT",
    local_window_size="INT",
    softcap="FLOAT",
)
_TENSOR_SCATTER = contrib("", "TensorScatter", inputs=3, outputs=1, axis="INT")
"""Of opset 24, which a graph that has it has to import."""
FUSED_HEAD_MULTIPLE = 8
"""Head sizes that GroupQueryAttention supports are multiples of this."""
_ANGLES = contrib(
    DOMAIN,
    "RotaryAngles",
    inputs=3,
    outputs=2,
    query_heads="INT",
    key_heads="INT",
    value_heads="INT",
    query_factor="FLOAT",
)
"""Cosines and sines of the rotary angles at positions [B, S]; see `passes/rotary_angles.py`."""


def fused_attention(*arguments: Any) -> Any:
    """Translate to `com.microsoft` GroupQueryAttention, with RotaryEmbedding before it.

    The operator could rotate itself, but only from tables of all positions of the context. Head sizes that it does not
    support, and keys that are not cached as such, are attended to by the standard operator.
    """
    inputs = AttentionInputs(*arguments)
    query, key, value, past_key, past_value, mask, cos, sin, num_heads, num_kv_heads, scale, window, *_ = inputs
    if past_key is None or past_value is None or not can_fuse(past_key.shape[3], past_value.shape[3]):
        return _attention_over_slots(inputs)
    head_dim = past_key.shape[3]
    axis_1, zero, one = op.Constant(value_ints=[1]), op.Constant(value_int=0), op.Constant(value_int=1)
    last = op.Sub(op.ReduceSum(mask, axis_1, keepdims=0), one)  # position of the last token, [B]
    total = op.Cast(op.Squeeze(op.Shape(mask, start=1, end=2)), to=ir.DataType.INT32)
    if cos is not None:
        positions = _row_positions(query, last, axis_1, zero, one)
        query, key, value = _grow(inputs, positions, head_dim)
        # onnxruntime multiplies a single query with unpacked keys only if the factor is 1; see bench/RESULTS.md.
        factor, scale = (scale, 1.0) if 2 * cos.shape[1] == head_dim else (1.0, scale)
        if key is None:
            query = _rotate_packed(query, cos, sin, positions, num_heads, num_kv_heads, head_dim, factor)
        else:
            query, key = _rotate(query, key, cos, sin, positions, num_heads, num_kv_heads, head_dim, factor)
    attributes = {"num_heads": num_heads, "kv_num_heads": num_kv_heads} | _scale(scale, head_dim)
    if window:
        attributes["local_window_size"] = window
    if inputs.softcap:
        attributes["softcap"] = inputs.softcap
    optional = () if inputs.sinks is None else (*[None] * 4, inputs.sinks)
    lengths = op.Cast(last, to=ir.DataType.INT32)
    return _GQA(query, key, value, past_key, past_value, lengths, total, *optional, **attributes)


def can_fuse(key_size: int, value_size: int) -> bool:
    """Return whether GroupQueryAttention supports these head sizes."""
    return key_size == value_size and key_size % FUSED_HEAD_MULTIPLE == 0


def row_positions(query: Any, mask: Any) -> Any:
    """Return the positions of the new tokens [B, S] as fused graphs count them.

    Rows are padded on the right. Padding has the position of the last token.
    """
    axis_1, zero, one = op.Constant(value_ints=[1]), op.Constant(value_int=0), op.Constant(value_int=1)
    last = op.Sub(op.ReduceSum(mask, axis_1, keepdims=0), one)
    return _row_positions(query, last, axis_1, zero, one)


def _row_positions(query: Any, last: Any, axis_1: Any, zero: Any, one: Any) -> Any:
    """Return the positions of the new tokens [B, S], given those of the last tokens [B] and three constants."""
    new = op.Squeeze(op.Shape(query, start=1, end=2))
    column = op.Unsqueeze(last, axis_1)
    first = op.Max(op.Sub(op.Add(column, one), new), zero)
    return op.Min(op.Add(first, op.Range(zero, new, one)), column)


def append_to_cache(past: Any, new: Any, mask: Any) -> Any:
    """Translate `append_to_cache` to TensorScatter, which writes in place where past and present share a buffer."""
    zero = op.Constant(value_int=0)
    count = op.ReduceSum(mask, op.Constant(value_ints=[1]), keepdims=0)
    start = op.Max(op.Sub(count, op.Squeeze(op.Shape(new, start=2, end=3))), zero)  # [B]
    present = _TENSOR_SCATTER(past, new, start, axis=2)
    total = op.Shape(mask, start=1, end=2)
    return present, op.Slice(present, op.Constant(value_ints=[0]), total, op.Constant(value_ints=[2]))


def _attention_over_slots(inputs: AttentionInputs) -> Any:
    """Translate to Attention of opset 23 over the slots of a cache that past and present may share.

    Slots after a row's last token hold anything.
    """
    query, key, value, past_key, past_value, mask, cos, *_ = inputs
    if cos is not None or inputs.growth_length:
        raise ValueError("queries and keys have to be rotated before")
    present_key, present_value = op.Identity(key), op.Identity(value)  # unused; of a shape of their own
    if past_key is not None:
        new_key, new_value = (op.Transpose(op.Reshape(x, _heads(inputs)), perm=[0, 2, 1, 3]) for x in (key, value))
        present_key, key = append_to_cache(past_key, new_key, mask)
        present_value, value = append_to_cache(past_value, new_value, mask)
        key, value = (
            op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1])) for x in (key, value)
        )
    positions = row_positions(query, mask)
    total = op.Squeeze(op.Shape(mask, start=1, end=2))
    columns = op.Range(op.Constant(value_int=0), total, op.Constant(value_int=1))
    rows = op.Unsqueeze(positions, op.Constant(value_ints=[1, 3]))  # [B, 1, S, 1]
    visible = op.LessOrEqual(columns, rows)  # [B, 1, S, T]
    if inputs.window:
        visible = op.And(visible, op.Greater(columns, op.Sub(rows, op.Constant(value_int=inputs.window))))
    return _standard_attention(inputs, query, key, value, visible)[0], present_key, present_value


def _standard_attention(
    inputs: AttentionInputs, query: Any, key: Any, value: Any, visible: Any, past: tuple[Any, ...] = ()
) -> Any:
    """Attend to [B, T, K * D] with the standard operator; `visible` is bool [B, 1, S, T], `past` [B, K, P, D] each."""
    heads, kv_heads = inputs.num_heads, inputs.num_kv_heads
    attributes = {"q_num_heads": heads, "kv_num_heads": kv_heads, **_scale(inputs.scale, _key_size(inputs))}
    if inputs.softcap:
        attributes["softcap"] = inputs.softcap
    if inputs.sinks is None:
        return op.Attention(query, key, value, visible, *past, **attributes)
    if inputs.softcap:
        raise ValueError("bounded scores and sinks exclude each other")
    # One more slot, whose key and value are 0: its score is what the mask adds.
    padding = op.Constant(value_ints=[0, 0, 0, 0, 1, 0])
    key, value = (op.Pad(x, padding, _number(0.0)) for x in (key, value))
    bias = op.Where(visible, _number(0.0), _number(float("-inf")))
    sinks = op.Reshape(inputs.sinks, op.Constant(value_ints=[1, heads, 1, 1]))
    batch_and_rows = op.Shape(op.Squeeze(visible, op.Constant(value_ints=[1])), start=0, end=2)
    shape = op.Concat(
        op.Slice(batch_and_rows, op.Constant(value_ints=[0]), op.Constant(value_ints=[1])),
        op.Constant(value_ints=[heads]),
        op.Slice(batch_and_rows, op.Constant(value_ints=[1]), op.Constant(value_ints=[2])),
        op.Constant(value_ints=[1]),
        axis=0,
    )
    bias = op.Concat(op.Expand(bias, shape), op.Expand(sinks, shape), axis=3)
    return op.Attention(query, key, value, bias, **attributes)


def portable_attention(*arguments: Any) -> Any:
    """Translate to Attention and RotaryEmbedding of opset 23, with an explicit causal mask."""
    inputs = AttentionInputs(*arguments)
    query, key, value, past_key, past_value, mask, cos, sin, num_heads, num_kv_heads, _, window, *_ = inputs
    axis_0, axis_1, axes_12 = (op.Constant(value_ints=axes) for axes in ([0], [1], [1, 2]))
    slots, new_slots = _slots(query, mask)
    columns, rows = op.Unsqueeze(slots, axis_0), op.Unsqueeze(new_slots, axis_1)
    unpadded = op.Unsqueeze(op.Cast(mask, to=ir.DataType.BOOL), axes_12)  # [B, 1, 1, T]
    visible = op.And(op.LessOrEqual(columns, rows), unpadded)  # [B, 1, S, T]
    if window:
        visible = op.And(visible, op.Greater(columns, op.Sub(rows, op.Constant(value_int=window))))
    visible = op.Or(visible, op.Equal(columns, rows))

    if cos is not None or key is None:
        head_dim = _key_size(inputs)
        query, key, value = _unpack(query, key, value, num_heads, num_kv_heads, head_dim)
    if cos is not None:
        if inputs.growth_length:
            unpacked = inputs._replace(query=query, key=key, value=value)
            query, *_ = _grow(unpacked, _positions(query, mask), head_dim)
        query, key = _rotate(query, key, cos, sin, _positions(query, mask), num_heads, num_kv_heads, head_dim)
    if past_key is None:
        return _standard_attention(inputs, query, key, value, visible)[0], key, value
    if inputs.sinks is None:
        return _standard_attention(inputs, query, key, value, visible, (past_key, past_value))[:3]
    present_key, present_value = (
        op.Concat(past, op.Transpose(op.Reshape(x, _heads(inputs)), perm=[0, 2, 1, 3]), axis=2)
        for past, x in ((past_key, key), (past_value, value))
    )
    key, value = (
        op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), op.Constant(value_ints=[0, 0, -1]))
        for x in (present_key, present_value)
    )
    return _standard_attention(inputs, query, key, value, visible)[0], present_key, present_value


def _key_size(inputs: AttentionInputs) -> int:
    """Return the size of a key's head."""
    return inputs.query.shape[2] // (inputs.num_heads + (2 * inputs.num_kv_heads if inputs.key is None else 0))


def _heads(inputs: AttentionInputs) -> Any:
    """Return the shape that takes keys or values [B, S, K * D] apart."""
    return op.Constant(value_ints=[0, 0, inputs.num_kv_heads, -1])


def _grow(inputs: AttentionInputs, positions: Any, head_dim: int) -> Any:
    """Return queries, keys and values; separate, with queries times the factors of their positions, if these grow."""
    query, key, value = inputs.query, inputs.key, inputs.value
    if not inputs.growth_length:
        return query, key, value
    query, key, value = _unpack(query, key, value, inputs.num_heads, inputs.num_kv_heads, head_dim)
    blocks = op.Cast(op.Div(positions, op.Constant(value_int=inputs.growth_length)), to=ir.DataType.FLOAT)  # integers
    one = _number(1.0)
    factors = op.Add(op.Mul(op.Log(op.Add(blocks, one)), _number(inputs.growth_rate)), one)
    return op.Mul(query, op.Unsqueeze(factors, op.Constant(value_ints=[2]))), key, value


def _number(value: float) -> Any:
    return op.Constant(value=ir.tensor(value, dtype=ir.DataType.FLOAT))


def _scale(scale: float, head_dim: int) -> dict[str, Any]:
    """Return the attribute unless it is the default of both operators."""
    return {} if scale == head_dim**-0.5 else {"scale": scale}


def _unpack(query: Any, key: Any, value: Any, num_heads: int, num_kv_heads: int, head_dim: int) -> Any:
    """Return queries, keys and values, each [B, S, heads * D]."""
    if key is not None:
        return query, key, value
    first, second = num_heads * head_dim, (num_heads + num_kv_heads) * head_dim
    axis = op.Constant(value_ints=[2])
    return tuple(
        op.Slice(query, op.Constant(value_ints=[start]), op.Constant(value_ints=[end]), axis)
        for start, end in ((0, first), (first, second), (second, _INT32_MAX))
    )


def _slots(query: Any, mask: Any) -> Any:
    """Return the indices of all slots [T] and of the new ones [S].

    The length of the past is derived from the mask: a buffer shared by past and present may be longer.
    """
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    total = op.Squeeze(op.Shape(mask, start=1, end=2))
    past_length = op.Sub(total, op.Squeeze(op.Shape(query, start=1, end=2)))
    return op.Range(zero, total, one), op.Range(past_length, total, one)


def _positions(query: Any, mask: Any) -> Any:
    """Return the positions of the new tokens, [B, S]."""
    zero, one = op.Constant(value_int=0), op.Constant(value_int=1)
    _, new_slots = _slots(query, mask)
    counted = op.Clip(op.Sub(op.CumSum(mask, one), one), zero)
    return op.Gather(counted, new_slots, axis=1)


def _rotate(
    query: Any,
    key: Any,
    cos: Any,
    sin: Any,
    positions: Any,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    factor: float = 1.0,
) -> Any:
    """Rotate queries and keys, and multiply queries by a factor."""
    kinds = {"query_heads": 0, "key_heads": 1, "value_heads": 0, "query_factor": 1.0}
    key_angles = _ANGLES(cos, sin, positions, **kinds)  # [B, S, D / 2]
    if factor == 1:
        query_angles = key_angles
    else:
        kinds |= {"query_heads": 1, "key_heads": 0, "query_factor": factor}
        query_angles = _ANGLES(cos, sin, positions, **kinds)
    return tuple(
        op.RotaryEmbedding(x, *angles, num_heads=heads, **_partial(cos, head_dim))
        for x, angles, heads in ((query, query_angles, num_heads), (key, key_angles, num_kv_heads))
    )


def _rotate_packed(
    packed: Any,
    cos: Any,
    sin: Any,
    positions: Any,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    factor: float,
) -> Any:
    """Rotate queries and keys in [B, S, (H + 2K) * D], and multiply queries by a factor.

    Each head becomes a row, and those of values have an angle of 0. Rotating them in place takes 1 µs per layer and
    token; taking them apart takes three copies.
    """
    heads = num_heads + 2 * num_kv_heads
    kinds = {"query_heads": num_heads, "key_heads": num_kv_heads, "value_heads": num_kv_heads, "query_factor": factor}
    cosines, sines = _ANGLES(cos, sin, positions, **kinds)
    rows = op.Reshape(packed, op.Constant(value_ints=[0, -1, head_dim]))  # [B, S * (H + 2K), D]
    rotated = op.RotaryEmbedding(rows, cosines, sines, num_heads=1, **_partial(cos, head_dim))
    return op.Reshape(rotated, op.Constant(value_ints=[0, -1, heads * head_dim]))


def _partial(cos: Any, head_dim: int) -> dict[str, int]:
    """Return the attribute of RotaryEmbedding for heads that are not rotated as a whole."""
    dim = 2 * cos.shape[1]
    return {} if dim == head_dim else {"rotary_embedding_dim": dim}
