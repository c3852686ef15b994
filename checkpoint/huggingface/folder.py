"""Hugging Face folders: config.json, weights (sharded or not), tokenizer.json. Imports nothing a config names."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from llm_edge.checkpoint.base import Checkpoint, Source, TokenizerAssets, hash_file
from llm_edge.checkpoint.lora.adapter import Adapter
from llm_edge.checkpoint.tensors.tensor_bytes import TYPE_NAMES, TensorInfo
from llm_edge.checkpoint.tensors.tensor_file import TensorFile, open_tensor_file
from llm_edge.model.config_reader import ConfigReader
from llm_edge.model.registry import find_family
from llm_edge.model.weights import bind_weights
from llm_edge.runtime.errors import CheckpointError
from llm_edge.runtime.safe_io import MIB, read_json, read_text
from llm_edge.runtime.show import show

_TOKENIZER_KEYS = (
    "add_bos_token",
    "add_eos_token",
    "add_prefix_space",
    "added_tokens_decoder",
    "additional_special_tokens",
    "bos_token",
    "clean_up_tokenization_spaces",
    "eos_token",
    "extra_special_tokens",
    "legacy",
    "model_input_names",
    "model_max_length",
    "pad_token",
    "padding_side",
    "unk_token",
)
_SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")
_GENERATION_KEYS = (
    "bos_token_id",
    "do_sample",
    "eos_token_id",
    "max_length",
    "max_new_tokens",
    "min_p",
    "pad_token_id",
    "repetition_penalty",
    "temperature",
    "top_k",
    "top_p",
)
_GENERATION_NUMBERS = {"max_length", "max_new_tokens", "min_p", "repetition_penalty", "temperature", "top_k", "top_p"}


def read_folder(folder: Path, adapter: Adapter | None = None) -> Checkpoint:
    """Read a Hugging Face folder, with a LoRA adapter merged where one is given.

    Raises:
        CheckpointError: a file is missing or damaged, or the architecture is not one of ours.
    """
    return _read(folder / "config.json", _weight_files(folder), folder, folder.resolve().name, adapter)


def read_file(path: Path, config: Path | None, tokenizer: Path | None, adapter: Adapter | None = None) -> Checkpoint:
    """Read a file of weights in a Hugging Face model's naming.

    Args:
        path: the weights.
        config: its `config.json`; None looks beside the weights.
        tokenizer: folder of its tokenizer, or the `tokenizer.json` itself; None looks beside the config.
        adapter: see `read_folder`.

    Raises:
        CheckpointError: a file is missing or damaged, or the architecture is not one of ours.
    """
    shard = re.search(r"-(\d+)-of-(\d+)\.", path.name)
    if shard:
        raise CheckpointError(f"{path} is shard {int(shard[1])} of {int(shard[2])}: give the folder they all lie in")
    found = config if config is not None else path.parent / "config.json"
    if not found.is_file():
        raise CheckpointError(
            f"{path}: its tensors are not named as Meta names a Llama's, and there is no {found}: "
            "give the model's Hugging Face config with --config"
        )
    folder = found.parent if tokenizer is None else tokenizer.parent if tokenizer.is_file() else tokenizer
    return _read(found, [path], folder, path.stem, adapter)


def _read(config_file: Path, files: list[Path], tokenizer: Path, name: str, adapter: Adapter | None) -> Checkpoint:
    content = read_json(config_file, MIB, error=CheckpointError)
    raw = ConfigReader(content, str(config_file))
    raw.require("is_causal", True)
    quantization = raw.section("quantization_config")
    if quantization is not None:
        method = show(quantization.value("quant_method"))
        raw.fail(f"quantization_config: weights quantized by {method} are not read: give the model they were made from")
    family = find_family(raw.text("model_type"), str(config_file))
    try:
        config = family.read_config(raw)
    except CheckpointError as error:  # what the shape itself finds wrong does not know of the file
        raise CheckpointError(_with_file(str(error), config_file)) from error
    tensors = _TensorFiles(files)
    names = family.stored_names(tensors.infos)
    load: Callable[[str], torch.Tensor] = tensors.load
    if adapter is not None:
        load = adapter.wrap(
            {theirs: info.shape for theirs, info in tensors.infos.items()},
            load,
            transposed=lambda name: re.fullmatch(family.transposed, name) is not None,
            tied_head=config.tie_word_embeddings,
        )
    table = family.weight_table(config, raw)
    for ours, theirs in names.items():
        if not re.fullmatch(table.ignored, ours):
            tensors.check_type(theirs)
    weights = bind_weights(
        config,
        table,
        {ours: tensors.infos[theirs].shape for ours, theirs in names.items()},
        lambda ours: load(names[ours]),
        where=str(files[0] if len(files) == 1 else files[0].parent),
    )
    generation = read_generation(config_file.parent, content)
    raw.value("architectures")
    source = Source(
        name=name if adapter is None else f"{name} + {adapter.name}",
        format=tensors.format,
        files=(*(hash_file(path) for path in files), *(adapter.files if adapter is not None else ())),
        weight_types=tensors.types,
    )
    return Checkpoint(config, raw.used, weights, read_tokenizer(tokenizer, generation), generation, source)


def _with_file(message: str, file: Path) -> str:
    return message if message.startswith(str(file)) else f"{file}: {message}"


class _TensorFiles:
    """The tensors of one file or of all shards."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self._holder: dict[str, TensorFile] = {}
        self.infos: dict[str, TensorInfo] = {}
        self.format = "safetensors" if paths[0].suffix == ".safetensors" else "PyTorch"
        for path in paths:
            file = open_tensor_file(path)
            for name, info in file.tensors.items():
                if name in self._holder:
                    raise CheckpointError(f"{path}: tensor {name} is in {self._holder[name].path.name} too")
                self._holder[name] = file
                self.infos[name] = info

    @property
    def types(self) -> str:
        """Types of the tensors, the most frequent first."""
        counts = Counter(TYPE_NAMES[info.dtype] for info in self.infos.values() if info.dtype in TYPE_NAMES)
        return ", ".join(kind for kind, _ in counts.most_common())

    def check_type(self, name: str) -> None:
        """Refuse a tensor that is not of floats."""
        dtype = self.infos[name].dtype
        if dtype not in TYPE_NAMES:
            raise CheckpointError(
                f"{self._holder[name].path}: tensor {name} is of type {str(dtype).removeprefix('torch.')}; "
                f"supported: {', '.join(sorted(TYPE_NAMES.values()))}"
            )

    def load(self, name: str) -> torch.Tensor:
        """Read a tensor from disk."""
        return self._holder[name].load(name)


def _weight_files(folder: Path) -> list[Path]:
    """The files of a folder's weights: those an index names, else the one of the usual name, else the only one."""
    for stem, suffix in (("model", "safetensors"), ("pytorch_model", "bin")):
        index, whole = folder / f"{stem}.{suffix}.index.json", folder / f"{stem}.{suffix}"
        if index.exists():
            paths = _shards(index)
        elif whole.exists():
            paths = [whole]
        else:
            continue
        break
    else:
        paths = sorted(folder.glob("*.safetensors"))
        if len(paths) != 1:
            found = f"{len(paths)} .safetensors files and no model.safetensors.index.json" if paths else "no weights"
            raise CheckpointError(
                f"{folder} has {found}: model.safetensors, pytorch_model.bin or a sharded set with its index is needed"
            )
    for path in paths:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: the checkpoint is incomplete, download it again")
    return paths


def _shards(index: Path) -> list[Path]:
    shards = read_json(index, error=CheckpointError).get("weight_map")
    if not isinstance(shards, dict) or not shards or not all(isinstance(name, str) for name in shards.values()):
        raise CheckpointError(f"{index}: weight_map is not a table of file names")
    names = sorted(set(shards.values()))
    if any(Path(name).name != name for name in names):
        raise CheckpointError(f"{index}: weight_map names files outside of the folder")
    return [index.parent / name for name in names]


def read_generation(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
    """Known keys of generation_config.json; token ids may also stand in config.json."""
    path = folder / "generation_config.json"
    raw = read_json(path, error=CheckpointError) if path.exists() else {}
    generation = {key: raw[key] for key in _GENERATION_KEYS if raw.get(key) is not None}
    for key in _GENERATION_NUMBERS & generation.keys():
        number = generation[key]
        if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) < 1e12:  # NaN is not
            raise CheckpointError(f"{path}: {key} is {number!r}, not a number")
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if key not in generation and config.get(key) is not None:
            generation[key] = config[key]
        ids = generation.get(key, 0)
        ids = ids if isinstance(ids, list) else [ids]
        if not all(isinstance(token, int) and not isinstance(token, bool) and token >= 0 for token in ids):
            raise CheckpointError(f"{folder}: {key} is {generation[key]!r}, not a token id")
    return generation


def read_tokenizer(folder: Path, generation: Mapping[str, Any]) -> TokenizerAssets:
    """A folder's tokenizer.json, what its config says of it, and its chat template."""
    path = folder / "tokenizer.json"
    if not path.exists():
        raise CheckpointError(
            f"{folder} has no tokenizer.json: save one with transformers (AutoTokenizer.from_pretrained(…)."
            "save_pretrained(…))"
        )
    config_path = folder / "tokenizer_config.json"
    raw = read_json(config_path, error=CheckpointError) if config_path.exists() else {}
    template_path = folder / "chat_template.jinja"
    template = raw.get("chat_template")
    if template_path.exists():
        template = read_text(template_path, MIB, error=CheckpointError)
    elif isinstance(template, list):  # several named templates: the default one is the chat
        named = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        template = named.get("default")
    if template is not None and not isinstance(template, str):
        raise CheckpointError(f"{config_path}: chat_template is not a text")

    config = {key: raw[key] for key in _TOKENIZER_KEYS if key in raw}
    if isinstance(config.get("extra_special_tokens"), list):  # transformers 5's name for it, 4 wants a table there
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    eos = generation.get("eos_token_id")
    eos_ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    return TokenizerAssets(
        tokenizer_json=read_text(path, 256 * MIB, error=CheckpointError),
        tokenizer_config=config,
        special_tokens_map={key: raw[key] for key in _SPECIAL_TOKENS if raw.get(key) is not None},
        chat_template=template,
        bos_token_id=generation.get("bos_token_id"),
        eos_token_ids=eos_ids,
        pad_token_id=generation.get("pad_token_id"),
    )
