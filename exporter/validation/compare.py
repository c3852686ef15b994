"""Compares ONNX graphs, run by the runtime, with the reference decoder. Knows nothing of how they were made.

The reference runs once and its logits wait in a file, so that it and a graph are never in memory together.
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

from llm_edge.model.decoder import Decoder, Past
from llm_edge.runtime.backend.session import MAX_STEP_TOKENS, Session

MAX_BOUND, MEAN_BOUND = 1e-3, 1e-4
"""What fp32 logits may differ from the reference, at most and on average."""

_KL_ROWS = 64  # positions compared at once: bounds the memory of the logarithms
_MOST_BYTES = 2 << 30  # of logits on disk; models of large vocabularies are scored on less text
_STEPS = 16
_MOST_WINDOWS = 128


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
        hidden_states: of a prompt, position by position the length of the difference relative to that of the
            reference's; None where the graph has none.
    """

    prefill: Difference
    steps: Difference
    chunk: Difference
    hidden_states: Difference | None = None

    @property
    def within_bounds(self) -> bool:
        """Whether logits of an fp32 graph may differ so much, in each of the three."""
        return all(part.within_bounds for part in (self.prefill, self.steps, self.chunk))

    @property
    def told(self) -> dict[str, Any]:
        """As the manifest tells it."""
        return {name: figures for name, figures in asdict(self).items() if figures is not None}

    @property
    def worst(self) -> Difference:
        """The largest of each figure of logits; NaN where one is."""
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


class Runnable(Protocol):
    """What is compared: `Session` of the runtime, whichever it is."""

    def clear_cache(self) -> None:
        """Start from an empty context."""

    def step(self, tokens: Sequence[int], num_logits: int = 1) -> npt.NDArray[np.float32]:
        """Run new tokens; 0 gives the logits of all."""


class Reference:
    """A decoder in PyTorch as something to compare; see `Runnable`."""

    def __init__(self, decoder: Decoder) -> None:
        self._decoder = decoder
        self._past = decoder.empty_past()

    def clear_cache(self) -> None:
        """See `Runnable`."""
        self._past = self._decoder.empty_past()

    @torch.inference_mode()
    def step(self, tokens: Sequence[int], num_logits: int = 1) -> npt.NDArray[np.float32]:
        """See `Runnable`."""
        mask = torch.ones(1, self._past[0][0].shape[2] + len(tokens), dtype=torch.int64)
        logits, self._past = self._decoder(torch.tensor([list(tokens)]), mask, self._past, num_logits)
        found: npt.NDArray[np.float32] = logits[0].numpy()
        return found


@dataclass(frozen=True, slots=True)
class Run:
    """Tokens, piece by piece from an empty context, and where their logits begin in the file, in rows."""

    pieces: tuple[tuple[int, ...], ...]
    row: int

    @property
    def length(self) -> int:
        """Tokens of all pieces."""
        return sum(map(len, self.pieces))


@dataclass(frozen=True, slots=True)
class Expected:
    """What the reference says to the validation text.

    Attributes:
        path: logits as float32 rows.
        vocab_size: of a row.
        prefill: a prompt in one go; the first of `windows`.
        steps: token by token behind a prompt.
        chunk: a prompt over a past.
        windows: the text in windows that each start from an empty context.
        hidden_states: of `prefill`, [tokens, hidden].
    """

    path: Path
    vocab_size: int
    prefill: Run
    steps: Run
    chunk: Run
    windows: tuple[Run, ...]
    hidden_states: Tensor

    def logits(self, row: int, count: int) -> Tensor:
        """Rows of the file, [count, V]."""
        offset = 4 * row * self.vocab_size
        flat = np.fromfile(self.path, dtype="<f4", count=count * self.vocab_size, offset=offset)
        return torch.from_numpy(flat).view(count, self.vocab_size)


def record(decoder: Decoder, tokens: Sequence[int], path: Path, progress: Callable[[float], None]) -> Expected:
    """Run the reference over the validation text.

    Args:
        decoder: the reference, with its weights.
        tokens: the text; it is cut into windows of at most `MAX_STEP_TOKENS` tokens.
        path: file for the logits.
        progress: is told the share that is done.
    """
    vocab, context = decoder.config.vocab_size, decoder.config.max_position_embeddings
    tokens = tokens[: max(_MOST_BYTES // (4 * vocab), 2 * MAX_STEP_TOKENS)]
    length = min(MAX_STEP_TOKENS, context)
    windows = [tuple(tokens[start : start + length]) for start in range(0, len(tokens), length)][:_MOST_WINDOWS]
    windows = [window for window in windows if len(window) > 1] or [tuple(tokens[:1])]
    prompt = windows[0]
    half = max(len(prompt) // 2, 1)
    stepwise = prompt[half : half + min(_STEPS, len(prompt) - half)]
    plans = [
        *((window,) for window in windows),
        (prompt[:half], *((token,) for token in stepwise)),
        (prompt[:half], prompt[half:]) if len(prompt) > half else (prompt,),
    ]
    runs, row, total = [], 0, sum(len(piece) for plan in plans for piece in plan)
    hidden: list[Tensor] = []
    hook = decoder.norm.register_forward_hook(lambda _module, _inputs, made: hidden.append(made[0]))
    with path.open("wb") as file, torch.inference_mode():
        for plan in plans:
            runs.append(Run(plan, row))
            past: Past = decoder.empty_past()
            done = 0
            for piece in plan:
                done += len(piece)
                mask = torch.ones(1, done, dtype=torch.int64)
                logits, past = decoder(torch.tensor([piece]), mask, past)
                hook.remove()  # the first piece is all of `prefill`
                logits[0].numpy().astype("<f4", copy=False).tofile(file)
            row += done
            progress(row / total)
    *scored, steps, chunk = runs
    states = hidden[0] * decoder.config.hidden_scale
    return Expected(path, vocab, scored[0], steps, chunk, tuple(scored), states)


def compare(expected: Expected, session: Runnable) -> Parity:
    """Run a session over the same tokens in three ways."""
    found = {}
    for name in ("prefill", "steps", "chunk"):
        run: Run = getattr(expected, name)
        session.clear_cache()
        largest, total, row = 0.0, 0.0, run.row
        for piece in run.pieces:
            logits = torch.from_numpy(session.step(piece, num_logits=0))
            difference = (logits - expected.logits(row, len(piece))).abs()
            largest = max(largest, difference.max().item()) if not difference.isnan().any() else float("nan")
            total, row = total + difference.sum().item(), row + len(piece)
        found[name] = Difference(largest, total / (run.length * expected.vocab_size))
    return Parity(**found)


def compare_hidden_states(expected: Expected, session: Session) -> Difference:
    """Run a graph over the same prompt for its hidden states; see `Parity`."""
    (prompt,) = expected.prefill.pieces
    session.clear_cache()
    difference = torch.from_numpy(session.hidden_states(prompt)) - expected.hidden_states
    relative = difference.norm(dim=-1) / expected.hidden_states.norm(dim=-1)
    return Difference(relative.max().item(), relative.mean().item())


def score(expected: Expected, session: Runnable, progress: Callable[[float], None]) -> Quality:
    """Run the text through a session.

    Args:
        expected: what the session is measured against.
        session: the graph.
        progress: is told the share that is done.
    """
    count = sum(run.length - 1 for run in expected.windows)
    divergences = torch.zeros(count, dtype=torch.float64)
    same, loss, loss_reference, done = 0, 0.0, 0.0, 0
    for run in expected.windows:
        (window,) = run.pieces
        session.clear_cache()
        found = torch.from_numpy(session.step(window, num_logits=0))[:-1]
        for start in range(0, len(found), _KL_ROWS):
            rows = slice(start, start + _KL_ROWS)
            targets = torch.tensor(window[1:][rows])
            other = found[rows].log_softmax(-1)
            logs = expected.logits(run.row + start, len(targets)).log_softmax(-1)
            divergences[done : done + len(targets)] = (logs.exp() * (logs - other)).sum(-1)
            same += int((logs.argmax(-1) == other.argmax(-1)).sum())
            loss += _loss(other, targets)
            loss_reference += _loss(logs, targets)
            done += len(targets)
        progress(done / max(count, 1))
    return Quality(
        tokens=count,
        kl_mean=max(divergences.mean().item(), 0.0),  # rounding alone can leave it below
        kl_p999=divergences.quantile(0.999).item(),
        top1=same / count,
        perplexity=math.exp(loss / count),
        perplexity_reference=math.exp(loss_reference / count),
    )


def _loss(logs: Tensor, targets: Tensor) -> float:
    return -logs.gather(1, targets[:, None]).double().sum().item()
