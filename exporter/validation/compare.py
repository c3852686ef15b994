"""Compares the logits of an exported model with those of the reference decoder."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from llm_edge.exporter.validation.reference import ReferenceLogits
from llm_edge.exporter.validation.windows import Forward, Run

MAX_BOUND, MEAN_BOUND = 1e-3, 1e-4
"""Bounds of the largest and the mean absolute difference of fp32 logits from the reference."""

_BLOCK_ELEMENTS = 1 << 18  # logits compared at once: they stay in a processor's cache


@dataclass(frozen=True, slots=True)
class Difference:
    """The largest and the mean absolute difference of logits."""

    max: float
    mean: float

    @property
    def within_bounds(self) -> bool:
        """Whether the difference is acceptable for fp32."""
        return self.max <= MAX_BOUND and self.mean <= MEAN_BOUND  # False for NaN


@dataclass(frozen=True, slots=True)
class Parity:
    """Differences of a model from the reference, which computes all tokens in one step; None if not compared.

    Attributes:
        prefill: logits of a prompt processed in one step.
        steps: logits of tokens processed one by one after a prompt.
        chunk: logits of several tokens processed in one step after a prompt.
        beyond_windows: logits at the end of a text that is longer than every window of the attention.
        hidden_states: norm of the difference of hidden states relative to the reference, per position of a prompt.
    """

    prefill: Difference
    steps: Difference | None = None
    chunk: Difference | None = None
    beyond_windows: Difference | None = None
    hidden_states: Difference | None = None

    @property
    def within_bounds(self) -> bool:
        """Whether all differences of logits are acceptable for fp32."""
        return all(difference.within_bounds for difference in self._logits)

    def to_dict(self) -> dict[str, Any]:
        """Return the differences as stored in the manifest."""
        return {name: difference for name, difference in asdict(self).items() if difference is not None}

    @property
    def worst(self) -> Difference:
        """The largest maximum and the largest mean of the logits; NaN if any is NaN."""
        values = torch.tensor([(each.max, each.mean) for each in self._logits])
        return Difference(*values.amax(0).tolist())

    @property
    def _logits(self) -> list[Difference]:
        return [each for each in (self.prefill, self.steps, self.chunk, self.beyond_windows) if each is not None]


@dataclass(frozen=True, slots=True)
class Quality:
    """Fidelity of a precision on the validation text, in windows that each start from an empty context.

    Attributes:
        tokens: number of scored positions.
        kl_mean: mean Kullback-Leibler divergence KL(reference || model) of the next token, in nats.
        kl_p999: 99.9th percentile of the divergence.
        top1: fraction of positions with the same most likely token.
        perplexity: perplexity of the exported model.
        perplexity_reference: perplexity of the reference.
        kl_by_kind: mean divergence by kind of text; empty if there is a single kind.
    """

    tokens: int
    kl_mean: float
    kl_p999: float
    top1: float
    perplexity: float
    perplexity_reference: float
    kl_by_kind: Mapping[str, float] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Return the figures as stored in the manifest."""
        return {name: value for name, value in asdict(self).items() if value != {}}


class _Differences:
    """Collects the absolute differences of logits."""

    def __init__(self) -> None:
        self._largest, self._total, self._count = 0.0, 0.0, 0

    def add(self, expected: ReferenceLogits, offset: int, logits: Tensor) -> None:
        """Compare logits [tokens, V] with those of the reference from a position on."""
        rows = max(_BLOCK_ELEMENTS // expected.vocab_size, 1)
        for start in range(0, len(logits), rows):
            part = logits[start : start + rows]
            difference = (part - expected.logits(offset + start, len(part))).abs()
            largest = difference.max().item()  # NaN if any is NaN
            self._largest = largest if math.isnan(largest) else max(largest, self._largest)
            self._total += difference.sum().item()
            self._count += difference.numel()

    def result(self) -> Difference | None:
        """Return the largest and the mean difference; None if nothing was compared."""
        return Difference(self._largest, self._total / self._count) if self._count else None


def compare(expected: ReferenceLogits, forward: Forward) -> Parity:
    """Run a model on the same tokens in the three ways of `Parity`."""
    return _run(expected, forward, (expected.prompt,), None, lambda _: None)


def score(
    expected: ReferenceLogits, forward: Forward, progress: Callable[[float], None] = lambda _: None
) -> tuple[Parity, Quality]:
    """Compare a model, and measure its quality on the whole text; `progress` is called with the completed fraction."""
    scores = _Scores(expected)
    parity = _run(expected, forward, expected.windows, scores, progress)
    return parity, scores.quality()


def _run(
    expected: ReferenceLogits,
    forward: Forward,
    windows: tuple[Run, ...],
    scores: _Scores | None,
    progress: Callable[[float], None],
) -> Parity:
    """Run a model on the cached run and on windows, of which the first step is the prompt of `Parity`."""
    runs = expected.cached, *windows
    differences = {name: _Differences() for name in ("prefill", "steps", "chunk")}
    chunks = [(run, start, chunk) for run in runs for start, chunk in run.starts()]
    for number, ((run, start, chunk), logits) in enumerate(zip(chunks, forward(runs), strict=True)):
        if run is not expected.cached:
            name = "prefill" if start == expected.prompt.offset else None
        elif start == run.offset:
            name = None  # another prompt in one step
        else:
            name = "steps" if len(chunk) == 1 else "chunk"
        if name is not None:
            differences[name].add(expected, start, logits)
        if scores is not None and run is not expected.cached:
            scores.add(start, logits)
        progress((number + 1) / len(chunks))
    prefill = differences["prefill"].result()
    assert prefill is not None
    return Parity(prefill, differences["steps"].result(), differences["chunk"].result())


def compare_in_one_step(expected: ReferenceLogits, logits: Tensor) -> Parity:
    """Compare logits [tokens, V] of the begin of the text."""
    prefill = _Differences()
    prefill.add(expected, 0, logits)
    compared = prefill.result()
    assert compared is not None
    return Parity(compared)


def relative_difference(found: Tensor, expected: Tensor) -> Difference:
    """Return the norm of the difference of vectors [tokens, hidden] relative to the expected ones."""
    relative = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    return Difference(relative.max().item(), relative.mean().item())


class _Scores:
    """Collects divergence, agreement and loss of each position."""

    def __init__(self, expected: ReferenceLogits) -> None:
        self._expected = expected
        count = len(expected.targets)
        self._divergence, self._loss, self._loss_reference = torch.zeros(3, count, dtype=torch.float64)
        self._same = torch.zeros(count, dtype=torch.bool)
        self._rows = max(_BLOCK_ELEMENTS // expected.vocab_size, 1)
        # Memory that is allocated anew costs more than the computation in it.
        self._buffers = torch.empty(2, self._rows, expected.vocab_size)

    def add(self, offset: int, logits: Tensor) -> None:
        """Compare logits [tokens, V] with those of the reference from a position on."""
        for start in range(0, len(logits), self._rows):
            self._add_block(offset + start, logits[start : start + self._rows])

    def _add_block(self, offset: int, logits: Tensor) -> None:
        expected, positions = self._expected, slice(offset, offset + len(logits))
        log_probs, reference = self._buffers[:, : len(logits)]
        top = expected.top[positions, None]
        targets = expected.targets[positions, None].clamp(min=0)
        self._same[positions] = logits.gather(1, top)[:, 0] == logits.amax(-1)
        torch.log_softmax(logits, -1, out=log_probs)
        torch.log_softmax(expected.logits(offset, len(logits)), -1, out=reference)
        self._loss[positions] = -log_probs.gather(1, targets)[:, 0].double()
        self._loss_reference[positions] = -reference.gather(1, targets)[:, 0].double()
        torch.sub(reference, log_probs, out=log_probs)
        self._divergence[positions] = log_probs.mul_(reference.exp_()).sum(-1).double()

    def quality(self) -> Quality:
        """Return the figures of all positions that have a next token."""
        expected = self._expected
        scored = expected.targets >= 0
        divergence = self._divergence[scored]
        return Quality(
            tokens=len(divergence),
            kl_mean=max(divergence.mean().item(), 0.0),  # rounding errors can make it negative
            kl_p999=divergence.quantile(0.999).item(),
            top1=self._same[scored].double().mean().item(),
            perplexity=self._loss[scored].mean().exp().item(),
            perplexity_reference=self._loss_reference[scored].mean().exp().item(),
            kl_by_kind=self._by_kind(scored),
        )

    def _by_kind(self, scored: Tensor) -> dict[str, float]:
        expected = self._expected
        kinds = dict.fromkeys(expected.kinds)
        if len(kinds) < 2:
            return {}
        lengths = torch.tensor([len(run.tokens) for run in expected.windows])
        numbers = {kind: number for number, kind in enumerate(kinds)}
        of_position = torch.tensor([numbers[kind] for kind in expected.kinds]).repeat_interleave(lengths)
        return {
            kind: max(self._divergence[scored & (of_position == number)].mean().item(), 0.0)
            for kind, number in numbers.items()
        }
