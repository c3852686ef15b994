"""`open_weights`: the tensors of a quantized Hugging Face checkpoint, under the names of the unquantized model.

To add a format, write a function like those in `METHODS` and add its entry. It describes each quantized weight from the
shapes of the stored tensors, whose numbers are read when the weight is requested.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch

from llm_edge.checkpoint.base import by_frequency
from llm_edge.checkpoint.huggingface.weight_files import WeightFiles, WeightPaths
from llm_edge.checkpoint.quantized.bitsandbytes import read_bitsandbytes
from llm_edge.checkpoint.quantized.compressed_tensors import read_compressed_tensors
from llm_edge.checkpoint.quantized.fp4 import read_mxfp4
from llm_edge.checkpoint.quantized.fp8 import read_fp8
from llm_edge.checkpoint.quantized.gptq import read_awq, read_gptq
from llm_edge.checkpoint.quantized.stored import QuantizedWeight
from llm_edge.checkpoint.tensors.tensor_data import TensorInfo
from llm_edge.model.block_weights import BlockKind, SourceBlocks
from llm_edge.model.config_reader import ConfigReader
from llm_edge.runtime.errors import CheckpointError
from llm_edge.runtime.safe_io import MIB, read_json, short_repr

METHODS: Mapping[str, Callable[[ConfigReader, WeightFiles], Iterable[QuantizedWeight]]] = {
    "awq": read_awq,
    "bitsandbytes": read_bitsandbytes,
    "compressed-tensors": read_compressed_tensors,
    "fbgemm_fp8": read_fp8,
    "fp8": read_fp8,
    "gptq": read_gptq,
    "mxfp4": read_mxfp4,
}
"""By `quant_method` of a config's `quantization_config`, the function that finds the quantized weights."""

_CONFIG_KEYS = ("quantization_config", "compression_config")  # the second: compressed-tensors before 0.8
# Scales of activations, which are not rounded here.
_ACTIVATIONS = re.compile(r".*[._](input_scale|input_zero_point|input_global_scale|output_scale|activation_scale)")


class DequantizedFiles:
    """The tensors of a quantized checkpoint, dequantized one at a time when they are read.

    Attributes:
        tensors: shape and type of every tensor of the model before quantization.
        format: name of the file format.
        types: types of the stored tensors, most frequent first.
        where: path for messages.
        notes: what was left out, one sentence each.
    """

    def __init__(self, files: WeightFiles, weights: Iterable[QuantizedWeight]) -> None:
        self._files = files
        self._weights = {weight.name: weight for weight in weights}
        self.format, self.where = files.format, files.where
        parts = {part for weight in self._weights.values() for part in weight.parts}
        activations = {name for name in files.tensors if _ACTIVATIONS.fullmatch(name)} - parts
        plain = {name: info for name, info in files.tensors.items() if name not in parts | activations}
        twice = sorted(plain.keys() & self._weights.keys())
        if twice:
            raise CheckpointError(f"{self.where}: tensor {twice[0]} is stored quantized and unquantized: remove one")
        self.tensors = plain | {name: TensorInfo(each.shape, each.dtype) for name, each in self._weights.items()}
        self.types = by_frequency(
            [each.kind for each in self._weights.values()] + [kind for kind in files.types.split(", ") if kind]
        )
        count = len(activations)
        note = f"{count} scales of activations left out: activations are not quantized"
        self.notes = (*files.notes, *([note] if count else []))

    def check_type(self, name: str) -> None:
        """Reject a tensor that does not hold floats."""
        if name not in self._weights:
            self._files.check_type(name)

    def load(self, name: str) -> torch.Tensor:
        """Read a tensor; a quantized one is dequantized."""
        weight = self._weights.get(name)
        return self._files.load(name) if weight is None else weight.load()

    def block_kind(self, name: str) -> BlockKind | None:
        """Return the block layout that can hold a tensor's numbers, or None."""
        weight = self._weights.get(name)
        return None if weight is None else weight.block_kind()

    def blocks(self, name: str) -> SourceBlocks:
        """Read the numbers of a tensor for which `block_kind` is not None."""
        load = self._weights[name].load_blocks
        assert load is not None
        return load()


def split_quantization(content: Mapping[str, Any], where: str) -> tuple[Mapping[str, Any], ConfigReader | None]:
    """Return the content of a config.json without what describes quantized weights, and that if there is any.

    Raises:
        CheckpointError: the method is not supported.
    """
    key = next((key for key in _CONFIG_KEYS if content.get(key) is not None), None)
    section = None if key is None else ConfigReader(content, where).section(key)
    if section is not None:
        check_method(section)
    return {key: value for key, value in content.items() if key not in _CONFIG_KEYS}, section


def open_weights(found: WeightPaths, quantization: ConfigReader | None, folder: Path) -> WeightFiles | DequantizedFiles:
    """Open the weights of a folder under the names of the unquantized model.

    Args:
        found: the files.
        quantization: what `split_quantization` returned.
        folder: contains config.json.

    Raises:
        CheckpointError: a file is missing or damaged, or does not match the method.
    """
    files = WeightFiles(found)
    quantization = quantization or find_quantization(files, folder)
    return files if quantization is None else open_quantized(files, quantization)


def find_quantization(files: WeightFiles, folder: Path) -> ConfigReader | None:
    """Return the settings of a GPTQ checkpoint whose config.json has none, or None if it is not quantized.

    AutoGPTQ wrote them to quantize_config.json until its version 0.4.

    Raises:
        CheckpointError: the checkpoint is quantized and has no settings.
    """
    name = next((name for name in files.tensors if name.endswith(".qweight")), None)
    if name is None:
        return None
    path = folder / "quantize_config.json"
    if not path.exists():
        raise CheckpointError(
            f"{files.where} has tensors of a quantized model ({short_repr(name)[1:-1]}), but config.json has no "
            "quantization_config: download the model's own config.json"
        )
    return ConfigReader({"quant_method": "gptq", **read_json(path, MIB, error=CheckpointError)}, str(path))


def check_method(config: ConfigReader) -> str:
    """Return the `quant_method` of a `quantization_config`.

    Raises:
        CheckpointError: it is not supported.
    """
    old_bitsandbytes = config.value("load_in_4bit") or config.value("load_in_8bit")
    method = config.text("quant_method", "bitsandbytes" if old_bitsandbytes else None)
    if method not in METHODS:
        config.fail(
            f"weights quantized by {short_repr(method)} are not supported: give the model before quantization, or one "
            f"quantized by {', '.join(sorted(METHODS))}"
        )
    return method


def open_quantized(files: WeightFiles, config: ConfigReader) -> DequantizedFiles:
    """Find the quantized weights of a checkpoint.

    Args:
        files: the stored tensors.
        config: `quantization_config` of config.json.

    Raises:
        CheckpointError: the method is not supported, or the tensors do not match it.
    """
    method = check_method(config)
    weights = list(METHODS[method](config, files))
    if not weights:
        config.fail(
            f"quant_method is {method!r}, but {files.where} has no weights of that kind: remove quantization_config "
            "from config.json if they are not quantized"
        )
    return DequantizedFiles(files, weights)
