"""The ONNX forms of the operators of `llm_edge.model`, one node each, compared with their references."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from torch import Tensor, nn

from llm_edge.exporter.graph import attention, recurrence
from llm_edge.exporter.graph.editor import Editor
from llm_edge.exporter.graph.experts import EXPERTS, experts, lower_experts
from llm_edge.exporter.graph.trace import quiet
from llm_edge.exporter.quantization.blocks import BlockLayout, quantize_blocks
from llm_edge.model.attention import AttentionInputs, cached_attention
from llm_edge.model.experts import ExpertsInputs, Gate, mixture
from llm_edge.model.recurrence import (
    ConvolutionInputs,
    LinearAttentionInputs,
    causal_convolution,
    convolution,
    linear_attention,
    linear_recurrence,
)

BATCH, PAST, NEW, HEADS, KV_HEADS = 2, 5, 3, 4, 2


class Call(nn.Module):
    """Calls an operator with the tensors that it gets and fixed other arguments."""

    def __init__(self, operator: Callable[..., Any], rest: Sequence[Any]) -> None:
        super().__init__()
        self.operator, self.rest = operator, rest

    def forward(self, *tensors: Tensor | None) -> Any:
        return self.operator(*tensors, *self.rest)


def exported(module: nn.Module, inputs: Sequence[Any], table: dict[Any, Callable[..., Any]]) -> ir.Model:
    with quiet():
        program = torch.onnx.export(
            module.eval(),
            tuple(inputs),
            dynamo=True,
            opset_version=23,
            optimize=False,
            verbose=False,
            custom_translation_table=table,
        )
    assert program is not None
    return program.model


def exported_call(
    operator: Callable[..., Any], inputs: Sequence[Any], table: dict[Any, Callable[..., Any]]
) -> ir.Model:
    """The graph of a call whose last arguments are no tensors."""
    count = max(number for number, value in enumerate(inputs) if isinstance(value, Tensor)) + 1
    return exported(Call(operator, inputs[count:]), inputs[:count], table)


def run(model: ir.Model, inputs: Sequence[Any], path: Path) -> list[Any]:
    if any(node.op_type == "TensorScatter" for node in model.graph):
        model.opset_imports[""] = 24
    ir.save(model, path)
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    tensors = [value.numpy() for value in inputs if isinstance(value, Tensor)]
    return session.run(None, dict(zip([each.name for each in session.get_inputs()], tensors, strict=True)))


def attention_inputs(key_size: int, value_size: int, *, window: int, softcap: float, sinks: bool) -> AttentionInputs:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    return AttentionInputs(
        random(1, NEW, HEADS * key_size),
        random(1, NEW, KV_HEADS * key_size),
        random(1, NEW, KV_HEADS * value_size),
        random(1, KV_HEADS, PAST, key_size),
        random(1, KV_HEADS, PAST, value_size),
        torch.ones(1, PAST + NEW, dtype=torch.int64),
        None,
        None,
        HEADS,
        KV_HEADS,
        0.3,
        window,
        0,
        softcap,
        0.0,
        0,
        random(HEADS) if sinks else None,
    )


@pytest.mark.parametrize("form", ["fused", "portable"])
@pytest.mark.parametrize(("key_size", "value_size"), [(16, 16), (12, 12), (24, 16)])
@pytest.mark.parametrize(("window", "softcap", "sinks"), [(0, 0.0, False), (4, 0.0, True), (4, 2.0, False)])
def test_attention(
    tmp_path: Path, form: str, key_size: int, value_size: int, window: int, softcap: float, sinks: bool
) -> None:
    inputs = attention_inputs(key_size, value_size, window=window, softcap=softcap, sinks=sinks)
    translate = attention.fused_attention if form == "fused" else attention.portable_attention

    def call(*tensors: Tensor) -> Any:
        return cached_attention(*tensors[:6], None, None, *inputs[8:16], tensors[6] if sinks else None)

    given = [*inputs[:6], *([inputs.sinks] if sinks else [])]
    model = exported_call(call, given, {torch.ops.llm_edge.cached_attention.default: translate})
    fused = any(node.op_type == "GroupQueryAttention" for node in model.graph)
    assert fused == (form == "fused" and key_size == value_size == 16)
    if form == "fused":  # buffers with room for more tokens
        room = [torch.nn.functional.pad(each, (0, 0, 0, NEW)) for each in (inputs.past_key, inputs.past_value)]
        given[3:5] = room
        for value in (*model.graph.inputs, *model.graph.outputs):
            value.shape = None
    found, expected = run(model, given, tmp_path / "graph.onnx"), cached_attention(*inputs)
    for one, other in zip(found, expected, strict=True):
        one = one[:, :, : PAST + NEW] if other.ndim == 4 else one
        assert np.abs(one - other.numpy()).max() < 1e-5


@pytest.mark.parametrize("silu", [True, False])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lengths", [(6, 6), (6, 2), (1, 1)])
def test_convolution(tmp_path: Path, silu: bool, bias: bool, lengths: tuple[int, int]) -> None:
    generator = torch.Generator().manual_seed(0)
    channels, width, new = 8, 4, max(lengths)
    mask = (torch.arange(new) < torch.tensor(lengths)[:, None]).long()
    inputs = ConvolutionInputs(
        torch.randn(BATCH, channels, new, generator=generator),
        torch.randn(channels, width, generator=generator),
        torch.randn(channels, generator=generator) if bias else None,
        torch.randn(BATCH, channels, width - 1, generator=generator),
        mask,
        silu,
    )
    operator = torch.ops.llm_edge.causal_convolution.default
    model = exported_call(causal_convolution, inputs, {operator: recurrence.causal_convolution})
    for one, other in zip(run(model, inputs, tmp_path / "graph.onnx"), convolution(inputs), strict=True):
        assert np.abs(one - other.numpy()).max() < 1e-5


def test_the_state_of_a_convolution_is_that_of_a_row_without_its_padding() -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight = torch.randn(1, 8, 6, generator=generator), torch.randn(8, 4, generator=generator)
    state = torch.randn(1, 8, 3, generator=generator)
    for length in range(1, 7):
        mask = (torch.arange(6) < length).long()[None]
        _, padded = convolution(ConvolutionInputs(x, weight, None, state, mask, silu=False))
        _, alone = convolution(ConvolutionInputs(x[..., :length], weight, None, state, mask[:, :length], silu=False))
        assert torch.equal(padded, alone)


@pytest.mark.parametrize("delta", [True, False])
@pytest.mark.parametrize("new", [1, 7])
def test_linear_attention(tmp_path: Path, delta: bool, new: int) -> None:
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    inputs = LinearAttentionInputs(
        random(BATCH, new, HEADS, 8),
        random(BATCH, new, HEADS, 8) / 3,
        random(BATCH, new, HEADS, 6),
        -random(BATCH, new, HEADS).abs(),
        random(BATCH, new, HEADS).sigmoid() if delta else None,
        random(BATCH, HEADS, 8, 6),
        0.4,
    )
    operator = torch.ops.llm_edge.linear_attention.default
    model = exported_call(linear_attention, inputs, {operator: recurrence.linear_attention})
    for one, other in zip(run(model, inputs, tmp_path / "graph.onnx"), linear_recurrence(inputs), strict=True):
        assert np.abs(one - other.numpy()).max() < 1e-5


def test_the_delta_rule_is_that_of_transformers() -> None:
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 20, HEADS, 8, generator=generator) for _ in range(3))
    decay = -torch.rand(1, 20, HEADS, generator=generator)
    beta = torch.rand(1, 20, HEADS, generator=generator)
    state = torch.randn(1, HEADS, 8, 8, generator=generator)
    key = key / key.norm(dim=-1, keepdim=True)
    expected, after = torch_chunk_gated_delta_rule(
        query, key, value, decay, beta, initial_state=state, output_final_state=True
    )
    found, present = linear_recurrence(LinearAttentionInputs(query, key, value, decay, beta, state, 8**-0.5))
    assert torch.allclose(found, expected, atol=1e-5)
    assert torch.allclose(present, after, atol=1e-5)


class ExpertsLayer(nn.Module):
    """Experts as parameters; `route` returns what they take for hidden states and what else is given."""

    def __init__(self, inputs: ExpertsInputs, route: Callable[..., Any] = lambda *given: given) -> None:
        super().__init__()
        self.route = route
        for name in ("gate_up", "gate_up_bias", "down", "down_bias"):
            weight = getattr(inputs, name)
            setattr(self, name, None if weight is None else nn.Parameter(weight, requires_grad=False))
        self.rest = inputs[7:]

    def forward(self, x: Tensor, *given: Tensor) -> Any:
        x, chosen, weights = self.route(x, *given)
        return torch.ops.llm_edge.experts(
            x, chosen, weights, self.gate_up, self.gate_up_bias, self.down, self.down_bias, *self.rest
        )


def lowered_experts(inputs: ExpertsInputs, layout: BlockLayout | None = None) -> ir.Model:
    return lowered(ExpertsLayer(inputs), inputs[:3], layout)


def lowered(layer: ExpertsLayer, inputs: Sequence[Tensor], layout: BlockLayout | None) -> ir.Model:
    model = exported(layer, inputs, {torch.ops.llm_edge.experts.default: experts})
    (node,) = (node for node in model.graph if node.op_type == EXPERTS)
    node.name = f"/layer/{EXPERTS}"
    lower_experts(Editor(model), node, dict(layer.named_parameters()), layout)
    del model.opset_imports["llm_edge"]
    return model


@pytest.mark.parametrize(
    ("activation", "gated", "slope", "offset", "limit"),
    [
        ("silu", True, 1.0, 0.0, 0.0),
        ("silu", True, 1.7, 1.0, 2.0),
        ("gelu_tanh", True, 1.0, 0.0, 0.0),
        ("gelu", True, 1.0, 0.0, 1.5),
        ("relu2", False, 1.0, 0.0, 0.0),
    ],
)
@pytest.mark.parametrize(("interleaved", "transposed"), list(itertools.product([False, True], repeat=2)))
@pytest.mark.parametrize("bias", [True, False])
def test_experts(
    tmp_path: Path,
    activation: str,
    gated: bool,
    slope: float,
    offset: float,
    limit: float,
    interleaved: bool,
    transposed: bool,
    bias: bool,
) -> None:
    generator = torch.Generator().manual_seed(0)
    count, hidden, inner, per_token = 4, 16, 8, 2

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    up, down = random(count, 2 * inner if gated else inner, hidden), random(count, hidden, inner)
    inputs = ExpertsInputs(
        random(5, hidden),
        random(5, count).topk(per_token).indices,
        random(5, per_token).abs(),
        up.transpose(1, 2).contiguous() if transposed else up,
        random(count, up.shape[1]) if bias else None,
        down.transpose(1, 2).contiguous() if transposed else down,
        random(count, hidden) if bias else None,
        transposed,
        activation,
        gated,
        interleaved and gated,
        slope,
        offset,
        limit,
    )

    model = lowered_experts(inputs)
    used = {node.op_type for node in model.graph}
    assert ("MoE" in used) == (activation == "silu")
    (found,) = run(model, inputs[:3], tmp_path / "graph.onnx")
    assert np.abs(found - mixture(inputs).numpy()).max() < 1e-4


@pytest.mark.parametrize("layout", [BlockLayout(8, 32, symmetric=True), BlockLayout(4, 16, symmetric=False)])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("bias", [True, False])
def test_experts_in_blocks(tmp_path: Path, layout: BlockLayout, transposed: bool, bias: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    count, hidden, inner, per_token = 4, 64, 32, 2

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    def turned(weight: Tensor) -> Tensor:
        return weight.transpose(1, 2).contiguous() if transposed else weight

    up, down = random(count, 2 * inner, hidden), random(count, hidden, inner)
    inputs = ExpertsInputs(
        random(5, hidden),
        random(5, count).topk(per_token).indices,
        random(5, per_token).abs(),
        turned(up),
        random(count, 2 * inner) if bias else None,
        turned(down),
        random(count, hidden) if bias else None,
        transposed,
        *Gate("silu", gated=True, interleaved=False, slope=1.0, up_offset=0.0, limit=0.0),
    )
    model = lowered_experts(inputs, layout)
    assert "QMoE" in {node.op_type for node in model.graph}
    (found,) = run(model, inputs[:3], tmp_path / "graph.onnx")
    rounded = [
        turned(quantize_blocks(each.flatten(0, 1), layout).dequantized(each.shape[2]).view_as(each))
        for each in (up, down)
    ]
    expected = mixture(inputs._replace(gate_up=rounded[0], down=rounded[1])).numpy()
    assert np.linalg.norm(found - expected) < 0.02 * np.linalg.norm(expected)  # activations have 8 bits


def softmax_of_largest(x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values, chosen = logits.topk(2)
    return x, chosen, values.softmax(-1)


def largest_of_softmax(x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values, chosen = logits.softmax(-1).topk(2)
    return x, chosen, values


def normalized_largest(x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, chosen, values = largest_of_softmax(x, logits)
    return x, chosen, values / values.sum(-1, keepdim=True)


def normalized_gathered(x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    shares = logits.softmax(-1, dtype=torch.float).to(x.dtype)
    chosen = shares.topk(2).indices
    values = shares.gather(1, chosen)
    return x, chosen, values / values.sum(dim=-1, keepdim=True)


def smallest(x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    values, chosen = logits.topk(2, largest=False)
    return x, chosen, values.softmax(-1)


def softmax_of_others(x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    chosen = logits.topk(2).indices
    return x, chosen, (-logits).gather(1, chosen).softmax(-1)


def divided_by_another_sum(x: Tensor, logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    x, chosen, values = largest_of_softmax(x, logits)
    return x, chosen, values / values.sum(0, keepdim=True)


@pytest.mark.parametrize("layout", [None, BlockLayout(8, 32, symmetric=True)])
@pytest.mark.parametrize(
    ("route", "within"),
    [
        (softmax_of_largest, True),
        (largest_of_softmax, True),
        (normalized_largest, True),
        (normalized_gathered, True),
        (smallest, False),
        (softmax_of_others, False),
        (divided_by_another_sum, False),
    ],
)
def test_operators_for_experts_compute_usual_routing_themselves(
    tmp_path: Path, layout: BlockLayout | None, route: Callable[..., Any], within: bool
) -> None:
    generator = torch.Generator().manual_seed(0)
    x, logits = torch.randn(5, 64, generator=generator), torch.randn(5, 4, generator=generator)
    up, down = torch.randn(4, 64, 64, generator=generator), torch.randn(4, 64, 32, generator=generator)
    gate = Gate("silu", gated=True, interleaved=False, slope=1.0, up_offset=0.0, limit=0.0)
    inputs = ExpertsInputs(*route(x, logits), up, None, down, None, False, *gate)
    model = lowered(ExpertsLayer(inputs, route), (x, logits), layout)
    within = within and (layout is None or route is not largest_of_softmax)  # QMoE always divides by the sum
    assert ("ScatterElements" in {node.op_type for node in model.graph}) == (not within)
    (found,) = run(model, (x, logits), tmp_path / "graph.onnx")
    expected = mixture(inputs).numpy()
    bound = 1e-5 if layout is None else 0.03  # 8 bits for weights and activations
    assert np.linalg.norm(found - expected) < bound * np.linalg.norm(expected)
