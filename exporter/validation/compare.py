"""Compares exported models, run by the runtime, with the reference decoder.

The reference runs once and its logits are stored in a file, so that it and an exported model are never in memory
together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from llm_edge.model.decoder import Decoder
from llm_edge.runtime.backend.session import MAX_STEP_TOKENS, Session

MAX_BOUND, MEAN_BOUND = 1e-3, 1e-4
"""Bounds of the largest and the mean absolute difference of fp32 logits from the reference."""

_KL_CHUNK = 64  # positions compared at once, to bound memory
_MAX_BYTES = 2 << 30  # of logits on disk; models with large vocabularies are scored on less text
_DECODE_STEPS = 16
_MAX_WINDOWS = 128


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
    """Differences of an exported model from the reference on the same tokens.

    Attributes:
        prefill: logits of a prompt processed in one step.
        steps: logits of tokens processed one by one after a prompt.
        chunk: logits of the second half of a prompt processed in two chunks.
        hidden_states: norm of the difference of hidden states relative to the reference, per position of a prompt;
            None if the model does not return them.
    """

    prefill: Difference
    steps: Difference
    chunk: Difference
    hidden_states: Difference | None = None

    @property
    def within_bounds(self) -> bool:
        """Whether all differences of logits are acceptable for fp32."""
        return all(difference.within_bounds for difference in (self.prefill, self.steps, self.chunk))

    def to_dict(self) -> dict[str, Any]:
        """Return the differences as stored in the manifest."""
        return {name: difference for name, difference in asdict(self).items() if difference is not None}

    @property
    def worst(self) -> Difference:
        """The largest maximum and the largest mean of the logits; NaN if any is NaN."""
        values = torch.tensor([(each.max, each.mean) for each in (self.prefill, self.steps, self.chunk)])
        return Difference(*values.amax(0).tolist())


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
    """

    tokens: int
    kl_mean: float
    kl_p999: float
    top1: float
    perplexity: float
    perplexity_reference: float


class Runnable(Protocol):
    """A model with a cache: a session of the runtime, or `Reference`."""

    def clear_cache(self) -> None:
        """Start from an empty context."""

    def step(self, tokens: Sequence[int], num_logits: int = 1) -> npt.NDArray[np.float32]:
        """Run new tokens and return the logits of the last `num_logits` positions; 0 returns all."""


class Reference:
    """A decoder in PyTorch with the interface `Runnable`."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._past = decoder.empty_past()

    def clear_cache(self) -> None:
        self._past = self._decoder.empty_past()

    @torch.inference_mode()
    def step(self, tokens: Sequence[int], num_logits: int = 1) -> npt.NDArray[np.float32]:
        mask = torch.ones(1, self._past[0][0].shape[2] + len(tokens), dtype=torch.int64)
        logits, self._past = self._decoder(torch.tensor([list(tokens)]), mask, self._past, num_logits)
        result: npt.NDArray[np.float32] = logits[0].numpy()
        return result


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens of each step of a run from an empty context, and the `offset` of its first position in the logits file."""

    chunks: tuple[tuple[int, ...], ...]
    offset: int

    @property
    def length(self) -> int:
        """Number of tokens in all chunks."""
        return sum(map(len, self.chunks))


@dataclass(frozen=True, slots=True)
class ReferenceLogits:
    """Recorded logits of the reference on the validation text; see `Parity` for the runs.

    Attributes:
        path: file of the logits, float32 [positions, V].
        vocab_size: V.
        prefill: the first of `windows`.
        steps: run token by token after a prompt.
        chunk: run in two chunks.
        windows: the text in windows that each start from an empty context.
        hidden_states: hidden states of `prefill`, [tokens, hidden].
    """

    path: Path
    vocab_size: int
    prefill: Run
    steps: Run
    chunk: Run
    windows: tuple[Run, ...]
    hidden_states: Tensor

    def logits(self, offset: int, count: int) -> Tensor:
        """Return the logits of `count` positions from `offset` on, [count, V]."""
        offset_bytes = 4 * offset * self.vocab_size
        flat = np.fromfile(self.path, dtype="<f4", count=count * self.vocab_size, offset=offset_bytes)
        return torch.from_numpy(flat).view(count, self.vocab_size)


def record_reference(
    decoder: Decoder, tokens: Sequence[int], path: Path, progress: Callable[[float], None]
) -> ReferenceLogits:
    """Run the reference on a text, split into windows of up to `MAX_STEP_TOKENS`, and record its logits in a file."""
    vocab, context = decoder.config.vocab_size, decoder.config.max_position_embeddings
    tokens = tokens[: max(_MAX_BYTES // (4 * vocab), 2 * MAX_STEP_TOKENS)]
    length = min(MAX_STEP_TOKENS, context)
    windows = [tuple(tokens[start : start + length]) for start in range(0, len(tokens), length)][:_MAX_WINDOWS]
    windows = [window for window in windows if len(window) > 1] or [tuple(tokens[:1])]
    prompt = windows[0]
    half = max(len(prompt) // 2, 1)
    decoded = prompt[half : half + min(_DECODE_STEPS, len(prompt) - half)]
    plans = [
        *((window,) for window in windows),
        (prompt[:half], *((token,) for token in decoded)),
        (prompt[:half], prompt[half:]) if len(prompt) > half else (prompt,),
    ]
    runs, offset, total = [], 0, sum(len(chunk) for plan in plans for chunk in plan)
    hidden: list[Tensor] = []
    hook = decoder.norm.register_forward_hook(lambda _module, _inputs, output: hidden.append(output[0]))
    reference = Reference(decoder)
    with path.open("wb") as file:
        for plan in plans:
            runs.append(Run(plan, offset))
            reference.clear_cache()
            for chunk in plan:
                reference.step(chunk, num_logits=0).astype("<f4", copy=False).tofile(file)
                hook.remove()  # the first chunk is all of `prefill`
            offset += runs[-1].length
            progress(offset / total)
    *scored, steps, chunked = runs
    states = hidden[0] * decoder.config.hidden_scale
    return ReferenceLogits(path, vocab, scored[0], steps, chunked, tuple(scored), states)


def compare(expected: ReferenceLogits, session: Runnable) -> Parity:
    """Run a model on the same tokens in the three ways of `Parity`."""
    differences = {}
    for name in ("prefill", "steps", "chunk"):
        run: Run = getattr(expected, name)
        session.clear_cache()
        largest, total, offset = 0.0, 0.0, run.offset
        for chunk in run.chunks:
            logits = torch.from_numpy(session.step(chunk, num_logits=0))
            difference = (logits - expected.logits(offset, len(chunk))).abs()
            largest = max(largest, difference.max().item()) if not difference.isnan().any() else float("nan")
            total, offset = total + difference.sum().item(), offset + len(chunk)
        differences[name] = Difference(largest, total / (run.length * expected.vocab_size))
    return Parity(**differences)


def compare_hidden_states(expected: ReferenceLogits, session: Session) -> Difference:
    """Run a model on the same prompt and compare its hidden states; see `Parity`."""
    (prompt,) = expected.prefill.chunks
    session.clear_cache()
    difference = torch.from_numpy(session.hidden_states(prompt)) - expected.hidden_states
    relative = difference.norm(dim=-1) / expected.hidden_states.norm(dim=-1)
    return Difference(relative.max().item(), relative.mean().item())


def score(expected: ReferenceLogits, session: Runnable, progress: Callable[[float], None]) -> Quality:
    """Measure the quality of a model on the validation text; `progress` is called with the completed fraction."""
    count = sum(run.length - 1 for run in expected.windows)
    divergences = torch.zeros(count, dtype=torch.float64)
    same, loss, loss_reference, done = 0, 0.0, 0.0, 0
    for run in expected.windows:
        (window,) = run.chunks
        session.clear_cache()
        logits = torch.from_numpy(session.step(window, num_logits=0))[:-1]
        for start in range(0, len(logits), _KL_CHUNK):
            positions = slice(start, start + _KL_CHUNK)
            targets = torch.tensor(window[1:][positions])
            log_probs = logits[positions].log_softmax(-1)
            reference = expected.logits(run.offset + start, len(targets)).log_softmax(-1)
            divergences[done : done + len(targets)] = (reference.exp() * (reference - log_probs)).sum(-1)
            same += int((reference.argmax(-1) == log_probs.argmax(-1)).sum())
            loss += _loss(log_probs, targets)
            loss_reference += _loss(reference, targets)
            done += len(targets)
        progress(done / max(count, 1))
    return Quality(
        tokens=count,
        kl_mean=max(divergences.mean().item(), 0.0),  # rounding errors can make it negative
        kl_p999=divergences.quantile(0.999).item(),
        top1=same / count,
        perplexity=math.exp(loss / count),
        perplexity_reference=math.exp(loss_reference / count),
    )


def _loss(log_probs: Tensor, targets: Tensor) -> float:
    return -log_probs.gather(1, targets[:, None]).double().sum().item()
