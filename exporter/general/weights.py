"""Reads the weights of transformers' model from a checkpoint, one at a time, through transformers' own renaming."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

from llm_edge.runtime.errors import CheckpointError

Shape = tuple[int, ...]


@dataclass(slots=True)
class _Source:
    """What supplies one or several parameters: tensors of the checkpoint, and what converts them.

    Attributes:
        first: the parameter that transformers names the conversion after.
        converter: transformers' conversion; None uses the only tensor unchanged.
        tensors: name of each tensor and the pattern of the conversion that it matches.
    """

    first: str
    converter: WeightConverter | None
    tensors: list[tuple[str, str]] = field(default_factory=list)

    def read(self, load: Callable[[str], Tensor]) -> dict[str, Tensor]:
        """Return the parameters by name."""
        if self.converter is None:
            ((name, _),) = self.tensors
            return {self.first: load(name)}
        converter = copy.deepcopy(self.converter)
        for name, pattern in self.tensors:
            converter.add_tensor(self.first, name, pattern, partial(load, name))  # type: ignore[arg-type]
        found: dict[str, Tensor | list[Tensor]] = converter.convert(self.first)
        return {name: tensor[0] if isinstance(tensor, list) else tensor for name, tensor in found.items()}


class GeneralWeights(Mapping[str, Tensor]):
    """Lazy mapping from the parameter names of transformers' model to tensors; each lookup reads from disk.

    Args:
        model: transformers' model; its parameters need no values.
        shapes: of all tensors of the checkpoint, by name.
        load: reads one of them.
        where: path for messages.

    Raises:
        CheckpointError: a tensor is missing, has the wrong shape, or is not used by this model.
    """

    def __init__(self, model: Any, shapes: Mapping[str, Shape], load: Callable[[str], Tensor], where: str) -> None:
        self._load = load
        expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        sources, unused = _sources(model, shapes, expected)
        self._sources: dict[str, _Source] = {}
        for source in sources:
            produced = source.read(lambda name: torch.empty(shapes[name], device="meta"))
            for name, tensor in produced.items():
                if name in expected and tuple(tensor.shape) != expected[name]:
                    raise CheckpointError(
                        f"{where}: {name} has shape {tuple(tensor.shape)}, the config requires {expected[name]}"
                    )
                self._sources[name] = source
        self._tied = {target: source for target, source in model.all_tied_weights_keys.items() if source in expected}
        for name in expected:
            if name not in self._sources and self._tied.get(name, name) not in self._sources:
                raise CheckpointError(f"{where}: tensor {name} is missing: the checkpoint is incomplete")
        ignored = model._keys_to_ignore_on_load_unexpected or ()
        unused = [name for name in unused if not any(re.search(pattern, name) for pattern in ignored)]
        if unused:
            more = f" and {len(unused) - 1} more" if len(unused) > 1 else ""
            name = ascii(unused[0])[1:-1][:200]
            raise CheckpointError(
                f"{where}: unexpected tensor {name}{more}: this variant of the model is not supported"
            )
        self._names = tuple(expected)

    def __getitem__(self, name: str) -> Tensor:
        name = name if name in self._sources else self._tied[name]
        return self._sources[name].read(self._load)[name]

    def __contains__(self, name: object) -> bool:  # the inherited method would read the weight
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _sources(model: Any, names: Mapping[str, Shape], expected: Mapping[str, Shape]) -> tuple[list[_Source], list[str]]:
    """Return what supplies the parameters, and the tensors that supply none."""
    transforms = get_model_conversion_mapping(model)
    renamings = [each for each in transforms if isinstance(each, WeightRenaming)]
    converters = [each for each in transforms if isinstance(each, WeightConverter)]
    of_pattern = {pattern: each for each in converters for pattern in each.source_patterns}
    prefix, known = model.base_model_prefix, dict.fromkeys(expected, True)
    found: dict[str, _Source] = {}
    unused = []
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, known)
        if target not in expected and name in expected:  # as transformers does
            target, pattern = rename_source_key(name, [], [], prefix, known)
        if target not in expected:
            unused.append(name)
        elif pattern is None:
            found[target] = _Source(target, None, [(name, "")])
        else:
            source = found.setdefault(target, _Source(target, of_pattern[pattern]))
            source.tensors.append((name, pattern))
    return list(found.values()), unused
