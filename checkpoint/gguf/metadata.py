"""`Metadata`: the keys of a GGUF file that begin with the name of its architecture."""

from __future__ import annotations

from typing import Any

import numpy as np

from llm_edge.checkpoint.gguf.file import GGUFFile


class Metadata:
    """Keys of an architecture, without its name; errors name the file and the key.

    Attributes:
        file: the file.
        architecture: `general.architecture`.
    """

    def __init__(self, file: GGUFFile, architecture: str) -> None:
        self.file = file
        self.architecture = architecture

    def __contains__(self, key: str) -> bool:
        return f"{self.architecture}.{key}" in self.file.metadata

    def integer(self, key: str, default: int | None = None, minimum: int = 1, maximum: int | None = None) -> int:
        """Return an integer within bounds; without a default the key is required."""
        return self.file.meta_int(f"{self.architecture}.{key}", minimum=minimum, maximum=maximum, default=default)

    def integers(self, key: str, length: int) -> list[int]:
        """Return a list of integers."""
        return self.file.meta_ints(f"{self.architecture}.{key}", length=length)

    def number(self, key: str, default: float | None = None) -> float:
        """Return a number; a float32 as its shortest decimal form, so that 1e-5 is not 9.999999747378752e-06."""
        value = self.file.meta_float(f"{self.architecture}.{key}", default=default)
        with np.errstate(over="ignore"):
            single = np.float32(value)
        return float(str(single)) if float(single) == value else value

    def text(self, key: str, default: str) -> str:
        """Return a string."""
        return self.file.meta_str(f"{self.architecture}.{key}", default=default)

    def layer_types(self, layers: int, interval: int, window: int) -> list[str]:
        """Return Hugging Face's `layer_types` for `attention.sliding_window_pattern`.

        The key is a flag for each layer, or a number: every such layer has full attention. `interval` is its default.
        """
        key = "attention.sliding_window_pattern"
        pattern: Any = self.file.metadata.get(f"{self.architecture}.{key}", interval)
        if isinstance(pattern, np.ndarray):
            sliding = [bool(item) for item in pattern]
            if len(sliding) != layers:
                self.file.fail(f"{self.architecture}.{key} has {len(sliding)} entries; {layers} are required")
        else:
            interval = self.integer(key, interval, minimum=0)
            sliding = [not interval or number % interval < interval - 1 for number in range(layers)]
        return ["sliding_attention" if window and local else "full_attention" for local in sliding]

    def has_tensor(self, name: str) -> bool:
        """Whether the first layer has a tensor."""
        return f"blk.0.{name}" in self.file.tensors
