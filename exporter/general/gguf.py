"""Opens a GGUF file whose architecture only transformers knows."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from llm_edge.checkpoint.base import Checkpoint, OriginalModel
from llm_edge.checkpoint.gguf.checkpoint import gguf_generation, gguf_source
from llm_edge.checkpoint.gguf.file import GGUFFile
from llm_edge.checkpoint.gguf.general import general_config, general_tensors
from llm_edge.checkpoint.gguf.tokenizer import read_tokenizer
from llm_edge.exporter.general.architecture import architecture_of
from llm_edge.exporter.general.checkpoint import GeneralCheckpoint
from llm_edge.exporter.general.weights import GeneralWeights


def read_general_gguf(path: Path) -> GeneralCheckpoint:
    """Read a GGUF file of one of `GENERAL_ARCHITECTURES`, or all parts of a split model given the first.

    Raises:
        CheckpointError: the file is damaged, or a setting is not supported.
    """
    file = GGUFFile(path)
    config = general_config(file)
    tensors = general_tensors(file, config["num_hidden_layers"])
    tokenizer = read_tokenizer(file)
    generation, notes = gguf_generation(file, tokenizer, config["vocab_size"])
    architecture = architecture_of(config, str(path))

    @cache
    def empty(source: str) -> Tensor:
        return torch.empty(file.tensor(source).shape, device="meta")

    def load(name: str) -> Tensor:
        return tensors[name].load(file.load)

    shapes = {name: tuple(tensor.load(empty).shape) for name, tensor in tensors.items()}
    return Checkpoint(
        architecture,
        config,
        GeneralWeights(architecture.decoder.model, shapes, load, str(path)),
        tokenizer,
        generation,
        gguf_source(file),
        notes=notes,
        original=OriginalModel(config, None, tuple(tensors), load),
    )
