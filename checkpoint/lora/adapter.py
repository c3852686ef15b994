"""LoRA adapters in peft's format, merged into the tensors of a base model as they are loaded.

Supports LoRA (arXiv:2106.09685), rank-stabilized scaling (arXiv:2312.03732) and DoRA (arXiv:2402.09353).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from torch import Tensor

from llm_edge.checkpoint.base import SourceFile, hash_file
from llm_edge.checkpoint.lora.config import MAX_MODULE_PATH, LoraConfig, read_lora_config
from llm_edge.checkpoint.tensors.tensor_file import TensorFile, open_tensor_file
from llm_edge.runtime.errors import CheckpointError
from llm_edge.runtime.safe_io import read_json

CONFIG = "adapter_config.json"
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # the first one found is used

_PEFT_PREFIX = "base_model.model."  # of all names peft writes: PeftModel.base_model.model is the base model
_BASE_PREFIXES = ("model.", "transformer.")  # present if the base was saved with its head
_LORA_TENSOR = re.compile(r"(?P<module>.+)\.lora_(?P<kind>A\.weight|B\.weight|B\.bias|embedding_[AB]|magnitude_vector)")
_EMBEDDINGS = {"embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings"}
_HEADS = {"lm_head", "embed_out"}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _LowRank:
    """Names of the adapter's tensors for one module, with their shapes."""

    a: str  # [rank, in]
    b: str  # [out, rank]
    magnitude: str | None = None  # [out]
    bias: str | None = None  # [out]
    embedding: bool = False


@dataclass(frozen=True, slots=True)
class _Change:
    """Changes to one tensor of the base, applied in this order."""

    replacement: str | None = None  # tensor of the adapter that replaces it
    added: str | None = None  # tensor of the adapter that is added to it (a bias)
    low_rank: _LowRank | None = None  # tensors whose product is added to it
    scaling: float = 1.0  # factor of `added` and of the low-rank product
    transposed: bool = False  # whether the base stores the weight as [in, out]


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter; its tensors are read together with those of the base.

    Attributes:
        name: display name.
        base_model: Hugging Face id or path of the base model according to the adapter, or None.
        folder: folder of the adapter.
        files: config and weight file, for the manifest.
    """

    name: str
    base_model: str | None
    folder: Path
    files: tuple[SourceFile, ...]
    _config: LoraConfig
    _file: TensorFile = field(repr=False)
    _modules: Mapping[str, _LowRank] = field(repr=False)  # module path -> its update
    _replacements: Mapping[str, str] = field(repr=False)  # tensor of the base -> tensor of the adapter

    def wrap(
        self,
        shapes: Mapping[str, Shape],
        load: Callable[[str], Tensor],
        *,
        transposed: Callable[[str], bool] | None = None,
        tied_head: bool | None = None,
    ) -> Callable[[str], Tensor]:
        """Return a function that loads a tensor of the base with this adapter merged.

        Changed weights are `W + scaling * B @ A` in float32, because an update is often smaller than the rounding
        error of a bfloat16 weight. Other tensors are returned unchanged.

        Args:
            shapes: shapes of all tensors of the base by name.
            load: reads a tensor of the base.
            transposed: whether the base stores a weight as [in, out] (as GPT-2 does). By default determined by the
                shapes, and for square weights by the adapter's config.
            tied_head: whether the base's output head is its token embedding; by default, whether it has no head.

        Raises:
            CheckpointError: a tensor of the adapter has no counterpart in the base, or a different shape.
        """
        changes = self._changes(_Base(shapes, self.folder), transposed)
        if tied_head is None:
            tied_head = not any(_module_name(name) in _HEADS for name in shapes)
        if tied_head:
            self._check_tied(changes)

        def load_merged(name: str) -> Tensor:
            change = changes.get(name)
            return load(name) if change is None else self._apply(change, name, load)

        return load_merged

    def _changes(self, base: _Base, transposed: Callable[[str], bool] | None) -> dict[str, _Change]:
        """Return the change of every affected tensor of the base, checking names and shapes."""
        changes: dict[str, _Change] = {}
        for target, own in self._replacements.items():
            name = base.find(target, own)
            if name in changes:
                raise CheckpointError(f"{self.folder}: two replacements of {name} of the base model")
            self._check_shape(own, base.shapes[name], name)
            changes[name] = _Change(replacement=own)

        square: list[str] = []
        layouts: set[bool] = set()
        for module, low_rank in self._modules.items():
            name = base.find(f"{module}.weight", low_rank.a)
            previous = changes.get(name, _Change())
            if previous.low_rank:
                raise CheckpointError(f"{self.folder}: two updates of {name} of the base model")
            scaling = self._config.scaling(module, self._rank(module, low_rank))
            is_transposed = self._is_transposed(low_rank, name, base.shapes[name], transposed)
            if not low_rank.embedding and transposed is None:
                is_square = base.shapes[name][0] == base.shapes[name][1]
                square.extend([name] if is_square else [])
                layouts.update([] if is_square else [is_transposed])
            out = base.shapes[name][1 if is_transposed else 0]
            changes[name] = replace(previous, low_rank=low_rank, scaling=scaling, transposed=is_transposed)
            if low_rank.magnitude:
                self._check_shape(low_rank.magnitude, (out,), name)
            if low_rank.bias:
                bias = base.find(f"{module}.bias", low_rank.bias)
                self._check_shape(low_rank.bias, base.shapes[bias], bias)
                changes[bias] = replace(changes.get(bias, _Change()), added=low_rank.bias, scaling=scaling)
        if square and layouts - {self._config.fan_in_fan_out}:
            raise CheckpointError(
                f"{self.folder}: other weights contradict the adapter's fan_in_fan_out, so the layout of the square "
                f"{square[0]} is ambiguous: merge it with peft"
            )
        return changes

    def _rank(self, module: str, low_rank: _LowRank) -> int:
        """Return the rank of a module; its two tensors and the config must agree."""
        a, b = self._shape(low_rank.a), self._shape(low_rank.b)
        rank = self._config.rank(module)
        if len(a) != 2 or len(b) != 2 or not a[0] == b[1] == rank:
            raise CheckpointError(
                f"{self.folder}: {low_rank.b} and {low_rank.a} have shapes {b} and {a}; the config requires rank {rank}"
            )
        return rank

    def _is_transposed(
        self, low_rank: _LowRank, name: str, shape: Shape, transposed: Callable[[str], bool] | None
    ) -> bool:
        """Whether the base stores a weight as [in, out]; checks that the shape of the update matches."""
        update = (self._shape(low_rank.b)[0], self._shape(low_rank.a)[1])
        layouts = {False: update, True: update[::-1]}
        if low_rank.embedding:  # an embedding is stored as [in, out]
            del layouts[False]
        fitting = [layout for layout, found in layouts.items() if found == shape]
        if transposed is not None and not low_rank.embedding:
            fitting = [layout for layout in fitting if layout == transposed(name)]
        if not fitting:
            raise CheckpointError(
                f"{self.folder}: {low_rank.b} @ {low_rank.a} has shape {update}, {name} of the base model {shape}: "
                f"{self._remedy}"
            )
        return fitting[0] if len(fitting) == 1 else self._config.fan_in_fan_out

    def _check_shape(self, own: str, shape: Shape, name: str) -> None:
        if self._shape(own) != shape:
            raise CheckpointError(
                f"{self.folder}: {own} has shape {self._shape(own)}, {name} of the base model has {shape}: "
                f"{self._remedy}"
            )

    @property
    def _remedy(self) -> str:
        return f"export the model that the adapter was trained on{f' ({self.base_model})' if self.base_model else ''}"

    def _check_tied(self, changes: dict[str, _Change]) -> None:
        """Check that an adapter for a model with tied embedding and head changes both in the same way, or neither."""
        changed = {name: change for name, change in changes.items() if _module_name(name) in _EMBEDDINGS | _HEADS}
        replacements = [change.replacement for change in changed.values() if change.replacement and not change.low_rank]
        if len(replacements) == len(changed) == 2 and torch.equal(
            self._file.load(replacements[0]), self._file.load(replacements[1])
        ):
            return
        for name in changed:
            raise CheckpointError(
                f"{self.folder}: changes {name}, but the base model ties embedding and output head, and the adapter "
                "does not change both equally: merge it with peft into an untied model"
            )

    def _apply(self, change: _Change, name: str, load: Callable[[str], Tensor]) -> Tensor:
        base = load(name) if change.replacement is None else self._file.load(change.replacement)
        if change.low_rank is None and change.added is None:
            return base
        merged = base.to(torch.float32, copy=True)
        if change.added:
            merged.add_(self._file.load(change.added).float(), alpha=change.scaling)
        if change.low_rank:
            a, b = self._file.load(change.low_rank.a).float(), self._file.load(change.low_rank.b).float()
            left, right = (a.T, b.T) if change.transposed else (b, a)
            merged.addmm_(left, right, alpha=change.scaling)
            if change.low_rank.magnitude:  # DoRA: the merged weight is only the direction; the magnitude is learned
                inputs = 0 if change.transposed else 1
                length = torch.linalg.vector_norm(merged, dim=inputs, keepdim=True)
                merged.mul_(self._file.load(change.low_rank.magnitude).float().unsqueeze(inputs) / length)
        if not torch.isfinite(merged).all():
            raise CheckpointError(f"{self.folder}: {name} is not finite after merging: the adapter is damaged")
        return merged

    def _shape(self, own: str) -> Shape:
        return tuple(self._file.tensors[own].shape)


class _Base:
    """Finds the tensors of the base by the names that the adapter uses."""

    def __init__(self, shapes: Mapping[str, Shape], folder: Path) -> None:
        self.shapes = shapes
        self.folder = folder
        self._unprefixed: dict[str, list[str]] = {}
        for name in shapes:
            self._unprefixed.setdefault(_strip_prefix(name), []).append(name)

    def find(self, target: str, own: str) -> str:
        """Return the base's name for `target`, ignoring a base prefix if that is unambiguous."""
        if target in self.shapes:
            return target
        found = self._unprefixed.get(_strip_prefix(target), [])
        if len(found) == 1:
            return found[0]
        reason = "is ambiguous in" if found else "is not a tensor of"
        raise CheckpointError(
            f"{self.folder}: {own} does not match: {target} {reason} the base model (wrong base model, or one that the "
            "adapter extends)"
        )


def _strip_prefix(name: str) -> str:
    for prefix in _BASE_PREFIXES:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name


def _module_name(tensor: str) -> str:
    """Return `embed_tokens` for `model.embed_tokens.weight`."""
    return tensor.rpartition(".")[0].rpartition(".")[2]


def open_adapter(folder: Path, name: str | None = None) -> Adapter:
    """Open an adapter folder, reading its config and the names and shapes of its tensors.

    Args:
        folder: folder saved by peft.
        name: display name; by default the folder's name.

    Raises:
        CheckpointError: a file is missing or damaged, or it is not a supported LoRA adapter.
    """
    if not (folder / CONFIG).exists():
        raise CheckpointError(f"{folder} has no {CONFIG}: give an adapter folder with {CONFIG} and {WEIGHTS[0]}")
    path = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if path is None:
        raise CheckpointError(f"{folder} has no {WEIGHTS[0]}: save the adapter with peft's save_pretrained")
    raw = read_json(folder / CONFIG, error=CheckpointError)
    config = read_lora_config(raw, folder / CONFIG)
    file = open_tensor_file(path)
    for own, tensor in file.tensors.items():
        if tensor.dtype not in _FLOATS:
            kind = str(tensor.dtype).removeprefix("torch.")
            raise CheckpointError(f"{path}: tensor {own} is of type {kind}: save it as float32, float16 or bfloat16")
    modules, replacements = _group_tensors(file.tensors, path)
    for module, low_rank in modules.items():
        if config.use_dora != bool(low_rank.magnitude):
            word = "no" if config.use_dora else "a"
            raise CheckpointError(
                f"{path}: {module} has {word} lora_magnitude_vector, which contradicts use_dora in {CONFIG}"
            )
    for module in config.modules_to_save:
        if not any(f"{module}." in target for target in replacements):
            raise CheckpointError(f"{path}: modules_to_save lists {module[:100]!r}, but the file has no tensor for it")
    base_model = raw.get("base_model_name_or_path")
    if not isinstance(base_model, str) or not base_model.isprintable() or len(base_model) > 200:
        base_model = None
    return Adapter(
        name=name or folder.resolve().name,
        base_model=base_model or None,
        folder=folder,
        files=(hash_file(folder / CONFIG), hash_file(path)),
        _config=config,
        _file=file,
        _modules=modules,
        _replacements=replacements,
    )


def _group_tensors(names: Iterable[str], path: Path) -> tuple[dict[str, _LowRank], dict[str, str]]:
    """Return the low-rank tensors by module, and the replacements by the name of the tensor they replace."""
    by_module: dict[str, dict[str, str]] = {}
    replacements: dict[str, str] = {}
    for own in sorted(names):
        target = own.removeprefix(_PEFT_PREFIX)
        found = _LORA_TENSOR.fullmatch(target.removesuffix(".weight") if "magnitude_vector" in target else target)
        if found and len(found["module"]) > MAX_MODULE_PATH:
            raise CheckpointError(f"{path}: tensor {own[:40]}… has an invalid name of {len(own)} characters")
        if found:
            module = by_module.setdefault(found["module"], {})
            first = module.setdefault(found["kind"].removesuffix(".weight"), own)
        elif "lora_" in target:
            raise CheckpointError(f"{path}: tensor {own} is of an unsupported kind of LoRA")
        else:  # peft names a wrapped module `base_layer`
            first = replacements.setdefault(target.replace(".base_layer.", "."), own)
        if first != own:
            raise CheckpointError(f"{path}: {first} and {own} are the same tensor")
    return {module: _low_rank(module, found, path) for module, found in by_module.items()}, replacements


def _low_rank(module: str, tensors: dict[str, str], path: Path) -> _LowRank:
    embedding = any(kind.startswith("embedding_") for kind in tensors)
    a, b = ("embedding_A", "embedding_B") if embedding else ("A", "B")
    optional = {"magnitude_vector"} if embedding else {"magnitude_vector", "B.bias"}
    if not {a, b} <= tensors.keys() or tensors.keys() - {a, b} - optional:
        found = ", ".join(f"lora_{kind}" for kind in sorted(tensors))
        raise CheckpointError(f"{path}: {module} has an invalid set of tensors: {found}")
    return _LowRank(tensors[a], tensors[b], tensors.get("magnitude_vector"), tensors.get("B.bias"), embedding)
