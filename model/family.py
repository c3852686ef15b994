"""`Family`: how checkpoints of one `model_type` are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

from llm_edge.model.config import ModelConfig
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.weights import WeightTable


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

    def stored_names(self, names: Iterable[str]) -> dict[str, str]:
        """Map tensor names as in the weight table to the names stored in a file, adding a missing `base_prefix`."""
        names = list(names)
        prefix = "" if any(name.startswith(self.base_prefix) for name in names) else self.base_prefix
        return {name if name.startswith(("lm_head.", "embed_out.")) else prefix + name: name for name in names}
