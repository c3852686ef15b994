"""Reads Hugging Face checkpoints: config.json, weights (sharded or not), tokenizer.json. Runs no code from them."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from llm_edge.checkpoint.base import Checkpoint, OriginalModel, Source, hash_file
from llm_edge.checkpoint.huggingface.generation import read_generation
from llm_edge.checkpoint.huggingface.stray_tensors import find_stray_tensors
from llm_edge.checkpoint.huggingface.tokenizer import read_tokenizer
from llm_edge.checkpoint.huggingface.weight_files import WeightFiles, WeightPaths, find_weight_files
from llm_edge.checkpoint.huggingface.wrappers import text_config
from llm_edge.checkpoint.lora.adapter import Adapter
from llm_edge.checkpoint.quantized.dequantized import DequantizedFiles, open_weights, split_quantization
from llm_edge.checkpoint.tensors.wrapper_names import find_prefix
from llm_edge.model.block_weights import BlockKind, SourceBlocks
from llm_edge.model.config import ModelConfig
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.family import Family
from llm_edge.model.registry import find_family
from llm_edge.model.weights import WeightTable, bind_weights, resolve_tied_head
from llm_edge.runtime.errors import CheckpointError, UnknownFamilyError, UnsupportedArchitectureError
from llm_edge.runtime.safe_io import MIB, read_json, read_text, short_repr

_ANCHOR = "layers.0.attention.output.weight"  # a weight of every family, by which the model's module is found


def read_folder(folder: Path, adapter: Adapter | None = None) -> Checkpoint:
    """Read a Hugging Face folder, merging a LoRA adapter if given.

    Raises:
        CheckpointError: a file is missing or damaged, or the architecture is not supported.
    """
    try:
        return _read(folder / "config.json", None, folder, folder.resolve().name, adapter)
    except UnsupportedArchitectureError as error:
        error.path = folder
        raise


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
    return _read(found, WeightPaths((path,)), folder, path.stem, adapter)


def _read(
    config_path: Path, found: WeightPaths | None, tokenizer: Path, name: str, adapter: Adapter | None
) -> Checkpoint:
    whole = read_json(config_path, MIB, error=CheckpointError)
    content, config_where, wrapper_notes = text_config(whole, str(config_path))
    is_wrapper = content is not whole
    content, quantization = split_quantization(content, config_where)
    raw = ConfigReader(content, config_where)
    family, config = _read_config(raw)
    loadable = found is None and not is_wrapper
    found = found or find_weight_files(config_path.parent, whole.get("transformers_weights"))
    files = open_weights(found, quantization, config_path.parent)
    where = files.where
    table = family.weight_table(config, raw)
    stored, prefix_notes = _stored_names(files, family, table, where)
    shapes = {full_name: files.tensors[stored_name].shape for full_name, stored_name in stored.items()}

    def load_base(full_name: str) -> torch.Tensor:
        return files.load(stored[full_name])

    config, table, tied_note = resolve_tied_head(config, table, shapes, load_base)
    stray = find_stray_tensors(config, table, shapes, load_base, where)
    load = load_base if adapter is None else _merge(adapter, family, config, shapes, load_base)
    for full_name, stored_name in stored.items():
        if full_name not in stray.names and not re.fullmatch(table.ignored, full_name):
            files.check_type(stored_name)
    blocks = None if adapter is not None or isinstance(files, WeightFiles) else _StoredBlocks(files, stored)
    weights = bind_weights(config, table, shapes, load, where, blocks, stray.names)
    generation, ignored = read_generation(config_path.parent, content)
    raw.value("architectures")
    source = Source(
        name=name if adapter is None else f"{name} + {adapter.name}",
        format=files.format,
        files=(*map(hash_file, found.paths), *(adapter.files if adapter is not None else ())),
        weight_types=files.types,
    )
    return Checkpoint(
        config,
        {**raw.used, **({"tie_word_embeddings": False} if tied_note else {})},
        weights,
        read_tokenizer(tokenizer, generation),
        generation,
        source,
        original=OriginalModel(
            content,
            folder=config_path.parent if loadable and isinstance(files, WeightFiles) else None,
            names=tuple(name for name in shapes if name not in stray.names) if is_wrapper else tuple(shapes),
            load=load_base,
            adapter=adapter.folder if adapter is not None else None,
        ),
        notes=(
            *duplicate_keys(config_path),
            *wrapper_notes,
            *files.notes,
            *prefix_notes,
            *([f"config.json: {tied_note}"] if tied_note else []),
            *stray.notes,
            *ignored,
        ),
    )


def _merge(
    adapter: Adapter,
    family: Family,
    config: ModelConfig,
    shapes: Mapping[str, tuple[int, ...]],
    load: Callable[[str], torch.Tensor],
) -> Callable[[str], torch.Tensor]:
    return adapter.wrap(
        shapes,
        load,
        transposed=lambda name: re.fullmatch(family.transposed, name) is not None,
        tied_head=config.tie_word_embeddings,
    )


def _read_config(raw: ConfigReader) -> tuple[Family, ModelConfig]:
    """Return the family of a config and the config in its form."""
    raw.require("is_causal", True)
    try:
        family = find_family(raw.text("model_type"), raw.where)
    except UnknownFamilyError as error:
        part = raw.value("text_config")
        if not isinstance(part, Mapping) or "model_type" not in part:
            raise
        raise UnknownFamilyError(f"{error}; its text model is {short_repr(part['model_type'])}") from error
    try:
        return family, family.read_config(raw)
    except CheckpointError as error:  # `ModelConfig` does not name the file
        message = str(error)
        raise type(error)(message if message.startswith(raw.where) else f"{raw.where}: {message}") from error


class _StoredBlocks:
    """`BlockReader` of a quantized checkpoint by the names of the weight table."""

    def __init__(self, files: DequantizedFiles, stored: Mapping[str, str]) -> None:
        self._files = files
        self._stored = stored

    def block_kind(self, name: str) -> BlockKind | None:
        return self._files.block_kind(self._stored[name])

    def blocks(self, name: str) -> SourceBlocks:
        return self._files.blocks(self._stored[name])


def _stored_names(
    files: WeightFiles | DequantizedFiles, family: Family, table: WeightTable, where: str
) -> tuple[dict[str, str], list[str]]:
    """Return the stored names by the names of the weight table, and a note if the model is within another module."""
    inner = table.sources(_ANCHOR)[0].name.removeprefix(family.base_prefix)
    prefix = find_prefix(files.tensors, inner, family.base_prefix, where)
    try:
        stored = family.stored_names(files.tensors, family.base_prefix if prefix is None else prefix)
    except CheckpointError as error:
        raise CheckpointError(f"{where}: {error}") from error
    if prefix is None or prefix in ("", family.base_prefix):
        return stored, []
    return stored, [f"the model is read from the module {prefix.removesuffix(family.base_prefix).removesuffix('.')}"]


def duplicate_keys(path: Path) -> list[str]:
    """Return a note about the keys that a JSON file gives twice; the last value counts, as in transformers."""
    twice: set[str] = set()

    def remember(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen: set[str] = set()
        twice.update(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        return dict(pairs)

    json.loads(read_text(path, MIB, error=CheckpointError), object_pairs_hook=remember)
    if not twice:
        return []
    shown = ", ".join(short_repr(key) for key in sorted(twice)[:3])
    return [f"{path.name}: {shown} given twice: the last value counts"]
