"""Data parallelism under torchrun: each process computes some rows of a step, and gradients are summed."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes of a run, which all have the same weights.

    Attributes:
        rank: number of this process, from 0; process 0 writes files and reports progress.
        count: number of processes.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and reports progress."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> Sequence[T]:
        """Return the items that this process computes; it may have none."""
        return items[self.rank :: self.count]

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all processes."""
        if self.count > 1:
            for tensor in tensors:
                dist.all_reduce(tensor)

    def any(self, flag: bool) -> bool:
        """Return whether the flag is true in any process."""
        if self.count == 1:
            return flag
        shared = torch.tensor(int(flag))
        if dist.get_backend() == "nccl":
            shared = shared.cuda()
        dist.all_reduce(shared, dist.ReduceOp.MAX)
        return bool(shared.item())


@contextlib.contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Join the processes that torchrun started; without torchrun there is only this one."""
    if "RANK" not in os.environ or "WORLD_SIZE" not in os.environ:
        yield Processes()
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()
