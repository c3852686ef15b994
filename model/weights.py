"""Weight tables: which tensors of a checkpoint make up which weights of `model.decoder.Decoder`."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from llm_edge.model.block_weights import BlockKind, BlockReader, SourceBlocks
from llm_edge.model.config import ModelConfig
from llm_edge.model.decoder import Decoder
from llm_edge.runtime.errors import CheckpointError, UnsupportedSettingError

EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
"""Names of the decoder's token embedding and output head; a tied model has no head."""

Convert = Callable[[Tensor], Tensor]
Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class SourceTensor:
    """A tensor of the checkpoint that supplies a weight or a part of one.

    Attributes:
        name: name in the checkpoint; within a layer, without the layer's prefix.
        convert: applied to the tensor after loading; None uses it unchanged.
        restore: the inverse of `convert`, for saving; None if `convert` is None or has no inverse.
    """

    name: str
    convert: Convert | None = None
    restore: Convert | None = None


Sources = str | SourceTensor | tuple[str | SourceTensor, ...]
"""One tensor, or several to concatenate along the first axis. A bare name is a tensor used unchanged."""


@dataclass(frozen=True, slots=True)
class WeightTable:
    """Maps the decoder's weights to the tensors of a checkpoint. Entries that a config does not use are allowed.

    Attributes:
        outer: weights outside the layers, by their names in the decoder.
        layer: weights of a layer, by their names after `layers.N.` -> tensors after `layer_prefix`.
        layer_prefix: prefix of a layer's tensors in the checkpoint, with `{}` for the layer number.
        ignored: regular expression of full tensor names that may be left unused because they do not affect the
            result.
    """

    outer: Mapping[str, Sources]
    layer: Mapping[str, Sources]
    layer_prefix: str
    ignored: str = "(?!)"

    def sources(self, name: str) -> tuple[SourceTensor, ...]:
        """Return the tensors of a weight, under their full names in the checkpoint."""
        number, inner = "", name
        if name.startswith("layers."):
            _, number, inner = name.split(".", 2)
        found = (self.layer if number else self.outer).get(inner)
        if found is None:
            raise CheckpointError(f"the family's weight table has no entry for {inner}, which its config requires")
        prefix = self.layer_prefix.format(number) if number else ""
        tensors = (
            SourceTensor(x) if isinstance(x, str) else x for x in (found if isinstance(found, tuple) else (found,))
        )
        return tuple(dataclasses.replace(tensor, name=prefix + tensor.name) for tensor in tensors)


class Weights(Mapping[str, Tensor]):
    """Lazy mapping from the decoder's weight names to tensors; each lookup reads from disk.

    Tensors keep the dtype of the checkpoint; quantized ones are dequantized to float32. Of the tensors in `movable`,
    the weight table only reorders rows, so that their blocks can be kept.
    """

    def __init__(
        self,
        sources: Mapping[str, tuple[SourceTensor, ...]],
        load: Callable[[str], Tensor],
        block_reader: BlockReader | None = None,
        movable: Collection[str] = (),
    ) -> None:
        self._sources = sources
        self._load = load
        self._block_reader = block_reader
        self._movable = movable

    def __getitem__(self, name: str) -> Tensor:
        loaded = []
        for source in self._sources[name]:
            tensor = self._load(source.name)
            loaded.append(source.convert(tensor) if source.convert else tensor)
        return loaded[0] if len(loaded) == 1 else torch.cat(loaded)

    def sources(self, name: str) -> tuple[SourceTensor, ...]:
        """Return the tensors of the checkpoint that make up a weight."""
        return self._sources[name]

    def load_source(self, name: str) -> Tensor:
        """Read a tensor of the checkpoint, not converted."""
        return self._load(name)

    def block_kind(self, name: str) -> BlockKind | None:
        """Return the block layout that holds a weight, or None unless all its source tensors are stored in blocks."""
        if self._block_reader is None:
            return None
        if any(source.name not in self._movable for source in self._sources[name]):
            return None
        kinds = [self._block_reader.block_kind(source.name) for source in self._sources[name]]
        found = [kind for kind in kinds if kind is not None]
        return BlockKind.common(found) if len(found) == len(kinds) else None

    def blocks(self, name: str) -> SourceBlocks:
        """Return the quantized blocks of a weight for which `block_kind` is not None."""
        reader, wanted = self._block_reader, self.block_kind(name)
        assert reader is not None
        assert wanted is not None
        loaded = []
        for source in self._sources[name]:
            own = reader.block_kind(source.name)
            assert own is not None
            blocks = reader.blocks(source.name).converted(own, wanted)
            loaded.append(blocks.map(source.convert) if source.convert else blocks)
        return loaded[0] if len(loaded) == 1 else SourceBlocks.concatenate(loaded)

    def __contains__(self, name: object) -> bool:  # the inherited method would read the weight
        return name in self._sources

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)


def bind_weights(
    config: ModelConfig,
    table: WeightTable,
    shapes: Mapping[str, Shape],
    load: Callable[[str], Tensor],
    where: str,
    block_reader: BlockReader | None = None,
    unused: Collection[str] = (),
) -> Weights:
    """Apply a weight table to a checkpoint, checking every name and shape before any tensor is read.

    `shapes` are those of all tensors of the checkpoint by name, `load` reads one of them, and `where` is the path for
    messages. The `block_reader` is for checkpoints that store blocks. The tensors in `unused` may be left unused.

    Raises:
        CheckpointError: a tensor is missing, has the wrong shape, or is not used by this model.
    """
    sources: dict[str, tuple[SourceTensor, ...]] = {}
    for name, expected in _expected_shapes(config):
        sources[name] = table.sources(name)
        for source in sources[name]:
            if source.name not in shapes:
                raise CheckpointError(f"{where}: tensor {source.name} is missing: the checkpoint is incomplete")
        if not _has_shape(config, name, sources[name], expected, shapes):
            names = " + ".join(source.name for source in sources[name])
            given = " + ".join(str(shapes[source.name]) for source in sources[name])
            raise CheckpointError(f"{where}: {names} has shape {given}, the config requires {expected}")
    unexpected = [name for name in unused_tensors(config, table, shapes) if name not in unused]
    if unexpected:
        more = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
        name = ascii(unexpected[0])[1:-1][:200]
        raise UnsupportedSettingError(
            f"{where}: unexpected tensor {name}{more}: this variant of the model is not supported"
        )
    movable = set()
    if block_reader is not None:
        every = [source for of_weight in sources.values() for source in of_weight]
        movable = {source.name for source in every if _only_moves_rows(source, shapes[source.name])}
    return Weights(sources, load, block_reader, movable)


def source_rows(config: ModelConfig, name: str, count: int) -> tuple[int, ...] | None:
    """Return how many rows of a packed weight or bias each of its source tensors makes up; None for a single one."""
    if count == 1:
        return None
    return {
        "qkv": (config.query_size, config.key_value_size, config.key_value_size),
        "gate_up": (config.intermediate_size, config.intermediate_size),
    }.get(name.split(".")[-2])


def restore_sources(
    config: ModelConfig, name: str, sources: tuple[SourceTensor, ...], weight: Tensor
) -> dict[str, Tensor]:
    """Return the tensors of a checkpoint for a weight of the decoder: the inverse of reading `Weights[name]`.

    Raises:
        CheckpointError: a conversion of the family has no inverse.
    """
    rows = source_rows(config, name, len(sources))
    parts = [weight] if rows is None else torch.split(weight, list(rows))
    if len(parts) != len(sources):
        raise CheckpointError(f"{name} cannot be split into {len(sources)} tensors: the family does not support saving")
    restored = {}
    for source, part in zip(sources, parts, strict=True):
        if source.convert is not None and source.restore is None:
            raise CheckpointError(
                f"{source.name} cannot be saved: its conversion in the weight table of the family has no `restore`"
            )
        restored[source.name] = source.restore(part) if source.restore else part
    return restored


def unused_tensors(config: ModelConfig, table: WeightTable, names: Iterable[str]) -> list[str]:
    """Return the tensors of a checkpoint that a model neither uses nor ignores, sorted."""
    used = {source.name for name, _ in _expected_shapes(config) for source in table.sources(name)}
    if config.tie_word_embeddings and HEAD in table.outer:
        used |= {source.name for source in table.sources(HEAD)}
    return sorted(name for name in names if name not in used and not re.fullmatch(table.ignored, name))


def resolve_tied_head(
    config: ModelConfig,
    table: WeightTable,
    shapes: Mapping[str, Shape],
    load: Callable[[str], Tensor],
) -> tuple[ModelConfig, WeightTable, str | None]:
    """Decide as transformers 5 does whether a model whose config ties its head to the embedding is tied.

    If the checkpoint stores two different weights, the config is overruled. If it stores only the head's weight, which
    is a name that savers of shared tensors may keep, the embedding is read from there.

    Args:
        config: of the model.
        table: of the family.
        shapes: shapes of all tensors of the checkpoint by name.
        load: reads one of them.

    Returns:
        Config and table to bind the weights with, and a note for the user if the config was overruled.
    """
    if not config.tie_word_embeddings or HEAD not in table.outer:
        return config, table, None
    (embedding, *_), (head, *_) = table.sources(EMBEDDING), table.sources(HEAD)
    if head.name not in shapes:
        return config, table, None
    if embedding.name not in shapes:
        return config, dataclasses.replace(table, outer={**table.outer, EMBEDDING: table.outer[HEAD]}), None
    if shapes[head.name] == shapes[embedding.name] and torch.equal(
        load(head.name).float(), load(embedding.name).float()
    ):
        return config, table, None
    note = (
        f"tie_word_embeddings is true, but {head.name} differs from {embedding.name}: exported with its own output "
        "head, as transformers loads it"
    )
    return dataclasses.replace(config, tie_word_embeddings=False), table, note


def half_split(head_dim: int, rotated: int | None = None) -> Convert:
    """Return a conversion of query or key weights [heads * D, …] from interleaved to half-split rotary order.

    `rotated` is the number of leading dimensions of a head that are rotated; None for all.
    """
    dim = head_dim if rotated is None else rotated

    def convert(weight: Tensor) -> Tensor:
        heads = weight.reshape(-1, head_dim, *weight.shape[1:])
        pairs = heads[:, :dim].reshape(-1, dim // 2, 2, *weight.shape[1:])
        halves = pairs.transpose(1, 2).reshape(len(heads), dim, *weight.shape[1:])
        return torch.cat([halves, heads[:, dim:]], dim=1).reshape(weight.shape)

    return convert


def interleave(head_dim: int, rotated: int | None = None) -> Convert:
    """Return the inverse of `half_split`."""
    dim = head_dim if rotated is None else rotated

    def convert(weight: Tensor) -> Tensor:
        heads = weight.reshape(-1, head_dim, *weight.shape[1:])
        halves = heads[:, :dim].reshape(-1, 2, dim // 2, *weight.shape[1:])
        pairs = halves.transpose(1, 2).reshape(len(heads), dim, *weight.shape[1:])
        return torch.cat([pairs, heads[:, dim:]], dim=1).reshape(weight.shape)

    return convert


def _expected_shapes(config: ModelConfig) -> Iterator[tuple[str, Shape]]:
    """Yield name and shape of every weight. All layers have the same shapes, so only one layer is instantiated."""
    with torch.device("meta"):
        decoder = Decoder(dataclasses.replace(config, layers=config.layers[:1]))
    first = "layers.0."
    for name, weight in decoder.named_parameters():
        for number in range(config.num_hidden_layers if name.startswith(first) else 1):
            yield name.replace(first, f"layers.{number}.", 1), tuple(weight.shape)


def _has_shape(
    config: ModelConfig, name: str, sources: tuple[SourceTensor, ...], expected: Shape, shapes: Mapping[str, Shape]
) -> bool:
    """Return whether the tensors of a weight, converted and concatenated, have the decoder's shape."""
    found = [_converted_shape(source, shapes[source.name]) for source in sources]
    widths = {shape[1:] for shape in found if shape}
    packed = (sum(shape[0] for shape in found), *found[0][1:]) if all(found) else ()
    separate = source_rows(config, name, len(sources))
    return len(widths) == 1 and packed == expected and (not separate or separate == tuple(shape[0] for shape in found))


def _converted_shape(source: SourceTensor, shape: Shape) -> Shape:
    """Shape after `convert`, or () if the tensor cannot be converted."""
    if source.convert is None:
        return shape
    try:
        return tuple(source.convert(torch.empty(shape, device="meta")).shape)
    except (RuntimeError, ValueError, IndexError):
        return ()


def _only_moves_rows(source: SourceTensor, shape: Shape) -> bool:
    """Whether a conversion of a matrix selects and reorders its rows, tried on a matrix of the row numbers."""
    if source.convert is None:
        return True
    if len(shape) != 2:
        return False
    numbers = torch.arange(shape[0], dtype=torch.float32)[:, None]
    try:
        moved = source.convert(numbers)
    except (RuntimeError, ValueError, IndexError):
        return False
    if moved.dim() != 2 or moved.shape[1] != 1 or not torch.isin(moved, numbers).all():
        return False
    return len({*moved.flatten().tolist()}) == len(moved)
