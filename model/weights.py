"""From the tensors of a source to the weights of `model.Decoder`. Knows no format and no family."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_edge.model.block_weights import BlockKind, BlockReader, SourceBlocks
from llm_edge.model.config import ModelConfig
from llm_edge.model.decoder import Decoder
from llm_edge.runtime.errors import CheckpointError


@dataclass(frozen=True, slots=True)
class Part:
    """One tensor of the source that makes up (part of) one of ours; `convert` mends a quirk of the family."""

    name: str
    convert: Callable[[Tensor], Tensor] | None = None


@dataclass(frozen=True, slots=True)
class WeightTable:
    """Which tensors of a source make up which weight. Rows that a config has no use for do no harm.

    Attributes:
        outer: rows outside of the layers, our name -> parts, which are stacked along their first axis.
        layer: rows of one layer, our name behind `layers.N.` -> parts behind `layer_prefix`.
        layer_prefix: prefix of a layer's tensors in the source, with `{}` for its number.
        ignored: regular expression of whole names that may be left over, since they do not change the result.
    """

    outer: Mapping[str, tuple[Part, ...]]
    layer: Mapping[str, tuple[Part, ...]]
    layer_prefix: str
    ignored: str = "(?!)"


class Weights(Mapping[str, Tensor]):
    """Weights under the names of `model.Decoder`, read from disk each time one is asked for.

    Parts of a packed projection are stacked along their first axis. The type is the source's own
    (quantized sources come as float32).
    """

    def __init__(
        self, rows: Mapping[str, tuple[Part, ...]], load: Callable[[str], Tensor], reader: BlockReader | None = None
    ) -> None:
        self._rows = rows
        self._load = load
        self._reader = reader

    def __getitem__(self, name: str) -> Tensor:
        parts = []
        for part in self._rows[name]:
            tensor = self._load(part.name)
            parts.append(part.convert(tensor) if part.convert else tensor)
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def block_kind(self, name: str) -> BlockKind | None:
        """What the source's blocks of a weight hold; None unless all of its parts lie in blocks of one kind."""
        if self._reader is None:
            return None
        kinds = {self._reader.block_kind(part.name) for part in self._rows[name]}
        return kinds.pop() if len(kinds) == 1 else None

    def blocks(self, name: str) -> SourceBlocks:
        """A weight that has a kind, as its source rounded it."""
        assert self._reader is not None
        parts = []
        for part in self._rows[name]:
            blocks = self._reader.blocks(part.name)
            parts.append(blocks.moved(part.convert) if part.convert else blocks)
        return parts[0] if len(parts) == 1 else SourceBlocks.stacked(parts)

    def __contains__(self, name: object) -> bool:  # without reading the weight
        return name in self._rows

    def __iter__(self) -> Iterator[str]:
        return iter(self._rows)

    def __len__(self) -> int:
        return len(self._rows)


def bind_weights(
    config: ModelConfig,
    table: WeightTable,
    shapes: Mapping[str, tuple[int, ...]],
    load: Callable[[str], Tensor],
    where: str,
    reader: BlockReader | None = None,
) -> Weights:
    """Join a family's weight table with a file and check every shape before anything is read.

    Args:
        config: the shape the weights must have.
        table: see `WeightTable`.
        shapes: every tensor of the source.
        load: reads one tensor of the source.
        where: the file, for messages.
        reader: of a source that holds blocks; the table's conversions then do nothing but move rows.

    Raises:
        CheckpointError: a tensor is missing, of another shape, or not one this decoder knows.
    """
    rows: dict[str, tuple[Part, ...]] = {}
    used: set[str] = set()
    for name, expected in _expected(config):
        rows[name] = parts = _row(table, name)
        for part in parts:
            if part.name not in shapes:
                raise CheckpointError(f"{where}: tensor {part.name} is missing: the checkpoint is incomplete")
            used.add(part.name)
        _check(config, name, parts, expected, shapes, where)
    ignored = re.compile(table.ignored)
    head = {part.name for part in table.outer.get("lm_head.weight", ())} if config.tie_word_embeddings else set()
    strange = sorted(name for name in shapes.keys() - used - head if not ignored.fullmatch(name))
    if strange:
        more = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        name = ascii(strange[0])[1:-1][:200]
        raise CheckpointError(f"{where}: tensor {name}{more} has no place in this decoder: not a known variant")
    return Weights(rows, load, reader)


def _expected(config: ModelConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all weights. Layers have the same, so one is made, whatever number a config claims."""
    with torch.device("meta"):
        one = Decoder(dataclasses.replace(config, layers=config.layers[:1]))
    first = "layers.0."
    for name, weight in one.named_parameters():
        for number in range(config.num_hidden_layers if name.startswith(first) else 1):
            yield name.replace(first, f"layers.{number}.", 1), tuple(weight.shape)


def half_split(head_dim: int) -> Callable[[Tensor], Tensor]:
    """Conversion of queries or keys [heads * D, …] from interleaved pairs to half-split rotary form."""

    def convert(weight: Tensor) -> Tensor:
        pairs = weight.reshape(-1, head_dim // 2, 2, *weight.shape[1:])
        return pairs.transpose(1, 2).reshape(weight.shape)

    return convert


def _row(table: WeightTable, name: str) -> tuple[Part, ...]:
    number, inner = "", name
    if name.startswith("layers."):
        _, number, inner = name.split(".", 2)
    parts = (table.layer if number else table.outer).get(inner)
    if parts is None:
        raise CheckpointError(f"the family's weight table has no row for {inner}, which its config asks for")
    prefix = table.layer_prefix.format(number) if number else ""
    return tuple(Part(prefix + part.name, part.convert) for part in parts)


def _check(
    config: ModelConfig,
    name: str,
    parts: tuple[Part, ...],
    expected: tuple[int, ...],
    shapes: Mapping[str, tuple[int, ...]],
    where: str,
) -> None:
    """Compare the shapes of one row's parts, once converted, with the decoder's."""
    found = [_converted(part, shapes[part.name]) for part in parts]
    tails = {shape[1:] for shape in found if shape}
    packed = (sum(shape[0] for shape in found), *found[0][1:]) if all(found) else ()
    heights = {  # of the parts of packed projections
        "qkv": (config.query_size, config.key_value_size, config.key_value_size),
        "gate_up": (config.intermediate_size, config.intermediate_size),
    }
    apart = heights.get(name.split(".")[-2]) if len(parts) > 1 else None
    if len(tails) != 1 or packed != expected or (apart and apart != tuple(shape[0] for shape in found)):
        names = " + ".join(part.name for part in parts)
        given = " + ".join(str(shapes[part.name]) for part in parts)
        raise CheckpointError(f"{where}: {names} has shape {given}, the config asks for {expected}")


def _converted(part: Part, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Shape behind `convert`; of a tensor that cannot be converted, as it is."""
    if part.convert is None:
        return shape
    try:
        return tuple(part.convert(torch.empty(shape, device="meta")).shape)
    except (RuntimeError, ValueError, IndexError):
        return ()
