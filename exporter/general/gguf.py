"""Opens a GGUF file whose architecture only transformers knows."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from llm_edge.checkpoint.base import Checkpoint, OriginalModel
from llm_edge.checkpoint.gguf.checkpoint import gguf_generation, gguf_source
from llm_edge.checkpoint.gguf.file import GGUFFile
from llm_edge.checkpoint.gguf.general import GeneralTensor, general_config, general_tensors
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

    def shape(tensor: GeneralTensor) -> tuple[int, ...]:
        try:
            return tuple(tensor.load(empty).shape)
        except (IndexError, RuntimeError):
            shapes = " and ".join(f"{each} {file.tensor(each).shape}" for each in tensor.sources)
            file.fail(f"the shape of {shapes} is not supported")

    shapes = {name: shape(tensor) for name, tensor in tensors.items()}
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
