"""Packs samples into rows of tokens, and plans which samples each optimizer step trains on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from llm_edge.finetune.data.sample import Sample
from llm_edge.model.attention import Documents


@dataclass(frozen=True, slots=True)
class Batch:
    """A row of S packed samples' tokens, each a document of its own, and the N targets among them.

    Attributes:
        ids: input ids, int64 [S]; the last id of a sample predicts nothing and is left out.
        documents: the samples in the row.
        rows: positions in the row that predict a target, int64 [N].
        targets: the ids to predict there, int64 [N].
    """

    ids: Tensor
    documents: Documents
    rows: Tensor
    targets: Tensor

    @classmethod
    def of(cls, samples: Sequence[Sample], device: torch.device | str = "cpu") -> Batch:
        """Pack samples into one row."""
        trained = np.concatenate([np.array(sample.trained[1:], dtype=bool) for sample in samples])
        following = np.concatenate([np.array(sample.ids[1:], dtype=np.int64) for sample in samples])
        rows = np.flatnonzero(trained)
        ids = np.concatenate([np.array(sample.ids[:-1], dtype=np.int64) for sample in samples])
        arrays = (torch.from_numpy(array).to(device) for array in (ids, rows, following[rows]))
        tensors = tuple(arrays)
        return cls(tensors[0], Documents(tuple(len(sample.ids) - 1 for sample in samples)), tensors[1], tensors[2])


def pack(samples: Sequence[Sample], tokens: int) -> list[list[Sample]]:
    """Distribute samples over rows of at most `tokens` tokens, longest first; a longer sample gets its own row."""
    rows: list[list[Sample]] = []
    free: list[int] = []
    for sample in sorted(samples, key=lambda sample: -len(sample.ids)):
        length = len(sample.ids) - 1
        index = next((index for index, left in enumerate(free) if length <= left), None)
        if index is None:
            rows.append([])
            free.append(tokens)
            index = len(rows) - 1
        rows[index].append(sample)
        free[index] -= length
    return rows


@dataclass(frozen=True, slots=True)
class Plan:
    """Which samples each optimizer step trains on: all of them once per epoch, in an order that the seed determines.

    Attributes:
        samples: the training data.
        batch_size: samples per step; the last step of an epoch has the rest.
        tokens: maximum number of tokens of a row, the unit of a forward pass.
        seed: of the order.
    """

    samples: Sequence[Sample]
    batch_size: int
    tokens: int
    seed: int

    @property
    def steps_per_epoch(self) -> int:
        """Number of optimizer steps that see every sample once."""
        return -(-len(self.samples) // self.batch_size)

    def rows(self, step: int) -> list[list[Sample]]:
        """Return the rows of a step, counted from 0."""
        epoch, position = divmod(step, self.steps_per_epoch)
        generator = np.random.default_rng((self.seed, epoch))
        order = generator.permutation(len(self.samples))
        chosen = order[position * self.batch_size : (position + 1) * self.batch_size]
        return pack([self.samples[index] for index in chosen], self.tokens)

    @property
    def longest_row(self) -> int:
        """Upper bound of the number of tokens in a row."""
        longest = sorted((len(sample.ids) - 1 for sample in self.samples), reverse=True)[: self.batch_size]
        return max(longest[0], min(self.tokens, sum(longest)))

    @property
    def longest_sample(self) -> int:
        """Number of tokens of the longest sample in a row."""
        return max(len(sample.ids) - 1 for sample in self.samples)

    @property
    def accumulates(self) -> bool:
        """Whether a step may have several rows."""
        return self.longest_row < sum(sorted(len(sample.ids) - 1 for sample in self.samples)[-self.batch_size :])

    def fingerprint(self) -> str:
        """Return a digest of the samples, which a resumed run must have too."""
        digest = hashlib.sha256()
        for sample in self.samples:
            digest.update(np.array(sample.ids, dtype=np.int64).tobytes())
            digest.update(np.array(sample.trained, dtype=bool).tobytes())
        return digest.hexdigest()[:32]
