"""Cross-entropy of the targets in chunks: the logits of all positions are never in memory at once."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_edge.finetune.packing import Batch
from llm_edge.model.decoder import Decoder, RunLayer

CHUNK = 6 << 20
"""Logits that are in memory at once: 24 MB in float32."""


def batch_loss(decoder: Decoder, batch: Batch, run: RunLayer | None = None) -> Tensor:
    """Return the sum of the cross-entropies of a batch's targets, a float64 scalar.

    Only the positions that predict a target reach the output head. `run` is that of `Decoder.forward_packed`.
    """
    hidden = decoder.forward_packed(batch.ids, batch.documents, run)
    head, softcap = decoder.lm_head, decoder.config.logit_softcap
    return cross_entropy(decoder.normalize(hidden[batch.rows]), head.weight, batch.targets, softcap, head.bias)


def cross_entropy(
    hidden: Tensor, head: Tensor, targets: Tensor, softcap: float | None = None, bias: Tensor | None = None
) -> Tensor:
    """Return the sum of the cross-entropies of `hidden @ head.T + bias`, a float64 scalar.

    Args:
        hidden: inputs of the output head, [N, hidden].
        head: weight of the output head, [V, hidden].
        targets: int64 [N].
        softcap: bound of the logits, see `ModelConfig.logit_softcap`.
        bias: of the output head, [V].
    """
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind):
        hidden = hidden.to(torch.get_autocast_dtype(kind))
    given = (hidden, head) if bias is None else (hidden, head, bias)
    needs_gradient = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in given)
    loss: Tensor = _ChunkedCrossEntropy.apply(hidden, head, bias, targets, needs_gradient, softcap)  # type: ignore[no-untyped-call]
    return loss


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Computes the gradients in the forward pass, chunk by chunk, and only scales them in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        needs_gradient: bool,
        softcap: float | None,
    ) -> Tensor:
        total = torch.zeros((), dtype=torch.float64, device=hidden.device)
        trains_hidden = needs_gradient and ctx.needs_input_grad[0]
        trains_head = needs_gradient and ctx.needs_input_grad[1]
        hidden_gradient = torch.empty_like(hidden) if trains_hidden else None
        head_gradient = torch.zeros_like(head) if trains_head else None
        bias_gradient = torch.zeros_like(bias) if bias is not None and needs_gradient else None
        weight, offsets = head.to(hidden.dtype), None if bias is None else bias.to(hidden.dtype)
        rows = max(1, CHUNK // head.shape[0])
        for start in range(0, len(targets), rows):
            inputs, wanted = hidden[start : start + rows], targets[start : start + rows, None]
            scores, slope = _cap(F.linear(inputs, weight, offsets).float(), softcap)  # [rows, V]
            scores -= scores.amax(-1, keepdim=True)
            total -= scores.gather(1, wanted).sum(dtype=torch.float64)
            sums = scores.exp_().sum(-1, keepdim=True)
            total += sums.log().sum(dtype=torch.float64)
            if not needs_gradient:
                continue
            scores /= sums
            scores.scatter_add_(1, wanted, scores.new_full((1, 1), -1.0).expand_as(wanted))  # softmax - one hot
            if slope is not None:
                scores *= slope
            if bias_gradient is not None:
                bias_gradient += scores.sum(0)
            scores = scores.to(hidden.dtype)
            if hidden_gradient is not None:
                torch.mm(scores, weight, out=hidden_gradient[start : start + rows])
            if head_gradient is not None:
                _add_product(head_gradient, scores.T, inputs)
        ctx.gradients = hidden_gradient, head_gradient, bias_gradient
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        own_gradients = (None if own is None else own.mul_(gradients[0].to(own.dtype)) for own in ctx.gradients)
        return (*own_gradients, None, None, None)


def _cap(scores: Tensor, softcap: float | None) -> tuple[Tensor, Tensor | None]:
    """Return the bounded scores, computed in place, and their derivatives."""
    if softcap is None:
        return scores, None
    bounded = scores.div_(softcap).tanh_()
    slope = 1 - bounded.square()
    return bounded.mul_(softcap), slope


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    """Add `left @ right` to a tensor, which may have another dtype."""
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right
