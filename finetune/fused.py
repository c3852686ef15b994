"""Norms and gated MLPs that keep less for the backward pass than PyTorch's own operations, and take fewer passes."""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_edge.model.config import Activation
from llm_edge.model.decoder import Decoder, FeedForward


def fuse(decoder: Decoder) -> None:
    """Replace the norms and the gated MLPs of a decoder; its parameters and what it computes stay the same."""
    for name, module in list(decoder.named_modules()):
        parent, _, attribute = name.rpartition(".")
        if type(module) is nn.RMSNorm:
            setattr(decoder.get_submodule(parent), attribute, FusedRMSNorm(module))
        elif type(module) is FeedForward and module.gated:
            setattr(decoder.get_submodule(parent), attribute, FusedFeedForward(module, decoder.config.activation))


class FusedRMSNorm(nn.RMSNorm):
    """RMSNorm that keeps its input and a factor per token; without gradients, that of PyTorch."""

    def __init__(self, norm: nn.RMSNorm) -> None:
        super().__init__(norm.normalized_shape, eps=norm.eps, device="meta")
        self.weight = norm.weight

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)
        autocast = torch.is_autocast_enabled(x.device.type)
        dtype = torch.get_autocast_dtype(x.device.type) if autocast else x.dtype  # what follows would round it
        output: Tensor = _RMSNorm.apply(x, self.weight, self.eps, dtype)  # type: ignore[no-untyped-call]
        return output


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        wide = x.float()
        factor = wide.square().mean(-1, keepdim=True).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, factor)
        return wide.mul(factor).mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, factor = ctx.saved_tensors
        gradient, wide = gradients[0].float(), x.float()
        weight_gradient = None
        if ctx.needs_input_grad[1]:
            weight_gradient = (gradient * wide).mul_(factor).flatten(0, -2).sum(0)
        scaled = gradient * weight
        shared = (scaled * wide).sum(-1, keepdim=True).mul_(factor.pow(3)).div_(x.shape[-1])
        return scaled.mul_(factor).addcmul_(wide, shared, value=-1).to(x.dtype), weight_gradient, None, None


class FusedFeedForward(FeedForward):
    """Gated MLP that keeps the output of `gate_up` and, unless `down` is a `GatedLinear`, the input of `down`."""

    def __init__(self, mlp: FeedForward, activation: Activation) -> None:
        nn.Module.__init__(self)
        self.width, self.gated, self.activation = mlp.width, True, mlp.activation
        self.gate_up, self.down = mlp.gate_up, mlp.down
        self._kind = activation

    def forward(self, x: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return super().forward(x)
        packed = self.gate_up(x)
        if isinstance(self.down, GatedLinear):
            return self.down.forward_gated(packed, self._kind)
        down: Tensor = self.down(_Gated.apply(packed, self._kind))  # type: ignore[no-untyped-call]
        return down


@runtime_checkable
class GatedLinear(Protocol):
    """A linear layer that takes the output of `gate_up`, so that it need not keep its own input."""

    def forward_gated(self, packed: Tensor, kind: Activation) -> Tensor:
        """Return the layer's output for `activation(gate) * up`."""


def gated(packed: Tensor, kind: Activation) -> Tensor:
    """Return `activation(gate) * up` of a packed [..., gate + up]."""
    gate, up = packed.chunk(2, -1)
    return _activate(gate, kind).mul_(up)


def gated_gradient(packed: Tensor, kind: Activation, outer: Tensor) -> Tensor:
    """Return the gradient of `gated` with respect to its input."""
    gate, up = packed.chunk(2, -1)
    result = torch.empty_like(packed)
    gate_result, up_result = result.chunk(2, -1)
    active = _activate(gate, kind)
    torch.mul(outer, active, out=up_result)
    torch.mul(outer, up, out=active)
    aten = torch.ops.aten
    if kind is Activation.SILU:
        aten.silu_backward.grad_input(active, gate, grad_input=gate_result)
    elif kind is Activation.RELU:
        aten.threshold_backward.grad_input(active, gate, 0, grad_input=gate_result)
    elif kind is Activation.RELU2:
        torch.mul(active, F.relu(gate).mul_(2), out=gate_result)
    else:
        aten.gelu_backward.grad_input(active, gate, approximate=_APPROXIMATION[kind], grad_input=gate_result)
    return result


def _activate(x: Tensor, kind: Activation) -> Tensor:
    if kind is Activation.SILU:
        return F.silu(x)
    if kind is Activation.RELU:
        return F.relu(x)
    if kind is Activation.RELU2:
        return F.relu(x).square_()
    return F.gelu(x, approximate=_APPROXIMATION[kind])


_APPROXIMATION = {Activation.GELU: "none", Activation.GELU_TANH: "tanh"}


class _Gated(torch.autograd.Function):
    """`gated`, keeping its input only."""

    @staticmethod
    def forward(ctx: Any, packed: Tensor, kind: Activation) -> Tensor:
        ctx.save_for_backward(packed)
        ctx.kind = kind
        return gated(packed, kind)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gated_gradient(ctx.saved_tensors[0], ctx.kind, gradients[0]), None
