"""One optimizer step: gradients of its rows, clipping, AdamW."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from llm_edge.finetune.data.sample import Sample
from llm_edge.finetune.distributed import Processes, whole
from llm_edge.finetune.loss import batch_loss
from llm_edge.finetune.options import FinetuneOptions, Precision
from llm_edge.finetune.packing import Batch
from llm_edge.finetune.preparation import EMBEDDINGS, trained_parameters
from llm_edge.model.decoder import Decoder
from llm_edge.runtime.errors import ParameterError


def accumulate(
    decoder: Decoder,
    rows: Sequence[Sequence[Sample]],
    options: FinetuneOptions,
    processes: Processes,
    interrupted: Callable[[], bool],
) -> float | None:
    """Compute the gradients of the mean loss over all targets of a step, however they are distributed over its rows.

    Returns:
        the mean loss, or None if the run was interrupted: the gradients are then incomplete.
    """
    device = decoder.embed_tokens.weight.device
    targets = sum(sample.targets for row in rows for sample in row)
    total = torch.zeros((), dtype=torch.float64, device=device)
    run = recompute if options.gradient_checkpointing else None
    factor = processes.count if processes.sharded else 1  # sharded gradients are averaged over the processes
    for row, counts in processes.share(rows):
        if interrupted():
            return None
        with autocast(decoder, options.precision):
            loss = batch_loss(decoder, Batch.of(row, device), run) * (counts / targets)
        (loss * factor).backward()  # type: ignore[no-untyped-call]
        total += loss.detach()
    if processes.sharded:
        processes.sum([total])
        return float(total)
    parameters = trained_parameters(decoder).values()
    for parameter in parameters:
        if parameter.grad is None:  # this process had no row
            parameter.grad = torch.zeros_like(parameter)
    processes.sum([total, *(parameter.grad for parameter in parameters if parameter.grad is not None)])
    return float(total)


def update(
    optimizer: torch.optim.Optimizer, parameters: dict[str, nn.Parameter], learning_rate: float, clip: float
) -> float:
    """Take an optimizer step with the accumulated gradients, clipped, and return their norm before."""
    norm = float(whole(nn.utils.clip_grad_norm_(parameters.values(), clip or math.inf)))
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
    if math.isfinite(norm):
        optimizer.step()
    optimizer.zero_grad()
    return norm


def make_optimizer(parameters: dict[str, nn.Parameter], options: FinetuneOptions) -> torch.optim.Optimizer:
    """Return AdamW, with weight decay for matrices only."""
    decayed = [value for name, value in parameters.items() if value.ndim > 1 and name not in EMBEDDINGS]
    others = [value for name, value in parameters.items() if value.ndim == 1 or name in EMBEDDINGS]
    groups = [{"params": decayed, "weight_decay": options.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW([group for group in groups if group["params"]], lr=options.peak_learning_rate, fused=True)


def autocast(decoder: Decoder, precision: Precision) -> contextlib.AbstractContextManager[Any]:
    """Compute matrix products within the block in a precision."""
    device = decoder.embed_tokens.weight.device.type
    return torch.autocast(device, torch.bfloat16, enabled=precision is Precision.BF16)


def recompute(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call a layer without keeping its inner activations; the backward pass computes them again."""
    return checkpoint(function, *arguments, use_reentrant=False, preserve_rng_state=False)


def check_finite(loss: float, norm: float, step: int, learning_rate: float) -> None:
    """Raise ParameterError if a step's loss or gradient is not finite."""
    if not (math.isfinite(loss) and math.isfinite(norm)):
        what = f"loss is {loss}" if not math.isfinite(loss) else f"norm of the gradient is {norm}"
        raise ParameterError(f"the {what} in step {step}: lower --learning-rate (now {learning_rate:.1e})")
