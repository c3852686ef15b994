"""`Family`: how checkpoints of one `model_type` are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from llm_edge.model.config import ModelConfig
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.weights import WeightTable
from llm_edge.runtime.errors import CheckpointError

HEADS = ("lm_head.weight", "lm_head.bias", "embed_out.weight", "embed_out.bias")
"""Tensors of output heads, which have no `base_prefix`."""


@dataclass(frozen=True, slots=True)
class Family:
    """How checkpoints of one `model_type` are read.

    Attributes:
        read_config: converts a Hugging Face `config.json` to a `ModelConfig` and rejects unsupported settings. Only
            the keys it reads are written to the bundle's `config.json`.
        weight_table: returns the weight table for a config. Tensor names are those that transformers saves.
        base_prefix: prefix of all tensor names except the head's. Checkpoints of the base model alone
            (`AutoModel.save_pretrained`) omit it.
        transposed: regular expression of full names of weights that the checkpoint stores as [in, out].
    """

    read_config: Callable[[ConfigReader], ModelConfig]
    weight_table: Callable[[ModelConfig, ConfigReader], WeightTable]
    base_prefix: str = "model."
    transposed: str = "(?!)"

    def stored_names(self, names: Iterable[str], prefix: str) -> dict[str, str]:
        """Map tensor names as in the weight table to the names stored in a file.

        Args:
            names: names in the file.
            prefix: what the names of the base model's tensors begin with. It ends in `base_prefix`, unless that is
                missing or renamed. The head is in the same module or in one that contains it.

        Raises:
            CheckpointError: two tensors would have the same name.
        """
        wrapper = prefix.removesuffix(self.base_prefix) if prefix.endswith(self.base_prefix) else prefix
        parts = wrapper.split(".")
        heads = {"".join(f"{part}." for part in parts[:count]) + head for count in range(len(parts)) for head in HEADS}
        stored: dict[str, str] = {}
        for name in names:
            if name in heads:
                full_name = ".".join(name.split(".")[-2:])
            elif name.startswith(prefix):
                full_name = self.base_prefix + name.removeprefix(prefix)
            else:
                full_name = name
            if full_name in stored:
                raise CheckpointError(f"{stored[full_name]} and {name} could both be {full_name}: remove one of them")
            stored[full_name] = name
        return stored
