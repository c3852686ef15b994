"""Compares ONNX graphs, run by the runtime, with the reference decoder. Knows nothing of how they were made."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_edge.exporter.model import Decoder, Past
from llm_edge.runtime.session import CHUNK, Session

MAX_BOUND, MEAN_BOUND = 1e-3, 1e-4
"""What fp32 logits may differ from the reference, at most and on average."""

_KL_ROWS = 64  # positions compared at once: bounds the memory of the logarithms


@dataclass(frozen=True, slots=True)
class Difference:
    """Absolute differences of logits: the largest and the mean."""

    max: float
    mean: float

    @property
    def within_bounds(self) -> bool:
        """Whether an fp32 graph may differ so much."""
        return self.max <= MAX_BOUND and self.mean <= MEAN_BOUND  # False for NaN


@dataclass(frozen=True, slots=True)
class Parity:
    """A graph against the reference, on the same tokens.

    Attributes:
        prefill: a prompt in one go.
        steps: token by token behind a prompt.
        chunk: a prompt over a past.
    """

    prefill: Difference
    steps: Difference
    chunk: Difference

    @property
    def within_bounds(self) -> bool:
        """Whether an fp32 graph may differ so much, in each of the three."""
        return all(part.within_bounds for part in (self.prefill, self.steps, self.chunk))

    @property
    def worst(self) -> Difference:
        """The largest of each figure; NaN where one is."""
        parts = torch.tensor([(part.max, part.mean) for part in (self.prefill, self.steps, self.chunk)])
        return Difference(*parts.amax(0).tolist())


@dataclass(frozen=True, slots=True)
class Quality:
    """What a precision costs on the validation text, in windows that each start from an empty context.

    Attributes:
        tokens: positions scored.
        kl_mean: mean Kullback-Leibler divergence KL(reference || graph) of the next token, in nats.
        kl_p999: its 99.9th percentile.
        top1: share of positions where both find the same token most likely.
        perplexity: of the graph.
        perplexity_reference: of the reference.
    """

    tokens: int
    kl_mean: float
    kl_p999: float
    top1: float
    perplexity: float
    perplexity_reference: float


class Reference:
    """The decoder behind the same door as a `Session`."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._past: Past = decoder.empty_past()

    def reset(self) -> None:
        """Start from an empty context."""
        self._past = self._decoder.empty_past()

    @torch.inference_mode()
    def step(self, tokens: Sequence[int]) -> Tensor:
        """All logits [n, V] of n new tokens."""
        total = self._past[0][0].shape[2] + len(tokens)
        mask = torch.ones(1, total, dtype=torch.int64)
        logits: Tensor
        logits, self._past = self._decoder(torch.tensor([list(tokens)]), mask, self._past)
        return logits[0]


def compare(reference: Reference, session: Session, tokens: Sequence[int]) -> Parity:
    """Run both over the same tokens in three ways; short contexts get shorter runs."""
    room = min(len(tokens), session.limit)
    prompt = tokens[: min(CHUNK, room)]
    half = max(len(prompt) // 2, 1)
    stepwise = min(16, len(prompt) - half)
    plans = {
        "prefill": [prompt],
        "steps": [prompt[:half], *([token] for token in prompt[half : half + stepwise])],
        "chunk": [prompt[:half], prompt[half:]] if len(prompt) > half else [prompt],
    }
    found = {}
    for name, pieces in plans.items():
        reference.reset()
        session.reset()
        largest, total, count = 0.0, 0.0, 0
        for piece in pieces:
            wanted = reference.step(piece)
            difference = (torch.from_numpy(session.step(piece, num_logits=0)) - wanted).abs()
            largest = max(largest, difference.max().item()) if not difference.isnan().any() else float("nan")
            total, count = total + difference.sum().item(), count + difference.numel()
        found[name] = Difference(largest, total / count)
    return Parity(**found)


def score(reference: Reference, session: Session, tokens: Sequence[int], progress: Callable[[float], None]) -> Quality:
    """Run the text once through the reference and once through a session.

    Args:
        reference: what the session is measured against.
        session: the graph.
        tokens: the text; it is cut into windows of at most `CHUNK` tokens.
        progress: is told the share that is done.
    """
    length = min(CHUNK, session.limit)
    windows = [tokens[start : start + length] for start in range(0, len(tokens), length)]
    windows = [window for window in windows if len(window) > 1]
    count = sum(len(window) - 1 for window in windows)
    divergences = torch.zeros(count, dtype=torch.float64)
    same, loss, loss_reference, done = 0, 0.0, 0.0, 0
    for window in windows:
        reference.reset()
        session.reset()
        wanted = reference.step(window)[:-1]
        found = torch.from_numpy(session.step(window, num_logits=0))[:-1]
        for start in range(0, len(wanted), _KL_ROWS):
            rows = slice(start, start + _KL_ROWS)
            targets = torch.tensor(window[1:][rows])
            logs, other = wanted[rows].log_softmax(-1), found[rows].log_softmax(-1)
            divergences[done : done + len(targets)] = (logs.exp() * (logs - other)).sum(-1)
            same += int((logs.argmax(-1) == other.argmax(-1)).sum())
            loss += _loss(other, targets)
            loss_reference += _loss(logs, targets)
            done += len(targets)
        progress(done / count)
    return Quality(
        tokens=count,
        kl_mean=divergences.mean().item(),
        kl_p999=divergences.quantile(0.999).item(),
        top1=same / count,
        perplexity=math.exp(loss / count),
        perplexity_reference=math.exp(loss_reference / count),
    )


def _loss(logs: Tensor, targets: Tensor) -> float:
    return -logs.gather(1, targets[:, None]).double().sum().item()
