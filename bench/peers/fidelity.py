"""Compares an engine's logits with fp32's."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from llm_edge.runtime.errors import MachineError

_ROWS = 64  # positions compared at once: bounds the memory of the logarithms


@dataclass(frozen=True, slots=True)
class Fidelity:
    """An engine against fp32 on one text.

    Attributes:
        positions: number of positions compared.
        kl_mean: mean Kullback-Leibler divergence KL(fp32 || engine) of the next token, in nats.
        top1: fraction of positions where both have the same most likely token.
    """

    positions: int
    kl_mean: float
    top1: float


def windows(tokens: Sequence[int], count: int, length: int) -> list[list[int]]:
    """The first `count` tokens in windows of at most `length`."""
    text = list(tokens[:count])
    return [text[start : start + length] for start in range(0, len(text), length)]


def compare(references: Sequence[Path], others: Sequence[Path], vocab_size: int) -> Fidelity:
    """Compare files of logits pair by pair: float32, little-endian, [rows, V].

    Raises:
        MachineError: two files differ in size or are truncated, or logits are not finite.
    """
    divergences, same = [], 0
    for reference, other in zip(references, others, strict=True):
        ours, theirs = _rows(reference, vocab_size), _rows(other, vocab_size)
        if len(ours) != len(theirs):
            raise MachineError(f"{other}: logits of {len(theirs)} positions, {len(ours)} were asked for")
        for start in range(0, len(ours), _ROWS):
            expected, found = (_log_softmax(side[start : start + _ROWS]) for side in (ours, theirs))
            divergences.append((np.exp(expected) * (expected - found)).sum(-1))
            same += int((expected.argmax(-1) == found.argmax(-1)).sum())
    every = np.concatenate(divergences)
    if not np.isfinite(every).all():
        raise MachineError(f"{others[0].parent}: logits are not numbers")
    return Fidelity(len(every), float(every.mean()), same / len(every))


def _rows(path: Path, vocab_size: int) -> npt.NDArray[np.float32]:
    size = path.stat().st_size
    if size == 0 or size % (4 * vocab_size):
        raise MachineError(f"{path}: {size} bytes are no rows of {vocab_size} logits")
    return np.memmap(path, dtype="<f4", mode="r").reshape(-1, vocab_size)


def _log_softmax(logits: npt.NDArray[np.float32]) -> npt.NDArray[np.float64]:
    """Log-probabilities in float64, [rows, V]."""
    shifted = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    logs: npt.NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))
    return logs
