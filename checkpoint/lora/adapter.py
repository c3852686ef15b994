"""LoRA adapters as the peft library saves them, merged into a checkpoint's tensors one at a time.

Knows neither families nor configs of models: the base is a table of shapes and a function that loads a tensor.
The format is peft's (`adapter_config.json`, `adapter_model.safetensors` or `.bin`); LoRA is arXiv:2106.09685, its
rank-stabilized scaling arXiv:2312.03732, DoRA arXiv:2402.09353.
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
WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")  # the first that is there

_WRAPPING = "base_model.model."  # of every name peft writes: PeftModel.base_model.model is the model itself
_PREFIXES = ("model.", "transformer.")  # a base may be saved with or without the module around its layers
_PART = re.compile(r"(?P<module>.+)\.lora_(?P<part>A\.weight|B\.weight|B\.bias|embedding_[AB]|magnitude_vector)")
_EMBEDDINGS = {"embed_tokens", "wte", "embed_in", "word_embeddings", "tok_embeddings"}
_HEADS = {"lm_head", "embed_out"}
_FLOATS = (torch.float32, torch.float16, torch.bfloat16)

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class _LowRank:
    """The adapter's tensors of one module, by their names in its file."""

    a: str  # [rank, in]
    b: str  # [out, rank]
    magnitude: str | None = None  # [out]
    bias: str | None = None  # [out]
    embedding: bool = False


@dataclass(frozen=True, slots=True)
class _Change:
    """What becomes of one tensor of the base: replaced, then updated (B @ A) or, a bias, added to.

    `transposed` says that the base stores the weight as [in, out].
    """

    replacement: str | None = None
    low_rank: _LowRank | None = None
    added: str | None = None
    scaling: float = 1.0
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class Adapter:
    """A LoRA adapter; its tensors are read when a tensor of the base is.

    Attributes:
        name: its folder's, unless it was opened under another.
        base_model: what it says it was trained on, a Hugging Face id or a path; None where it does not say.
        files: its config and its weights, for the manifest.
    """

    name: str
    base_model: str | None
    files: tuple[SourceFile, ...]
    _where: Path
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
        """Return `load` with this adapter merged into what it loads, under the base's own names.

        A changed weight comes as float32, `W + scaling * B @ A`: an update is often smaller than half a step of a
        bfloat16 weight, and rounding the sum to the base's type would lose it. What the adapter does not touch comes
        as it is.

        Args:
            shapes: every tensor of the base.
            load: reads one of them.
            transposed: tells weights that the base stores as [in, out] (GPT-2's). Without it shapes tell, and the
                adapter's config where a weight is square.
            tied_head: whether the base's output head is its token embedding; by default, whether it has no head.

        Raises:
            CheckpointError: a tensor of the adapter has no place in the base, or another shape than its place.
        """
        changes = self._changes(_Base(shapes, self._where), transposed)
        if tied_head is None:
            tied_head = not any(_module_name(name) in _HEADS for name in shapes)
        if tied_head:
            self._check_tied(changes)

        def load_merged(name: str) -> Tensor:
            change = changes.get(name)
            return load(name) if change is None else self._apply(change, name, load)

        return load_merged

    def _changes(self, base: _Base, transposed: Callable[[str], bool] | None) -> dict[str, _Change]:
        """One entry for every tensor of the base that this adapter changes; checks names and shapes."""
        changes: dict[str, _Change] = {}
        for target, own in self._replacements.items():
            name = base.find(target, own)
            if name in changes:
                raise CheckpointError(f"{self._where}: two tensors for {name} of the base model")
            self._expect(own, base.shapes[name], name)
            changes[name] = _Change(replacement=own)

        square: list[str] = []
        layouts: set[bool] = set()
        for module, low_rank in self._modules.items():
            name = base.find(f"{module}.weight", low_rank.a)
            before = changes.get(name, _Change())
            if before.low_rank:
                raise CheckpointError(f"{self._where}: two updates of {name} of the base model")
            scaling = self._config.scaling(module, self._rank(module, low_rank))
            swapped = self._is_transposed(low_rank, name, base.shapes[name], transposed)
            if not low_rank.embedding and transposed is None:
                is_square = base.shapes[name][0] == base.shapes[name][1]
                square.extend([name] if is_square else [])
                layouts.update([] if is_square else [swapped])
            out = base.shapes[name][1 if swapped else 0]
            changes[name] = replace(before, low_rank=low_rank, scaling=scaling, transposed=swapped)
            if low_rank.magnitude:
                self._expect(low_rank.magnitude, (out,), name)
            if low_rank.bias:
                bias = base.find(f"{module}.bias", low_rank.bias)
                self._expect(low_rank.bias, base.shapes[bias], bias)
                changes[bias] = replace(changes.get(bias, _Change()), added=low_rank.bias, scaling=scaling)
        if square and layouts - {self._config.fan_in_fan_out}:
            raise CheckpointError(
                f"{self._where}: other weights of the adapter are stored against its fan_in_fan_out, so how the square "
                f"{square[0]} is stored cannot be told: merge it with peft"
            )
        return changes

    def _rank(self, module: str, low_rank: _LowRank) -> int:
        """The rank of a module, on which its two tensors and the config agree."""
        a, b = self._shape(low_rank.a), self._shape(low_rank.b)
        rank = self._config.rank(module)
        if len(a) != 2 or len(b) != 2 or not a[0] == b[1] == rank:
            raise CheckpointError(
                f"{self._where}: {low_rank.b} and {low_rank.a} have shapes {b} and {a}; the config asks for rank {rank}"
            )
        return rank

    def _is_transposed(
        self, low_rank: _LowRank, name: str, shape: Shape, transposed: Callable[[str], bool] | None
    ) -> bool:
        """Whether the base stores a weight as [in, out]; also checks that the update fits it."""
        straight = (self._shape(low_rank.b)[0], self._shape(low_rank.a)[1])
        layouts = {False: straight, True: straight[::-1]}
        if low_rank.embedding:  # rows are inputs
            del layouts[False]
        fitting = [layout for layout, found in layouts.items() if found == shape]
        if transposed is not None and not low_rank.embedding:
            fitting = [layout for layout in fitting if layout == transposed(name)]
        if not fitting:
            raise CheckpointError(
                f"{self._where}: {low_rank.b} @ {low_rank.a} has shape {straight}, {name} of the base model {shape}: "
                f"{self._remedy}"
            )
        return fitting[0] if len(fitting) == 1 else self._config.fan_in_fan_out

    def _expect(self, own: str, shape: Shape, name: str) -> None:
        if self._shape(own) != shape:
            raise CheckpointError(
                f"{self._where}: {own} has shape {self._shape(own)}, {name} of the base model asks for {shape}: "
                f"{self._remedy}"
            )

    @property
    def _remedy(self) -> str:
        return f"give the model it was trained on{f' ({self.base_model})' if self.base_model else ''}"

    def _check_tied(self, changes: dict[str, _Change]) -> None:
        """Where one tensor is embedding and head, only a change of both alike is the model that was trained."""
        touched = {name: change for name, change in changes.items() if _module_name(name) in _EMBEDDINGS | _HEADS}
        owns = [change.replacement for change in touched.values() if change.replacement and not change.low_rank]
        if len(owns) == len(touched) == 2 and torch.equal(self._file.load(owns[0]), self._file.load(owns[1])):
            return
        for name in touched:
            raise CheckpointError(
                f"{self._where}: changes {name}, but the base model's embedding is its output head too, and the "
                "adapter does not change both alike: merge it with peft into an untied model"
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
            if change.low_rank.magnitude:  # DoRA: so far it is a direction for each output; its length is learned
                inputs = 0 if change.transposed else 1
                length = torch.linalg.vector_norm(merged, dim=inputs, keepdim=True)
                merged.mul_(self._file.load(change.low_rank.magnitude).float().unsqueeze(inputs) / length)
        if not torch.isfinite(merged).all():
            raise CheckpointError(f"{self._where}: {name} is not finite once merged: the adapter is damaged")
        return merged

    def _shape(self, own: str) -> Shape:
        return tuple(self._file.tensors[own].shape)


class _Base:
    """The tensors of the base, found by the names that the adapter has for them."""

    def __init__(self, shapes: Mapping[str, Shape], where: Path) -> None:
        self.shapes = shapes
        self._where = where
        self._bare: dict[str, list[str]] = {}
        for name in shapes:
            self._bare.setdefault(_bare(name), []).append(name)

    def find(self, target: str, own: str) -> str:
        """The base's name for `target`: exactly, else without the module around the layers where that is unique."""
        if target in self.shapes:
            return target
        found = self._bare.get(_bare(target), [])
        if len(found) == 1:
            return found[0]
        reason = "is not a single tensor" if found else "is not a tensor"
        raise CheckpointError(
            f"{self._where}: {own} has no place: {target} {reason} of the base model (wrong model, or one that this "
            "adapter extends)"
        )


def _bare(name: str) -> str:
    for prefix in _PREFIXES:
        if name.startswith(prefix):
            return name[len(prefix) :]
    return name


def _module_name(tensor: str) -> str:
    """`embed_tokens` of `model.embed_tokens.weight`."""
    return tensor.rpartition(".")[0].rpartition(".")[2]


def open_adapter(folder: Path, name: str | None = None) -> Adapter:
    """Open an adapter folder: reads its config and the names and shapes of its tensors.

    Args:
        folder: where peft saved it.
        name: what to call it; by default its folder's name.

    Raises:
        CheckpointError: a file is missing or damaged, it is no LoRA adapter, or it is of a kind whose merged weights
            are not known; the message names the key or the tensor.
    """
    if not (folder / CONFIG).exists():
        raise CheckpointError(f"{folder} has no {CONFIG}: an adapter folder with {CONFIG} and {WEIGHTS[0]} is needed")
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
    modules, replacements = _sort(file.tensors, path)
    for module, low_rank in modules.items():
        if config.use_dora != bool(low_rank.magnitude):
            word = "no" if config.use_dora else "a"
            raise CheckpointError(f"{path}: {module} has {word} lora_magnitude_vector, against use_dora in {CONFIG}")
    for module in config.modules_to_save:
        if not any(f"{module}." in target for target in replacements):
            raise CheckpointError(f"{path}: modules_to_save lists {module[:100]!r}, but the file has no tensor of it")
    base_model = raw.get("base_model_name_or_path")
    if not isinstance(base_model, str) or not base_model.isprintable() or len(base_model) > 200:
        base_model = None
    return Adapter(
        name=name or folder.resolve().name,
        base_model=base_model or None,
        files=(hash_file(folder / CONFIG), hash_file(path)),
        _where=folder,
        _config=config,
        _file=file,
        _modules=modules,
        _replacements=replacements,
    )


def _sort(names: Iterable[str], path: Path) -> tuple[dict[str, _LowRank], dict[str, str]]:
    """Group the tensors of an adapter: low-rank parts by module, and tensors that replace one of the base."""
    parts: dict[str, dict[str, str]] = {}
    replacements: dict[str, str] = {}
    for own in sorted(names):
        target = own.removeprefix(_WRAPPING)
        found = _PART.fullmatch(target.removesuffix(".weight") if "magnitude_vector" in target else target)
        if found and len(found["module"]) > MAX_MODULE_PATH:
            raise CheckpointError(f"{path}: tensor {own[:40]}… has a name of {len(own)} characters: not a module's")
        if found:
            module = parts.setdefault(found["module"], {})
            known = module.setdefault(found["part"].removesuffix(".weight"), own)
        elif "lora_" in target:
            raise CheckpointError(f"{path}: tensor {own} is of a kind of LoRA that is not known here")
        else:  # peft calls what it has wrapped `base_layer`
            known = replacements.setdefault(target.replace(".base_layer.", "."), own)
        if known != own:
            raise CheckpointError(f"{path}: {known} and {own} are the same tensor")
    return {module: _low_rank(module, found, path) for module, found in parts.items()}, replacements


def _low_rank(module: str, parts: dict[str, str], path: Path) -> _LowRank:
    embedding = any(part.startswith("embedding_") for part in parts)
    kind = "embedding_" if embedding else ""
    rest = parts.keys() - {f"{kind}A", f"{kind}B", "magnitude_vector"} - ({"B.bias"} if not embedding else set())
    if f"{kind}A" not in parts or f"{kind}B" not in parts or rest:
        raise CheckpointError(f"{path}: {module} has only {', '.join(f'lora_{part}' for part in sorted(parts))}")
    return _LowRank(parts[f"{kind}A"], parts[f"{kind}B"], parts.get("magnitude_vector"), parts.get("B.bias"), embedding)
