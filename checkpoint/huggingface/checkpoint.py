"""Reads Hugging Face checkpoints: config.json, weights (sharded or not), tokenizer.json. Runs no code from them."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import torch

from llm_edge.checkpoint.base import Checkpoint, Source, hash_file
from llm_edge.checkpoint.huggingface.tokenizer import read_generation, read_tokenizer
from llm_edge.checkpoint.huggingface.weight_files import WeightFiles, find_weight_files
from llm_edge.checkpoint.lora.adapter import Adapter
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.registry import find_family
from llm_edge.model.weights import bind_weights
from llm_edge.runtime.errors import CheckpointError
from llm_edge.runtime.safe_io import MIB, read_json, short_repr


def read_folder(folder: Path, adapter: Adapter | None = None) -> Checkpoint:
    """Read a Hugging Face folder, merging a LoRA adapter if given.

    Raises:
        CheckpointError: a file is missing or damaged, or the architecture is not supported.
    """
    return _read(folder / "config.json", find_weight_files(folder), folder, folder.resolve().name, adapter)


def read_file(path: Path, config: Path | None, tokenizer: Path | None, adapter: Adapter | None = None) -> Checkpoint:
    """Read a single weight file of a Hugging Face model.

    Args:
        path: the weights.
        config: its `config.json`; None uses the one beside the weights.
        tokenizer: folder of the tokenizer, or the `tokenizer.json` itself; None uses the folder of the config.
        adapter: LoRA adapter to merge, or None.

    Raises:
        CheckpointError: a file is missing or damaged, or the architecture is not supported.
    """
    shard = re.search(r"-(\d+)-of-(\d+)\.", path.name)
    if shard:
        raise CheckpointError(f"{path} is shard {int(shard[1])} of {int(shard[2])}: give the folder of all shards")
    found = config if config is not None else path.parent / "config.json"
    if not found.is_file():
        raise CheckpointError(
            f"{path}: its tensors do not have Meta's Llama names, and there is no {found}: "
            "give the model's Hugging Face config with --config"
        )
    folder = found.parent if tokenizer is None else tokenizer.parent if tokenizer.is_file() else tokenizer
    return _read(found, [path], folder, path.stem, adapter)


def _read(
    config_path: Path, weight_paths: list[Path], tokenizer: Path, name: str, adapter: Adapter | None
) -> Checkpoint:
    content = read_json(config_path, MIB, error=CheckpointError)
    raw = ConfigReader(content, str(config_path))
    raw.require("is_causal", True)
    quantization = raw.section("quantization_config")
    if quantization is not None:
        method = short_repr(quantization.value("quant_method"))
        raw.fail(
            f"quantization_config: weights quantized by {method} are not supported: give the model before quantization"
        )
    family = find_family(raw.text("model_type"), str(config_path))
    try:
        config = family.read_config(raw)
    except CheckpointError as error:  # `ModelConfig` does not name the file
        message = str(error)
        raise CheckpointError(
            message if message.startswith(str(config_path)) else f"{config_path}: {message}"
        ) from error
    files = WeightFiles(weight_paths)
    stored = family.stored_names(files.tensors)
    load: Callable[[str], torch.Tensor] = files.load
    if adapter is not None:
        load = adapter.wrap(
            {name: info.shape for name, info in files.tensors.items()},
            load,
            transposed=lambda name: re.fullmatch(family.transposed, name) is not None,
            tied_head=config.tie_word_embeddings,
        )
    table = family.weight_table(config, raw)
    for full_name, stored_name in stored.items():
        if not re.fullmatch(table.ignored, full_name):
            files.check_type(stored_name)
    weights = bind_weights(
        config,
        table,
        {full_name: files.tensors[stored_name].shape for full_name, stored_name in stored.items()},
        lambda full_name: load(stored[full_name]),
        where=str(weight_paths[0] if len(weight_paths) == 1 else weight_paths[0].parent),
    )
    generation = read_generation(config_path.parent, content)
    raw.value("architectures")
    source = Source(
        name=name if adapter is None else f"{name} + {adapter.name}",
        format=files.format,
        files=(*map(hash_file, weight_paths), *(adapter.files if adapter is not None else ())),
        weight_types=files.types,
    )
    return Checkpoint(config, raw.used, weights, read_tokenizer(tokenizer, generation), generation, source)
