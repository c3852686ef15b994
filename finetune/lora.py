"""LoRA (arXiv:2106.09685) with rank-stabilized scaling (arXiv:2312.03732) on the linear layers of a decoder.

A packed projection (queries, keys and values; gate and up) is adapted in parts, one for each tensor of the checkpoint,
because peft's files have an adapter for each of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from llm_edge.finetune.fused import gated, gated_gradient
from llm_edge.model.config import Activation
from llm_edge.model.decoder import Decoder

Rows = Callable[[str], tuple[int, ...] | None]
"""Returns the output rows of each part of a weight, by the weight's name in the decoder; None for a single part."""


class LoraLinear(nn.Linear):
    """A frozen linear layer plus the product of two low-rank matrices per part of its output.

    Attributes:
        lora_a: of all parts, [parts * rank, in].
        lora_b: of each part, [out, rank].
        scaling: factor of the product, alpha / sqrt(rank).
    """

    lora_b: nn.ParameterList

    def __init__(self, linear: nn.Linear, rows: tuple[int, ...], rank: int, alpha: float) -> None:
        with torch.device("meta"):
            super().__init__(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.weight, self.bias = linear.weight, linear.bias
        self.scaling = alpha / math.sqrt(rank)
        device = linear.weight.device
        self.lora_a = nn.Parameter(torch.empty(len(rows) * rank, linear.in_features, device=device))
        self.lora_b = nn.ParameterList(torch.zeros(count, rank, device=device) for count in rows)

    def forward(self, x: Tensor) -> Tensor:
        return self._forward(x, None)

    def forward_gated(self, packed: Tensor, kind: Activation) -> Tensor:
        return self._forward(packed, kind)

    def _forward(self, x: Tensor, kind: Activation | None) -> Tensor:
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
        tensors = (None if tensor is None else tensor.to(dtype) for tensor in (x, self.weight, self.bias, self.lora_a))
        b = (part.to(dtype) for part in self.lora_b)
        output: Tensor = _LoraProduct.apply(*tensors, kind, self.scaling, *b)  # type: ignore[no-untyped-call]
        return output

    def delta(self) -> Tensor:
        """Return what the adapter adds to the weight, float32 [out, in]."""
        parts = zip(self.lora_b, self.lora_a.chunk(len(self.lora_b)), strict=True)
        return torch.cat([self.scaling * (b.detach() @ a.detach()) for b, a in parts])


class _LoraProduct(torch.autograd.Function):
    """`x @ W.T + bias + scaling * x @ A.T @ B.T`, added in place; W and the bias get no gradients.

    With an activation, the input is a packed [..., gate + up], and x is computed from it, again for the backward pass.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        a: Tensor,
        kind: Activation | None,
        scaling: float,
        *b: Tensor,
    ) -> Tensor:
        flat = _input(x, kind)
        output = F.linear(flat, weight, bias)
        inner = F.linear(flat, a)
        for part, low, high in zip(_parts(output, b), inner.chunk(len(b), 1), b, strict=True):
            part.addmm_(low, high.T, alpha=scaling)
        ctx.save_for_backward(x, weight, a, inner, *b)
        ctx.kind, ctx.scaling = kind, scaling
        return output.reshape(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, a, inner, *b = ctx.saved_tensors
        outer = gradients[0].reshape(-1, gradients[0].shape[-1])
        inner_gradient = torch.empty_like(inner)
        b_gradients = []
        parts = _parts(outer, b), inner.chunk(len(b), 1), inner_gradient.chunk(len(b), 1), b
        for part, low, low_gradient, high in zip(*parts, strict=True):
            low_gradient.copy_(part @ high).mul_(ctx.scaling)
            b_gradients.append((part.T @ low).mul_(ctx.scaling))
        a_gradient = inner_gradient.T @ _input(x, ctx.kind)
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = (outer @ weight).addmm_(inner_gradient, a)
            if ctx.kind is not None:
                x_gradient = gated_gradient(x.reshape(-1, x.shape[-1]), ctx.kind, x_gradient)
            x_gradient = x_gradient.reshape(x.shape)
        return x_gradient, None, None, a_gradient, None, None, *b_gradients


def _input(x: Tensor, kind: Activation | None) -> Tensor:
    flat = x.reshape(-1, x.shape[-1])
    return flat if kind is None else gated(flat, kind)


def _parts(output: Tensor, b: Sequence[Tensor]) -> tuple[Tensor, ...]:
    return torch.split(output, [len(each) for each in b], 1)


def add_lora(decoder: Decoder, rows: Rows, rank: int, alpha: float, seed: int) -> None:
    """Freeze a decoder and adapt all linear layers of its layers.

    The product of the new matrices is zero: B is zero, A is initialized as in peft.
    """
    decoder.requires_grad_(False)
    generator = torch.Generator().manual_seed(seed)
    for name, module in list(decoder.layers.named_modules(prefix="layers")):
        if isinstance(module, nn.Linear):
            adapted = LoraLinear(module, rows(f"{name}.weight") or (module.out_features,), rank, alpha)
            bound = 1 / math.sqrt(module.in_features)
            values = torch.empty(adapted.lora_a.shape).uniform_(-bound, bound, generator=generator)
            adapted.lora_a.data.copy_(values)
            parent, _, attribute = name.rpartition(".")
            setattr(decoder.get_submodule(parent), attribute, adapted)


def lora_layers(decoder: Decoder) -> Iterator[tuple[str, LoraLinear]]:
    """Yield name and module of every adapted layer."""
    for name, module in decoder.named_modules():
        if isinstance(module, LoraLinear):
            yield name, module
