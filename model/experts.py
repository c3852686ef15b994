"""Mixture-of-experts feed-forward networks, and the operator `llm_edge::experts`, which traces keep whole.

Shapes: N tokens, H hidden size, E experts, k experts per token, I width of an expert.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_edge.model import activations
from llm_edge.model.config import Activation
from llm_edge.model.operator import define_operator


class Gate(NamedTuple):
    """What an expert computes between its projections: activation(gate) * up, or activation(up) without gates.

    Attributes:
        activation: value of an `Activation`.
        gated: whether there are gate projections.
        interleaved: rows of the first projection alternate between gate and up; otherwise all of gate come first.
        slope: factor of the activation's argument, which is divided out again: x * sigmoid(slope * x) for SiLU.
        up_offset: added to up before the product.
        limit: gate is at most this and up at most this in magnitude; 0 for no limit.
    """

    activation: str
    gated: bool
    interleaved: bool
    slope: float
    up_offset: float
    limit: float

    def apply(self, projected: Tensor) -> Tensor:
        """Return the input of the down projection for the output of the first one, [..., I]."""
        activation = activations.FUNCTIONS[Activation(self.activation)]
        if not self.gated:
            return activation(projected)
        gate, up = (projected[..., ::2], projected[..., 1::2]) if self.interleaved else projected.chunk(2, dim=-1)
        if self.limit:
            gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return activation(gate * self.slope) / self.slope * (up + self.up_offset)


class ExpertsInputs(NamedTuple):
    """Arguments of the experts of a layer; the last ones are the fields of `Gate`.

    Attributes:
        x: tokens, [N, H].
        chosen: the experts of each token, int64 [N, k].
        weights: of these experts' outputs in the sum, [N, k].
        gate_up: gate and up projections, [E, 2I, H], or up projections alone, [E, I, H].
        gate_up_bias: [E, 2I] or [E, I], or None.
        down: down projections, [E, H, I].
        down_bias: [E, H], or None.
        transposed: `gate_up` is [E, H, 2I] and `down` [E, I, H].
    """

    x: Tensor
    chosen: Tensor
    weights: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None
    transposed: bool
    activation: str
    gated: bool
    interleaved: bool
    slope: float
    up_offset: float
    limit: float

    @property
    def gate(self) -> Gate:
        """What is between the projections."""
        return Gate(self.activation, self.gated, self.interleaved, self.slope, self.up_offset, self.limit)


def mixture(inputs: ExpertsInputs) -> Tensor:
    """Return the weighted sum of the outputs of each token's experts, [N, H]."""
    up, down = inputs.gate_up, inputs.down
    if inputs.transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    total = torch.zeros_like(inputs.x)
    for expert in range(len(up)):
        rows, columns = torch.where(inputs.chosen == expert)
        bias = None if inputs.gate_up_bias is None else inputs.gate_up_bias[expert]
        inner = inputs.gate.apply(F.linear(inputs.x[rows], up[expert], bias))
        bias = None if inputs.down_bias is None else inputs.down_bias[expert]
        output = F.linear(inner, down[expert], bias)
        total.index_add_(0, rows, output * inputs.weights[rows, columns, None].to(output.dtype))
    return total


experts = define_operator("experts", ExpertsInputs, 1, mixture, lambda inputs: torch.empty_like(inputs.x))
