"""Quantizes the embedding and the head, and measures the head, some rows at a time: they can be half of a model."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from llm_edge.exporter.layerwise import LayerwiseDecoder
from llm_edge.exporter.quantization.blocks import BlockLayout, QuantizedBlocks, concatenate, quantize_blocks
from llm_edge.exporter.quantization.formats.base import apply
from llm_edge.exporter.quantization.formats.blocks import Blocks
from llm_edge.exporter.quantization.hessian import Hessian

_ROWS = 2048  # in float32 at once
_SEED = 17
_Rows = Callable[[Tensor], Tensor]
"""Returns rows of a weight by number, float32 [rows, K]."""


@dataclass(frozen=True, slots=True)
class MeasuredHead:
    """The head on some inputs.

    Attributes:
        gradients: of the log-likelihood of one drawn token per input with respect to the inputs, float32 [S, hidden].
        divergences: KL divergence, in nats, of each format on each input, float64 [S].
    """

    gradients: Tensor
    divergences: Mapping[Blocks, Tensor]


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
    outputs = Outputs(decoder.head_bias(), decoder.config.logit_softcap)
    log_sums = torch.stack(list(threads.map(partial(_log_sum, head, inputs, outputs), parts)))
    log_total, ends = log_sums.logsumexp(0), log_sums.double().softmax(0).cumsum(0)
    uniform = torch.rand(len(inputs), dtype=torch.float64, generator=torch.Generator().manual_seed(_SEED))
    measure = partial(_measure_part, head, inputs, outputs, log_total, candidates, reference)
    parts_left = uniform - torch.cat([torch.zeros_like(ends[:1]), ends[:-1]])
    tokens, mean = torch.zeros(len(inputs), dtype=torch.int64), torch.zeros_like(inputs)
    linear, exponential = (defaultdict[Blocks, Tensor](lambda: torch.zeros_like(uniform)) for _ in range(2))
    for part in threads.map(measure, parts, parts_left):  # added up at once: memory holds few parts
        tokens += part.skipped
        mean += part.mean
        for each in part.linear:
            linear[each] += part.linear[each]
            exponential[each] += part.exponential[each]
    tokens.clamp_(max=decoder.config.vocab_size - 1)
    drawn = head(tokens)
    logits = outputs.logits((inputs * drawn).sum(-1), tokens)[:, None]
    gradients = outputs.scaled(drawn, logits) - mean
    # KL(p || q) = sum(p d) + log(sum(p exp(-d))) if logits differ by d: nothing large cancels out.
    return MeasuredHead(gradients, {each: linear[each] + exponential[each].log() for each in linear})


@dataclass(frozen=True, slots=True)
class Outputs:
    """What the head does with its products.

    Attributes:
        bias: float32 [V], or None.
        softcap: see `ModelConfig.logit_softcap`.
    """

    bias: Tensor | None
    softcap: float | None

    def logits(self, products: Tensor, tokens: Tensor) -> Tensor:
        """Return the logits of tokens for the products with their rows, [..., tokens]."""
        logits = products if self.bias is None else products + self.bias[tokens]
        return logits if self.softcap is None else logits.div_(self.softcap).tanh_().mul_(self.softcap)

    def scaled(self, gradients: Tensor, logits: Tensor) -> Tensor:
        """Return gradients of products, given those of the logits."""
        return gradients if self.softcap is None else gradients * (1 - (logits / self.softcap).square_())


def _parts(count: int) -> list[Tensor]:
    return list(torch.split(torch.arange(count), _ROWS))


@torch.inference_mode()  # holds for one thread
def _log_sum(head: _Rows, inputs: Tensor, outputs: Outputs, part: Tensor) -> Tensor:
    """Return the logarithm of the sum of a part of the vocabulary, [S]."""
    return outputs.logits(inputs @ head(part).T, part).logsumexp(-1)


@dataclass(frozen=True, slots=True)
class _MeasuredPart:
    """Sums over a part of the vocabulary, for the probabilities `p` and differences `d` of the logits.

    Attributes:
        skipped: number of tokens before the drawn one, [S].
        mean: sum of the gradients of the logits, weighted by `p`, [S, hidden].
        linear: sum of `p d`, float64 [S], by format.
        exponential: sum of `p exp(-d)`, float64 [S], by format.
    """

    skipped: Tensor
    mean: Tensor
    linear: Mapping[Blocks, Tensor]
    exponential: Mapping[Blocks, Tensor]


@torch.inference_mode()
def _measure_part(
    head: _Rows,
    inputs: Tensor,
    outputs: Outputs,
    log_total: Tensor,
    candidates: Mapping[Blocks, QuantizedBlocks],
    reference: Blocks,
    part: Tensor,
    left: Tensor,
) -> _MeasuredPart:
    """Measure a part of the vocabulary; the drawn token is the first at which the summed `p` exceed `left` [S]."""
    weight = head(part)
    logits = outputs.logits(inputs @ weight.T, part)
    probabilities = (logits - log_total[:, None]).exp_()
    skipped = (probabilities.cumsum(-1) <= left[:, None]).sum(-1)
    quantized = {each: whole.rows(part) for each, whole in candidates.items()}
    quantized[reference] = quantize_blocks(weight, reference)
    linear, exponential = {}, {}
    for each, rows in quantized.items():
        differences = logits - outputs.logits(apply(rows, inputs), part)
        linear[each] = (probabilities * differences).sum(-1).double()
        exponential[each] = differences.neg_().exp_().mul_(probabilities).sum(-1).double()
    return _MeasuredPart(skipped, outputs.scaled(probabilities, logits) @ weight, linear, exponential)
