"""What every reader returns. Knows no format; the readers beside this file fill it in."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from llm_edge.exporter.config import ModelConfig
from llm_edge.exporter.model import Decoder
from llm_edge.runtime.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class TokenizerAssets:
    """A tokenizer as the files of a Hugging Face folder.

    Attributes:
        tokenizer_json: text of `tokenizer.json`.
        tokenizer_config: content of `tokenizer_config.json`, without the chat template.
        special_tokens_map: content of `special_tokens_map.json`.
        chat_template: Jinja source, or None for a model that does not chat.
        bos_token_id: token that opens a text, or None.
        eos_token_ids: tokens that end an answer; may be empty.
        pad_token_id: token that fills rows of a batch, or None.
    """

    tokenizer_json: str
    tokenizer_config: Mapping[str, Any]
    special_tokens_map: Mapping[str, Any]
    chat_template: str | None
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]
    pad_token_id: int | None


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of the source that makes up (part of) one of ours; `convert` mends a quirk of the family."""

    name: str
    convert: Callable[[Tensor], Tensor] | None = None


class Weights(Mapping[str, Tensor]):
    """Weights under the names of `model.Decoder`, read from disk each time one is asked for.

    Parts of a packed projection are stacked along their first axis. The type is the source's own
    (quantized sources come as float32).
    """

    def __init__(self, rows: Mapping[str, tuple[Part, ...]], load: Callable[[str], Tensor]) -> None:
        self._rows = rows
        self._load = load

    def __getitem__(self, name: str) -> Tensor:
        parts = []
        for part in self._rows[name]:
            tensor = self._load(part.name)
            parts.append(part.convert(tensor) if part.convert else tensor)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


@dataclass(frozen=True, slots=True)
class SourceFile:
    """A file the weights came from: its name, size in bytes and sha256."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Source:
    """Where a checkpoint came from: a name for people, the format, its files and the types of its weights."""

    name: str
    format: str
    files: tuple[SourceFile, ...]
    weight_types: str

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(file.size for file in self.files)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A decoder, whole: its shape, weights, tokenizer, generation defaults and origin.

    `generation` holds keys of Hugging Face's `generation_config.json`.
    """

    config: ModelConfig
    weights: Weights
    tokenizer: TokenizerAssets
    generation: Mapping[str, Any]
    source: Source


def bind_weights(
    config: ModelConfig,
    outer: Mapping[str, tuple[Part, ...]],
    layer: Mapping[str, tuple[Part, ...]],
    layer_prefix: str,
    shapes: Mapping[str, tuple[int, ...]],
    load: Callable[[str], Tensor],
    ignored: Callable[[str], bool],
    where: str,
) -> Weights:
    """Join a family's weight table with a file and check every shape before anything is read.

    Args:
        config: the shape the weights must have.
        outer: rows outside of the layers, our name -> parts.
        layer: rows of one layer, our name behind `layers.N.` -> parts behind `layer_prefix`.
        layer_prefix: prefix of a layer's tensors in the source, with `{}` for its number.
        shapes: every tensor of the source.
        load: reads one tensor of the source.
        ignored: tells tensors that do not change the result and may be left over.
        where: the file, for messages.

    Raises:
        CheckpointError: a tensor is missing, of another shape, or not one this decoder knows.
    """
    rows = dict(outer)
    if config.tie_word_embeddings:
        rows.pop("lm_head.weight", None)
    for number in range(config.num_hidden_layers):
        prefix = layer_prefix.format(number)
        for name, parts in layer.items():
            rows[f"layers.{number}.{name}"] = tuple(Part(prefix + part.name, part.convert) for part in parts)

    with torch.device("meta"):
        expected = {name: tuple(weight.shape) for name, weight in Decoder(config).named_parameters()}
    assert expected.keys() == rows.keys()
    key_value = config.key_value_size
    heights = {  # of the parts of packed projections
        "qkv.weight": (config.query_size, key_value, key_value),
        "gate_up.weight": (config.intermediate_size, config.intermediate_size),
    }
    used: set[str] = set()
    for name, parts in rows.items():
        for part in parts:
            if part.name not in shapes:
                raise CheckpointError(f"{where}: tensor {part.name} is missing: the checkpoint is incomplete")
            used.add(part.name)
        found = [shapes[part.name] for part in parts]
        tails = {shape[1:] for shape in found}
        packed = (sum(shape[0] for shape in found), *found[0][1:]) if all(found) else ()
        apart = heights.get(".".join(name.split(".")[-2:])) if len(parts) > 1 else None
        if len(tails) != 1 or packed != expected[name] or (apart and apart != tuple(shape[0] for shape in found)):
            names = " + ".join(part.name for part in parts)
            raise CheckpointError(
                f"{where}: {names} has shape {' + '.join(map(str, found))}, the config asks for {expected[name]}"
            )
    strange = sorted(name for name in shapes.keys() - used if not ignored(name))
    if strange:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        raise CheckpointError(f"{where}: tensor {strange[0]}{more} has no place in this decoder: not a known variant")
    return Weights(rows, load)


def hash_file(path: Path) -> SourceFile:
    """Size and sha256 of a file, read in pieces."""
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    return SourceFile(path.name, path.stat().st_size, digest)
