"""How much memory a run needs: estimated before the first step, measured afterwards."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from llm_edge.finetune.data.sample import Sample
from llm_edge.finetune.loss import CHUNK, batch_loss
from llm_edge.finetune.options import Precision
from llm_edge.finetune.packing import Batch
from llm_edge.finetune.step import autocast
from llm_edge.model.decoder import Decoder
from llm_edge.runtime.errors import MachineError

_PROBE = 128  # tokens
_OVERHEAD = 36_000_000  # bytes: buffers of the matrix library, gaps between allocations
_FRAGMENTATION = 1.25  # of glibc's heap, measured at the size of SmolLM2
_STATES = 3  # gradient and the two moments of AdamW, each as large as the parameters


@dataclass(frozen=True, slots=True)
class Estimate:
    """Bytes that training needs besides the loaded weights.

    Attributes:
        states: gradients and optimizer states.
        activations: what the backward pass needs of a row, and what it computes with.
        loss: logits of a chunk, the gradient of the output head, and what libraries need.
    """

    states: int
    activations: int
    loss: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.states + self.activations + self.loss


def estimate(
    decoder: Decoder, row_tokens: int, *, checkpointing: bool, precision: Precision = Precision.FP32
) -> Estimate:
    """Return what training rows of `row_tokens` tokens needs, from what a short row keeps for its backward pass."""
    config, item = decoder.config, 4
    trained = [parameter for parameter in decoder.parameters() if parameter.requires_grad]
    states = _STATES * sum(parameter.numel() * parameter.element_size() for parameter in trained)
    per_layer = _saved_bytes(decoder, precision) / _PROBE / config.num_hidden_layers
    widest = max(2 * config.intermediate_size * config.gated_mlp, config.intermediate_size, config.query_size)
    working = 3 * widest * item  # gradients of the widest inner tensors
    layers, stream = config.num_hidden_layers, config.hidden_size * item
    per_token = layers * stream + per_layer + working if checkpointing else layers * per_layer + working
    head = decoder.lm_head.weight
    loss = CHUNK * item + (head.numel() * item if head.requires_grad and not config.tie_word_embeddings else 0)
    return Estimate(states, round(_FRAGMENTATION * per_token * row_tokens), loss + _OVERHEAD)


def check_fit(needed: int, available: int | None, remedy: str) -> None:
    """Raise MachineError if a run does not fit into the available memory."""
    if available is not None and needed > available:
        raise MachineError(
            f"training needs about {needed / 1e9:.1f} GB of memory, but {available / 1e9:.1f} GB are free: {remedy}"
        )


def available_memory(device: str) -> int | None:
    """Return the bytes that can still be allocated, or None if that is unknown."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    return found[0] if found else None


def peak_memory(device: str) -> int | None:
    """Return the most bytes that this process has used so far, or None if that is unknown."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def _saved_bytes(decoder: Decoder, precision: Precision) -> int:
    """Return the bytes of all tensors that a row of `_PROBE` tokens keeps for its backward pass, without weights."""
    ids = tuple(min(position, decoder.config.vocab_size - 1) for position in range(_PROBE + 1))
    batch = Batch.of([Sample(ids, (False,) * _PROBE + (True,), 0)], decoder.embed_tokens.weight.device)
    own: set[int] = {_storage(tensor) for tensor in (*decoder.parameters(), *decoder.buffers())}
    found: dict[int, int] = {}

    def remember(tensor: Tensor) -> Tensor:
        storage = _storage(tensor)
        if storage not in own and not isinstance(tensor, nn.Parameter):
            found[storage] = tensor.untyped_storage().nbytes()
        return tensor

    keeping = torch.autograd.graph.saved_tensors_hooks(remember, lambda tensor: tensor)
    with keeping, autocast(decoder, precision):
        loss = batch_loss(decoder, batch)
    del loss
    return sum(found.values())


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()
