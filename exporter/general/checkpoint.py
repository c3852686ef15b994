"""Opens a Hugging Face folder whose architecture only transformers knows."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch

from llm_edge.checkpoint.base import Checkpoint, OriginalModel, Source, hash_file
from llm_edge.checkpoint.huggingface.checkpoint import duplicate_keys
from llm_edge.checkpoint.huggingface.generation import read_generation
from llm_edge.checkpoint.huggingface.tokenizer import read_tokenizer
from llm_edge.checkpoint.huggingface.weight_files import WeightFiles, find_weight_files
from llm_edge.checkpoint.quantized.dequantized import open_weights, split_quantization
from llm_edge.exporter.families import GENERAL
from llm_edge.exporter.general.architecture import Architecture, architecture_of
from llm_edge.exporter.general.weights import GeneralWeights
from llm_edge.runtime.errors import CheckpointError
from llm_edge.runtime.safe_io import MIB, read_json, short_repr

GeneralCheckpoint: TypeAlias = Checkpoint[Architecture, GeneralWeights]

_TEXT_PREFIX = re.compile(r"(model\.)?language_model\.(model\.)?")
"""Of the text model's tensors in a model that also reads images or sound."""
_FACTORS: Mapping[str, float | None] = {"logit_scale": 1.0, "logits_scaling": 1.0, "final_logit_softcapping": None}
"""What a text model does to its logits and a model that contains it may not do, and the value without effect."""
_HEADS = ("lm_head.", "model.lm_head.", "language_model.lm_head.")


def read_general_folder(folder: Path) -> GeneralCheckpoint:
    """Read a Hugging Face folder.

    Raises:
        CheckpointError: a file is missing or damaged, or transformers does not know the architecture.
    """
    path = folder / "config.json"
    whole = read_json(path, MIB, error=CheckpointError)
    content, notes = _text_config(whole)
    is_whole = content is whole
    where = str(path) if is_whole else f"{path}: text_config"
    content, quantization = split_quantization(content, where)
    architecture = architecture_of(content, where)
    if not is_whole and whole.get("model_type") not in GENERAL:
        _check_logits(architecture, short_repr(whole.get("model_type")))
    found = find_weight_files(folder, whole.get("transformers_weights"))
    files = open_weights(found, quantization, folder)
    names = {name: name for name in files.tensors} if is_whole else _text_names(files.tensors)

    def load(name: str) -> torch.Tensor:
        return files.load(names[name])

    shapes = {name: tuple(files.tensors[stored].shape) for name, stored in names.items()}
    weights = GeneralWeights(architecture.decoder.model, shapes, load, files.where)
    generation, ignored = read_generation(folder, content)
    return Checkpoint(
        architecture,
        dict(content),
        weights,
        read_tokenizer(folder, generation),
        generation,
        Source(folder.resolve().name, files.format, tuple(map(hash_file, found.paths)), files.types),
        notes=(*duplicate_keys(path), *notes, *files.notes, *ignored),
        original=OriginalModel(
            content, folder if is_whole and isinstance(files, WeightFiles) else None, tuple(names), load
        ),
    )


def _text_config(content: Mapping[str, Any]) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    """Return the config of the text model and a note, if there is one within the config."""
    text = content.get("text_config")
    if not isinstance(text, Mapping) or not isinstance(text.get("model_type"), str):
        return content, ()
    outer = ("bos_token_id", "eos_token_id", "pad_token_id", "quantization_config", "tie_word_embeddings")
    given = {key: content[key] for key in outer if content.get(key) is not None}
    note = f"only the text model of {content.get('model_type')} is exported: images and sound are left out"
    return {**text, **given}, (note,)


def _check_logits(architecture: Architecture, wrapper: str) -> None:
    """Raise CheckpointError if the logits of a text model may not be those of the wrapper around it."""
    config = architecture.config
    for name, neutral in _FACTORS.items():
        if getattr(config, name, neutral) != neutral:
            raise CheckpointError(
                f"{architecture.where}: {name} of {config.model_type} may not apply within model_type {wrapper}, "
                "which is not supported; llm-export --families lists what is"
            )


def _text_names(stored: Mapping[str, Any]) -> dict[str, str]:
    """Return the stored names of the text model's tensors by the names that they have in a model of text alone."""
    found = {}
    for name in stored:
        match = _TEXT_PREFIX.match(name)
        if name.startswith(_HEADS):
            found["lm_head." + name.rpartition("lm_head.")[2]] = name
        elif match is not None:
            found["model." + name[match.end() :]] = name
    return found or {name: name for name in stored}
