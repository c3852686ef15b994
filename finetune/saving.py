"""Saves a trained model as a folder that llm-export and transformers load, and a LoRA adapter in peft's format."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from llm_edge.checkpoint.base import Checkpoint
from llm_edge.checkpoint.huggingface.writer import hf_config, write_json, write_tokenizer
from llm_edge.checkpoint.lora.adapter import CONFIG as ADAPTER_CONFIG
from llm_edge.checkpoint.lora.adapter import WEIGHTS as ADAPTER_WEIGHTS
from llm_edge.checkpoint.meta.config import Settings, StateDictOptions
from llm_edge.checkpoint.meta.tokenizer import find_tokenizer
from llm_edge.finetune.lora import LoraLinear, Rows, lora_layers
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.decoder import Decoder
from llm_edge.model.family import Family
from llm_edge.model.registry import find_family
from llm_edge.model.rope import FrequencyDivisors
from llm_edge.model.weights import SourceTensor, WeightTable, restore_sources, source_rows
from llm_edge.runtime.errors import CheckpointError, MachineError

_PEFT_PREFIX = "base_model.model."


@dataclass(frozen=True, slots=True)
class Naming:
    """Names and layouts of the tensors that a checkpoint's model is saved with.

    Attributes:
        sources: returns the tensors of a weight of the decoder.
        verbatim: whether these are the tensors of the checkpoint itself, so that weights that were not trained can be
            copied unchanged.
        state_dict: whether the checkpoint is a state dict with Meta's names.
    """

    sources: Callable[[str], tuple[SourceTensor, ...]]
    verbatim: bool
    state_dict: bool = False

    @classmethod
    def of(cls, checkpoint: Checkpoint) -> Naming:
        """Return the names of the checkpoint itself, or Hugging Face's if it is a GGUF.

        Raises:
            CheckpointError: the model cannot be saved under these names.
        """
        if checkpoint.original is not None:
            naming = cls(checkpoint.weights.sources, verbatim=True)
        elif checkpoint.source.format == "GGUF":
            if any(isinstance(rope.scaling, FrequencyDivisors) for rope in checkpoint.config.ropes):
                raise CheckpointError(
                    f"{checkpoint.source.name}: this GGUF does not contain the settings of its rotary scaling, which "
                    "a Hugging Face folder needs: give the original Hugging Face folder"
                )
            naming = cls(_family_table(checkpoint)[1].sources, verbatim=False)
        else:
            naming = cls(checkpoint.weights.sources, verbatim=True, state_dict=True)
        for source in (source for name in checkpoint.weights for source in naming.sources(name)):
            if source.convert is not None and source.restore is None:
                raise CheckpointError(
                    f"{checkpoint.source.name}: the weight table of its family cannot be inverted for {source.name}: "
                    "add `restore` to its SourceTensor"
                )
        return naming


def trained_weights(decoder: Decoder, checkpoint: Checkpoint) -> Iterator[tuple[str, Tensor]]:
    """Yield name and float32 value of every weight that training changed, adapters merged into the original weights."""
    adapted = {f"{name}.weight": module for name, module in lora_layers(decoder)}
    for name in checkpoint.weights:
        if name in adapted:
            yield name, checkpoint.weights[name].float() + adapted[name].delta().cpu()
        elif decoder.get_parameter(name).requires_grad:
            yield name, decoder.get_parameter(name).detach().float().cpu()


def state_dict(checkpoint: Checkpoint, trained: Mapping[str, Tensor], naming: Naming) -> dict[str, Tensor]:
    """Return all tensors of the trained model under their saved names; those not trained as in the checkpoint."""
    tensors: dict[str, Tensor] = {}
    for name in checkpoint.weights:
        sources = naming.sources(name)
        if name not in trained and naming.verbatim:
            tensors |= {source.name: checkpoint.weights.load_source(source.name) for source in sources}
        else:
            weight = trained[name] if name in trained else checkpoint.weights[name]
            tensors |= restore_sources(checkpoint.config, name, sources, weight)
    return {name: tensor.contiguous() for name, tensor in tensors.items()}


def save_model(folder: Path, decoder: Decoder, checkpoint: Checkpoint, options: StateDictOptions, source: Path) -> None:
    """Write the trained model: a Hugging Face folder, or a state dict with its config and tokenizer.

    Args:
        folder: is created. The config is written last: without it the folder is not a model.
        decoder: the trained model.
        checkpoint: the model before training.
        options: those that the checkpoint was opened with.
        source: file or folder of the checkpoint.

    Raises:
        MachineError: the disk is full or cannot be written.
    """
    naming = Naming.of(checkpoint)
    tensors = state_dict(checkpoint, dict(trained_weights(decoder, checkpoint)), naming)
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if naming.state_dict:
            path = source if source.is_file() else source / checkpoint.source.files[0].name
            _save_state_dict(folder, path, tensors, options)
            return
        write_tensors(folder / "model.safetensors", tensors, {"format": "pt"})
        write_tokenizer(folder, checkpoint.tokenizer)
        write_json(folder / "generation_config.json", checkpoint.generation)
        original = checkpoint.original
        config = {**original.config, **checkpoint.hf_config} if original is not None else hf_config(checkpoint)
        unset = ("dtype", "torch_dtype", "transformers_weights")
        config = {key: value for key, value in config.items() if key not in unset}
        write_json(folder / "config.json", {**config, "dtype": "float32"})


def _save_state_dict(folder: Path, path: Path, tensors: dict[str, Tensor], options: StateDictOptions) -> None:
    """Write a state dict with Meta's names, and copy its config and tokenizer to where they are found again."""
    partial = folder / f".{secrets.token_hex(4)}.partial"
    if path.suffix == ".safetensors":
        write_tensors(folder / path.name, tensors, {})
    else:
        torch.save(tensors, partial)
        partial.replace(folder / path.name)
    settings = Settings.of(options, path)
    tokenizer = find_tokenizer(path, settings.tokenizer, settings.path, settings.paths)
    root = (settings.path or path).parent.resolve()
    for file in filter(None, (tokenizer.main, tokenizer.merges)):
        inside = file.resolve().is_relative_to(root)
        target = folder / (file.resolve().relative_to(root) if inside else file.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    if settings.path is not None:
        shutil.copyfile(settings.path, folder / settings.path.name)


def save_adapter(folder: Path, decoder: Decoder, checkpoint: Checkpoint, base: str) -> None:
    """Write the LoRA adapter in peft's format, for the Hugging Face model of the checkpoint.

    Args:
        folder: is created.
        decoder: the trained model.
        checkpoint: the model before training.
        base: path or Hugging Face id of the base model.

    Raises:
        MachineError: the disk is full or cannot be written.
    """
    family, table = _family_table(checkpoint)
    layers = dict(lora_layers(decoder))
    tensors: dict[str, Tensor] = {}
    for name, module in layers.items():
        tensors |= _peft_tensors(table.sources(f"{name}.weight"), module, family.transposed)
    first = next(iter(layers.values()))
    rank = first.lora_b[0].shape[1]
    content = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": first.scaling * rank**0.5,
        "use_rslora": True,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": family.transposed != "(?!)",
        "inference_mode": True,
        "init_lora_weights": True,
        "target_modules": sorted({name.split(".")[-3] for name in tensors}),
    }
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        write_tensors(folder / ADAPTER_WEIGHTS[0], tensors, {"format": "pt"})
        write_json(folder / ADAPTER_CONFIG, content)


def _peft_tensors(sources: tuple[SourceTensor, ...], module: LoraLinear, transposed: str) -> dict[str, Tensor]:
    """Return A and B of each part of an adapted layer under peft's names, the rows of B as in the checkpoint."""
    tensors = {}
    for source, a, b in zip(sources, module.lora_a.chunk(len(sources)), module.lora_b, strict=True):
        rows = b.detach().cpu()
        if source.restore is not None and not re.fullmatch(transposed, source.name):
            rows = source.restore(rows)
        path = _PEFT_PREFIX + source.name.removesuffix(".weight")
        tensors[f"{path}.lora_A.weight"] = a.detach().cpu().contiguous()
        tensors[f"{path}.lora_B.weight"] = rows.contiguous()
    return tensors


def _family_table(checkpoint: Checkpoint) -> tuple[Family, WeightTable]:
    """Return the model's family, and its weight table for a Hugging Face folder."""
    family = find_family(checkpoint.hf_config["model_type"])
    return family, family.weight_table(checkpoint.config, ConfigReader(dict(checkpoint.hf_config)))


def lora_rows(checkpoint: Checkpoint) -> Rows:
    """Return the parts of each weight: its tensors in a Hugging Face folder."""
    table = _family_table(checkpoint)[1]
    return lambda name: source_rows(checkpoint.config, name, len(table.sources(name)))


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write a safetensors file completely or not at all."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        save_file(dict(tensors), partial, dict(metadata))
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        partial.replace(path)
    finally:
        with contextlib.suppress(OSError):
            partial.unlink()


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Turn failures to write below a folder into MachineErrors."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or " ".join(str(error).split())[:200]
        raise MachineError(
            f"{folder}: cannot be written ({why}): free disk space or choose another folder with -o"
        ) from error
