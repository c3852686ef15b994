"""Translations of the operators of `model.recurrence` to ONNX: to onnxruntime's own operators.

The standard ones of the same names (opset 27) have no kernel in onnxruntime 1.32.
"""

from __future__ import annotations

from typing import Any

from onnxscript import opset23 as op

from llm_edge.exporter.graph.attention import contrib
from llm_edge.model.recurrence import ConvolutionInputs, LinearAttentionInputs

_CONVOLUTION = contrib("com.microsoft", "CausalConvWithState", inputs=4, outputs=2, activation="STRING")
_LINEAR_ATTENTION = contrib(
    "com.microsoft",
    "LinearAttention",
    inputs=6,
    outputs=2,
    q_num_heads="INT",
    kv_num_heads="INT",
    update_rule="STRING",
    scale="FLOAT",
)


def causal_convolution(*arguments: Any) -> Any:
    """Translate to CausalConvWithState; the new state is gathered, since the operator's own one includes padding."""
    x, weight, bias, state, mask, silu = ConvolutionInputs(*arguments)
    axis_1 = op.Constant(value_ints=[1])
    activation = "silu" if silu else "none"
    output, _ = _CONVOLUTION(x, op.Unsqueeze(weight, axis_1), bias, state, activation=activation)
    length = op.Squeeze(op.Shape(x, start=2, end=3))
    count = op.Min(op.ReduceSum(mask, axis_1, keepdims=0), length)  # new tokens of each row
    columns = op.Add(op.Unsqueeze(count, axis_1), op.Constant(value_ints=list(range(state.shape[2]))))
    indices = op.Expand(op.Unsqueeze(columns, axis_1), op.Shape(state))
    return output, op.GatherElements(op.Concat(state, x, axis=2), indices, axis=2)


def linear_attention(*arguments: Any) -> Any:
    """Translate to LinearAttention."""
    inputs = LinearAttentionInputs(*arguments)
    query, key, value, decay, beta, state, scale = inputs
    heads = query.shape[2]
    packed = (op.Reshape(x, op.Constant(value_ints=[0, 0, -1])) for x in (query, key, value))
    decay = decay if len(decay.shape) == 3 else op.Reshape(decay, op.Constant(value_ints=[0, 0, -1]))
    output, present = _LINEAR_ATTENTION(
        *packed,
        state,
        decay,
        beta,
        q_num_heads=heads,
        kv_num_heads=heads,
        update_rule="gated" if beta is None else "gated_delta",
        scale=scale,
    )
    return op.Reshape(output, op.Constant(value_ints=[0, 0, heads, value.shape[3]])), present
