"""Several processes under torchrun: each computes some rows of a step, with all weights or only a shard of them."""

from __future__ import annotations

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from llm_edge.model.decoder import Decoder

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Processes:
    """The processes of a run.

    Attributes:
        rank: number of this process, from 0; process 0 writes files and reports progress.
        count: number of processes.
        sharded: whether each process holds a shard of all weights, instead of all weights: see `shard`. Each forward
            pass then needs all processes.
    """

    rank: int = 0
    count: int = 1
    sharded: bool = False

    @property
    def is_first(self) -> bool:
        """Whether this process writes files and reports progress."""
        return self.rank == 0

    def share(self, items: Sequence[T]) -> list[tuple[T, bool]]:
        """Return the items that this process computes, and whether they count.

        Sharded processes compute equally many: an item that does not count fills the place of a missing one.
        """
        mine = [(item, True) for item in items[self.rank :: self.count]]
        missing = -(-len(items) // self.count) - len(mine) if self.sharded else 0
        return [*mine, *[(items[0], False)] * missing]

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

    def wait(self) -> None:
        """Return when all processes have called this."""
        if self.count > 1:
            dist.barrier()


@contextlib.contextmanager
def processes(device: str) -> Iterator[Processes]:
    """Join the processes that torchrun started; without torchrun there is only this one."""
    if not under_torchrun():
        yield Processes()
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")
    try:
        yield Processes(dist.get_rank(), dist.get_world_size())
    finally:
        dist.destroy_process_group()


def under_torchrun() -> bool:
    """Whether torchrun started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def shard(decoder: Decoder, group: Processes, device: str) -> Processes:
    """Distribute weights, gradients and optimizer states over the processes, layer by layer (FSDP2)."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

    mesh = init_device_mesh(device, (group.count,))
    for layer in decoder.layers:
        fully_shard(layer, mesh=mesh)
        register_fsdp_forward_method(layer, "forward_packed")
    fully_shard(decoder, mesh=mesh, reshard_after_forward=False)  # the head is used after the forward pass
    register_fsdp_forward_method(decoder, "forward_packed")
    return dataclasses.replace(group, sharded=True)


def reshard(decoder: Decoder) -> None:
    """Release the weights of other processes after a forward pass without a backward pass."""
    from torch.distributed.fsdp import FSDPModule

    if isinstance(decoder, FSDPModule):
        decoder.reshard()


def gather(decoder: Decoder) -> None:
    """Replace the shards of a decoder by whole parameters in CPU memory, for saving it."""
    values: dict[nn.Parameter, nn.Parameter] = {}  # a tied head is the embedding afterwards too
    for name, parameter in list(decoder.named_parameters(remove_duplicate=False)):
        if parameter not in values:
            value = whole(parameter.detach()).cpu()
            values[parameter] = nn.Parameter(value, requires_grad=parameter.requires_grad)
        module, _, attribute = name.rpartition(".")
        own = decoder.get_submodule(module)
        if isinstance(own, nn.ParameterList):
            own[int(attribute)] = values[parameter]
        else:
            setattr(own, attribute, values[parameter])


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor whose shards are distributed over the processes; all of them must call this."""
    full: Tensor = tensor.full_tensor().clone() if hasattr(tensor, "full_tensor") else tensor
    return full


def distributed_like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return a whole value on the device of a parameter, distributed as the parameter is."""
    moved = value.to(parameter.device)
    if not hasattr(parameter, "full_tensor"):
        return moved
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(parameter, DTensor)
    return distribute_tensor(moved, parameter.device_mesh, parameter.placements)
