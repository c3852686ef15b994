"""Loss on the evaluation samples, and answers to some of their questions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from llm_edge.finetune.data.sample import Sample
from llm_edge.finetune.distributed import Processes
from llm_edge.finetune.loss import batch_loss
from llm_edge.finetune.packing import Batch, pack
from llm_edge.model.decoder import Decoder


@dataclass(frozen=True, slots=True)
class Answer:
    """A greedy answer of the model, all as token ids: the question, what was expected, what was generated."""

    prompt: tuple[int, ...]
    expected: tuple[int, ...]
    generated: tuple[int, ...]


@torch.no_grad()
def evaluation_loss(decoder: Decoder, samples: Sequence[Sample], row_tokens: int, processes: Processes) -> float:
    """Return the mean cross-entropy over all targets; it does not depend on `row_tokens`, the size of a row."""
    device = decoder.embed_tokens.weight.device
    total = torch.zeros((), dtype=torch.float64, device=device)
    for row, counts in processes.share(pack(samples, row_tokens)):
        loss = batch_loss(decoder, Batch.of(row, device))
        total += loss if counts else 0.0
    processes.sum([total])
    return float(total) / sum(sample.targets for sample in samples)


@torch.no_grad()
def answer(decoder: Decoder, sample: Sample, max_tokens: int = 48) -> Answer:
    """Answer the question of a sample greedily, until the end token or `max_tokens`."""
    prompt, expected = sample.prompt, sample.answer
    device = decoder.embed_tokens.weight.device
    end, past = expected[-1], decoder.empty_past()
    fed = torch.tensor([prompt], device=device)
    generated: list[int] = []
    room = min(max_tokens, decoder.config.max_position_embeddings - len(prompt))
    while len(generated) < room and (not generated or generated[-1] != end):
        mask = torch.ones(1, len(prompt) + len(generated), dtype=torch.int64, device=device)
        logits, past = decoder(fed, mask, past, num_logits_to_keep=1)
        generated.append(int(logits[0, -1].argmax()))
        fed = torch.tensor([[generated[-1]]], device=device)
    return Answer(prompt, expected, tuple(generated))
