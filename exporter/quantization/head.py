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
    cap = Softcap(decoder.config.logit_softcap)
    log_sums = torch.stack(list(threads.map(partial(_log_sum, head, inputs, cap), parts)))
    log_total, ends = log_sums.logsumexp(0), log_sums.double().softmax(0).cumsum(0)
    uniform = torch.rand(len(inputs), dtype=torch.float64, generator=torch.Generator().manual_seed(_SEED))
    measure = partial(_measure_part, head, inputs, cap, log_total, candidates, reference)
    parts_left = uniform - torch.cat([torch.zeros_like(ends[:1]), ends[:-1]])
    tokens, mean = torch.zeros(len(inputs), dtype=torch.int64), torch.zeros_like(inputs)
    linear, exponential = (defaultdict[Blocks, Tensor](lambda: torch.zeros_like(uniform)) for _ in range(2))
    for part in threads.map(measure, parts, parts_left):  # added up at once: memory holds few parts
        tokens += part.skipped
        mean += part.mean
        for each in part.linear:
            linear[each] += part.linear[each]
            exponential[each] += part.exponential[each]
    drawn = head(tokens.clamp(max=decoder.config.vocab_size - 1))
    gradients = cap.scaled(drawn, cap((inputs * drawn).sum(-1, keepdim=True))) - mean
    # KL(p || q) = sum(p d) + log(sum(p exp(-d))) if logits differ by d: nothing large cancels out.
    return MeasuredHead(gradients, {each: linear[each] + exponential[each].log() for each in linear})


@dataclass(frozen=True, slots=True)
class Softcap:
    """The bound of the logits, see `ModelConfig.logit_softcap`; a bound of None changes nothing."""

    bound: float | None

    def __call__(self, logits: Tensor) -> Tensor:
        """Return the bounded logits."""
        return logits if self.bound is None else (logits / self.bound).tanh_().mul_(self.bound)

    def scaled(self, gradients: Tensor, capped: Tensor) -> Tensor:
        """Return gradients times the derivative of bounded logits, given these."""
        return gradients if self.bound is None else gradients * (1 - (capped / self.bound).square_())


def _parts(count: int) -> list[Tensor]:
    return list(torch.split(torch.arange(count), _ROWS))


@torch.inference_mode()  # holds for one thread
def _log_sum(head: _Rows, inputs: Tensor, cap: Softcap, part: Tensor) -> Tensor:
    """Return the logarithm of the sum of a part of the vocabulary, [S]."""
    return cap(inputs @ head(part).T).logsumexp(-1)


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
    cap: Softcap,
    log_total: Tensor,
    candidates: Mapping[Blocks, QuantizedBlocks],
    reference: Blocks,
    part: Tensor,
    left: Tensor,
) -> _MeasuredPart:
    """Measure a part of the vocabulary; the drawn token is the first at which the summed `p` exceed `left` [S]."""
    weight = head(part)
    logits = cap(inputs @ weight.T)
    probabilities = (logits - log_total[:, None]).exp_()
    skipped = (probabilities.cumsum(-1) <= left[:, None]).sum(-1)
    quantized = {each: whole.rows(part) for each, whole in candidates.items()}
    quantized[reference] = quantize_blocks(weight, reference)
    linear, exponential = {}, {}
    for each, rows in quantized.items():
        differences = logits - cap(apply(rows, inputs))
        linear[each] = (probabilities * differences).sum(-1).double()
        exponential[each] = differences.neg_().exp_().mul_(probabilities).sum(-1).double()
    return _MeasuredPart(skipped, cap.scaled(probabilities, logits) @ weight, linear, exponential)
