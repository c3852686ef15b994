"""Random samples and decoders for tests of training."""

from __future__ import annotations

import random
from pathlib import Path

import families

from llm_edge.checkpoint.base import Checkpoint
from llm_edge.checkpoint.huggingface.checkpoint import read_folder
from llm_edge.finetune.data.sample import Sample
from llm_edge.model.decoder import Decoder


def samples(count: int, *, shortest: int = 5, longest: int = 60, seed: int = 0) -> list[Sample]:
    """Samples of random ids: a question, which is masked, and an answer."""
    chosen = random.Random(seed)
    made = []
    for line in range(1, count + 1):
        length = chosen.randint(shortest, longest)
        start = chosen.randint(1, length - 1)
        ids = tuple(chosen.randrange(3, 320) for _ in range(length))
        made.append(Sample(ids, tuple(position >= start for position in range(length)), line))
    return made


def saved(name: str, folder: Path) -> tuple[Path, Checkpoint]:
    """A model of `families` in a folder, opened."""
    path = families.save(families.model(name), folder)
    return path, read_folder(path)


def decoder_of(checkpoint: Checkpoint) -> Decoder:
    """The decoder with the weights of a checkpoint."""
    decoder = Decoder(checkpoint.config)
    decoder.load_weights(checkpoint.weights)
    return decoder
