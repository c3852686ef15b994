"""Hugging Face folders: config.json, safetensors (sharded or not), tokenizer.json. Imports nothing a config names."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from llm_edge.exporter.checkpoint.base import (
    Checkpoint,
    Part,
    Source,
    TokenizerAssets,
    bind_weights,
    hash_file,
)
from llm_edge.exporter.config import config_from_hf
from llm_edge.runtime.errors import CheckpointError
from llm_edge.runtime.safe_io import MIB, read_json, read_text

OUTER: Mapping[str, tuple[Part, ...]] = {
    "embed_tokens.weight": (Part("model.embed_tokens.weight"),),
    "norm.weight": (Part("model.norm.weight"),),
    "lm_head.weight": (Part("lm_head.weight"),),
}
LAYER: Mapping[str, tuple[Part, ...]] = {
    "attention_norm.weight": (Part("input_layernorm.weight"),),
    "attention.qkv.weight": (
        Part("self_attn.q_proj.weight"),
        Part("self_attn.k_proj.weight"),
        Part("self_attn.v_proj.weight"),
    ),
    "attention.output.weight": (Part("self_attn.o_proj.weight"),),
    "mlp_norm.weight": (Part("post_attention_layernorm.weight"),),
    "mlp.gate_up.weight": (Part("mlp.gate_proj.weight"), Part("mlp.up_proj.weight")),
    "mlp.down.weight": (Part("mlp.down_proj.weight"),),
}
_FLOATS = {"F32", "F16", "BF16"}
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


def read_folder(folder: Path) -> Checkpoint:
    """Read a Hugging Face folder.

    Raises:
        CheckpointError: a file is missing or damaged, or the architecture is not one of ours.
    """
    if not (folder / "config.json").exists():
        raise CheckpointError(
            f"{folder} has no config.json: a Hugging Face folder with config.json, *.safetensors and "
            "tokenizer.json is needed"
        )
    raw = read_json(folder / "config.json", error=CheckpointError)
    config = config_from_hf(raw)
    files = _weight_files(folder)

    shapes: dict[str, tuple[int, ...]] = {}
    holder: dict[str, Path] = {}
    types: Counter[str] = Counter()
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    part = file.get_slice(name)
                    if part.get_dtype() not in _FLOATS:
                        raise CheckpointError(
                            f"{path}: tensor {name} is of type {part.get_dtype()}; "
                            f"supported: {', '.join(sorted(_FLOATS))}"
                        )
                    types[part.get_dtype()] += 1
                    shapes[name] = tuple(part.get_shape())
                    holder[name] = path
        except SafetensorError as error:
            raise CheckpointError(f"{path}: damaged safetensors file ({error}): download it again") from error
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error

    def load(name: str) -> torch.Tensor:
        with safe_open(holder[name], framework="pt") as file:
            tensor: torch.Tensor = file.get_tensor(name)
            return tensor

    weights = bind_weights(
        config,
        OUTER,
        LAYER,
        "model.layers.{}.",
        shapes,
        load,
        ignored=lambda name: (
            name.endswith(".rotary_emb.inv_freq") or (name == "lm_head.weight" and config.tie_word_embeddings)
        ),
        where=str(folder),
    )
    generation = _generation(folder, raw)
    source = Source(
        name=folder.resolve().name,
        format="safetensors",
        files=tuple(hash_file(path) for path in files),
        weight_types=", ".join(kind for kind, _ in types.most_common()),
    )
    return Checkpoint(config, weights, _tokenizer(folder, generation), generation, source)


def _weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder: those its index names, else `model.safetensors`, else the only one."""
    index = folder / "model.safetensors.index.json"
    if index.exists():
        shards = read_json(index, error=CheckpointError).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise CheckpointError(f"{index}: weight_map is not a table of file names")
        names = sorted(set(shards.values()))
        if any(Path(name).name != name for name in names):
            raise CheckpointError(f"{index}: weight_map names files outside of the folder")
        paths = [folder / name for name in names]
    else:
        paths = [folder / "model.safetensors"]
        if not paths[0].exists():
            paths = sorted(folder.glob("*.safetensors"))
        if len(paths) != 1:
            found = f"{len(paths)} .safetensors files and no model.safetensors.index.json" if paths else "no weights"
            raise CheckpointError(f"{folder} has {found}: model.safetensors or a sharded set with its index is needed")
    for path in paths:
        if not path.is_file():
            raise CheckpointError(f"{path} is missing: the checkpoint is incomplete, download it again")
    return paths


def _generation(folder: Path, config: Mapping[str, Any]) -> dict[str, Any]:
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


def _tokenizer(folder: Path, generation: Mapping[str, Any]) -> TokenizerAssets:
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
