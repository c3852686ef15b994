"""Quantizes the embedding and the head, and measures the head, some rows at a time: they can be half of a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llm_edge.exporter.layerwise import LayerwiseDecoder
from llm_edge.exporter.quantization.blocks import BlockLayout, QuantizedBlocks, concatenate, quantize_blocks
from llm_edge.exporter.quantization.formats.blocks import Blocks
from llm_edge.exporter.quantization.gptq import Hessian

_ROWS = 1 << 13  # in float32 at once
_SEED = 17
_Rows = Callable[[Tensor], Tensor]
"""Returns rows of a weight by number, float32 [rows, K]."""


@dataclass(frozen=True, slots=True)
class MeasuredHead:
    """The head on some inputs.

    Attributes:
        gradients: of the log-likelihood of one drawn token per input with respect to the inputs, float32 [S, hidden].
        divergences: mean KL divergence, in nats, of each format.
    """

    gradients: Tensor
    divergences: Mapping[Blocks, float]


def quantize_rows(
    rows: _Rows, count: int, layout: BlockLayout, hessian: Hessian | None, threads: Executor
) -> QuantizedBlocks:
    """Quantize `count` rows of a weight, which `rows` reads by number, with GPTQ if there is a Hessian."""
    parts = list(threads.map(lambda part: quantize_blocks(rows(part), layout, hessian), _parts(count)))
    return concatenate(parts)


def measure_head(
    decoder: LayerwiseDecoder,
    inputs: Tensor,
    candidates: Mapping[Blocks, QuantizedBlocks],
    reference: Blocks,
    threads: Executor,
) -> MeasuredHead:
    """Draw a token for each input [S, hidden], and measure the head in several formats.

    `reference` is a format to which the head is rounded here, to nearest.
    """
    parts, head = _parts(decoder.config.vocab_size), decoder.head_rows()
    drawn = list(threads.map(partial(_draw, head, inputs), parts))
    log_totals = torch.stack([each for each, *_ in drawn]).logsumexp(0)
    best = torch.stack([score for _, score, _ in drawn]).argmax(0)
    tokens = torch.stack([token for *_, token in drawn]).gather(0, best[None])[0]
    measured = list(threads.map(partial(_measure_part, head, inputs, log_totals, candidates, reference), parts))
    gradients = head(tokens)
    for gradient, _ in measured:
        gradients -= gradient
    entropy = sum(stats[None][0] for _, stats in measured)
    divergences = {}
    for each in (*candidates, reference):
        expected = sum(stats[each][0] for _, stats in measured)
        totals = torch.stack([stats[each][1] for _, stats in measured]).logsumexp(0)
        divergences[each] = (entropy - expected + totals).mean().item()
    return MeasuredHead(gradients, divergences)


def _parts(count: int) -> list[Tensor]:
    return list(torch.split(torch.arange(count), _ROWS))


@torch.inference_mode()
def _draw(head: _Rows, inputs: Tensor, part: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the logarithm of the sum over a part of the vocabulary, and its best token with its score.

    The token with the best score, a logit with noise of a Gumbel distribution, is a token drawn from the distribution.
    """
    logits = inputs @ head(part).T
    generator = torch.Generator().manual_seed(_SEED + int(part[0]))
    noise = torch.empty_like(logits).exponential_(generator=generator).log_().neg_()
    score, token = (logits + noise).max(-1)
    return logits.logsumexp(-1), score, token + part[0]


@torch.inference_mode()
def _measure_part(
    head: _Rows,
    inputs: Tensor,
    log_totals: Tensor,
    candidates: Mapping[Blocks, QuantizedBlocks],
    reference: Blocks,
    part: Tensor,
) -> tuple[Tensor, dict[Blocks | None, tuple[Tensor, Tensor]]]:
    """Return, for a part of the vocabulary, the mean row of the head, and for each format two sums per input.

    They are the mean of the logits and the logarithm of their total; for None, the mean of the log-probabilities.
    """
    weight = head(part)
    expected = (inputs @ weight.T).sub_(log_totals[:, None])
    probabilities = expected.exp()
    stats: dict[Blocks | None, tuple[Tensor, Tensor]] = {None: (_dot(probabilities, expected), log_totals)}
    quantized = {each: whole.rows(part) for each, whole in candidates.items()}
    quantized[reference] = quantize_blocks(weight, reference)
    for each, rows in quantized.items():
        logits = rows.apply(inputs)
        stats[each] = (_dot(probabilities, logits), logits.logsumexp(-1))
    return probabilities @ weight, stats


def _dot(probabilities: Tensor, values: Tensor) -> Tensor:
    return (probabilities * values).sum(-1, dtype=torch.float64)
