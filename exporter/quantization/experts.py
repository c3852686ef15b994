"""Quantizes the experts of a layer, each for the tokens that are routed to it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor

import torch
import torch.nn.functional as F
from torch import Tensor

from llm_edge.exporter.graph.experts import interleaved
from llm_edge.exporter.quantization.blocks import BlockLayout, QuantizedBlocks, concatenate, quantize_blocks
from llm_edge.exporter.quantization.hessian import Hessian
from llm_edge.model.experts import ExpertsInputs


def quantize_experts(
    inputs: ExpertsInputs, layouts: Sequence[BlockLayout], threads: Executor
) -> list[tuple[QuantizedBlocks, QuantizedBlocks]]:
    """Quantize with GPTQ in each layout; experts that no token is routed to are rounded to nearest.

    A token counts as much as its weight in the sum of its experts' outputs.

    Returns:
        by layout, first projections [E * 2I, H], interleaved (see `graph.experts.interleaved`), and `down` [E * H, I].

    Raises:
        CheckpointError: a weight or its inputs hold NaN or infinity.
    """

    @torch.inference_mode()  # holds for one thread
    def quantize(expert: int) -> list[tuple[QuantizedBlocks, QuantizedBlocks]]:
        up, down = (each[expert].T if inputs.transposed else each[expert] for each in (inputs.gate_up, inputs.down))
        rows, columns = torch.where(inputs.chosen == expert)
        x, shares = inputs.x[rows], inputs.weights[rows, columns, None]
        bias = None if inputs.gate_up_bias is None else inputs.gate_up_bias[expert]
        inner = inputs.gate.apply(F.linear(x, up, bias))
        hessians = [_hessian(x * shares), _hessian(inner * shares)]
        matrices = [interleaved(up[None], inputs.gate)[0], down]
        return [
            (quantize_blocks(matrices[0], layout, hessians[0]), quantize_blocks(matrices[1], layout, hessians[1]))
            for layout in layouts
        ]

    found = list(threads.map(quantize, range(len(inputs.gate_up))))
    return [
        (concatenate([each[number][0] for each in found]), concatenate([each[number][1] for each in found]))
        for number in range(len(layouts))
    ]


def _hessian(rows: Tensor) -> Hessian | None:
    return Hessian((rows.T @ rows).div_(len(rows))) if len(rows) else None
