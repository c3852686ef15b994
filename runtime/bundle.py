"""`Bundle`: a bundle folder with its manifest and checksums; docs/bundle.md describes the format.

The exporter writes bundles with `FORMAT_VERSION` and `manifest_entry`; everything else reads them with `Bundle.open`.
"""

from __future__ import annotations

import math
import re
import reprlib
import stat
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from llm_edge.runtime.errors import BundleError
from llm_edge.runtime.file_checksums import cached_sha256, file_sha256
from llm_edge.runtime.model_shape import CacheTensor, ModelShape, key_value_caches
from llm_edge.runtime.safe_io import MIB, inside, read_json, read_text

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TEMPLATE_FOLDER = "additional_chat_templates"  # of named templates, as transformers saves them
ONNX, TORCHSCRIPT = FORMATS = ("onnx", "torchscript")
_SUFFIXES: Mapping[str, str] = {ONNX: ".onnx", TORCHSCRIPT: ".pt"}
_MIN_TAG, _MAX_TAG = 3, 64  # characters; text that may become a tag is held back
MAX_NEWLINES = 2**31 - 1  # as of the parameter `max_newlines`

# Far beyond any published model: larger values come from a damaged manifest and would be allocated.
_MAX_DIMENSIONS: Mapping[str, int] = {
    "vocab_size": 4_000_000,
    "num_hidden_layers": 1_024,
    "num_key_value_heads": 4_096,
    "head_dim": 4_096,
    "max_position_embeddings": 16_777_216,
}
_MAX_HIDDEN = 65_536
_MAX_CACHES, _MAX_CACHE_SIDE, _MAX_CACHE_AXES = 8_192, 1_048_576, 4
_MAX_CACHE_NUMBERS = 1 << 31  # in a tensor, per token or in a state
_CACHE_NAME = re.compile(r"[0-9]{1,4}(\.[a-z]{1,32}|\.[0-9]{1,2}){1,2}")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PrecisionInfo:
    """One graph of a bundle.

    Attributes:
        name: a value of `--precision`.
        format: of the file, one of `FORMATS`.
        model: path of the file inside the bundle; an `.onnx` file has its weights beside it in `<file>_data`.
        recipe: human-readable description of the weight formats.
        share_buffer: past and present keys and values may share a buffer (GroupQueryAttention).
        size: bytes of graph and weights.
        parity: results of the comparison with the reference.
        quality: results of scoring the validation text.
        hidden_size: H, width of the graph's output `hidden_states`; None if it has none.
    """

    name: str
    format: str
    model: str
    recipe: str
    share_buffer: bool
    size: int
    parity: Mapping[str, Any]
    quality: Mapping[str, Any]
    hidden_size: int | None = None


@dataclass(frozen=True, slots=True)
class ReasoningTokens:
    """The tokens that delimit a model's reasoning.

    Attributes:
        start: id of the token that opens it; the prompt ends with it, or the model generates it.
        end: id of the token that closes it; the answer follows.
    """

    start: int
    end: int


@dataclass(frozen=True, slots=True)
class ReasoningTags:
    """The texts that delimit a model's reasoning where they are not single tokens.

    Attributes:
        start: text that opens it; the prompt ends with it, or the model generates it.
        end: text that closes it; the answer follows.
    """

    start: str
    end: str


@dataclass(frozen=True, slots=True)
class Guards:
    """A model's defaults for the parameters of the same names in `SamplingParams`.

    Attributes:
        max_newlines: maximum number of consecutive newlines; None = no limit.
        single_think_end: reasoning ends only once.
    """

    max_newlines: int | None
    single_think_end: bool


class Bundle:
    """An open bundle folder: the manifest is valid and every file exists with the right size.

    `verify` compares checksums, which loading does for every file it reads.

    Attributes:
        path: the folder.
        manifest: content of its manifest.json.
        name: of the bundle.
        shape: dimensions of the model.
        precisions: the graphs by name.
        reasoning: delimiters of reasoning; None for models without reasoning.
        guards: None if the model has no such defaults.
    """

    def __init__(self, path: Path, manifest: Mapping[str, Any]) -> None:
        self.path = path
        self.manifest = manifest
        self.name = _field(manifest, "name", str)
        shape = _field(manifest, "model", dict)
        self.shape = self._shape(shape)
        self._files = _field(manifest, "files", dict)
        entries = _field(manifest, "precisions", dict)
        if not entries:
            raise self._refused("no precisions")
        self.precisions: dict[str, PrecisionInfo] = {
            name: self._precision(name, entry) for name, entry in entries.items()
        }
        if {"reasoning", "reasoning_tags"} <= manifest.keys():
            raise self._refused("'reasoning' and 'reasoning_tags' exclude each other")
        self.reasoning: ReasoningTokens | ReasoningTags | None = None
        if "reasoning" in manifest:
            self.reasoning = self._reasoning()
        elif "reasoning_tags" in manifest:
            self.reasoning = self._reasoning_tags()
        self.guards = self._guards() if "guards" in manifest else None

    @classmethod
    def open(cls, path: str | Path) -> Bundle:
        """Open a folder.

        Raises:
            BundleError: not a bundle, or of another format version, or files are missing or truncated.
        """
        path = Path(path)
        if not _is(stat.S_ISDIR, path):
            raise BundleError(f"{path}: no such bundle folder: create one with llm-export")
        if not _is(stat.S_ISREG, path / MANIFEST):
            raise BundleError(f"{path} has no {MANIFEST}, so it is not an llm-edge bundle: create one with llm-export")
        manifest = read_json(path / MANIFEST)
        version = manifest.get("format_version")
        if version != FORMAT_VERSION or isinstance(version, bool):
            raise BundleError(
                f"{path / MANIFEST}: format version {version!r}, but this runtime reads {FORMAT_VERSION}: "
                "export the bundle again"
            )
        bundle = cls(path, manifest)
        for name, entry in bundle._files.items():
            file = inside(path, name)
            if not _is(stat.S_ISREG, file):
                raise BundleError(f"{file} is missing: export the bundle again")
            size = _count(entry, "size", low=0)
            if file.stat().st_size != size:
                raise BundleError(f"{file} has {file.stat().st_size} bytes instead of {size}: export the bundle again")
        return bundle

    def file(self, name: str) -> Path:
        """Path of a file that the manifest lists.

        Raises:
            BundleError: it is not listed.
        """
        if name not in self._files:
            raise BundleError(f"{self.path / MANIFEST} does not list {name}: export the bundle again")
        return inside(self.path, name)

    def json(self, name: str) -> dict[str, Any]:
        """The content of a JSON file in the bundle."""
        return read_json(self.file(name), limit=256 * MIB)

    def chat_template(self) -> str | None:
        """The source of the chat template, if there is one."""
        if "chat_template.jinja" not in self._files:
            return None
        return read_text(self.file("chat_template.jinja"), MIB)

    def named_templates(self) -> dict[str, str]:
        """The sources of further chat templates by name."""
        paths = [name for name in self._files if name.startswith(f"{TEMPLATE_FOLDER}/") and name.endswith(".jinja")]
        return {Path(path).stem: read_text(self.file(path), MIB) for path in paths}

    def precision(self, name: str | None = None, *, half: bool = False) -> PrecisionInfo:
        """A precision by name; None = fp16 if `half` is true, else int8, source or the first one, as far as they exist.

        Raises:
            BundleError: the bundle does not contain it.
        """
        if name is None:
            wanted = ("fp16", "int8", "source") if half else ("int8", "source")
            name = next((each for each in wanted if each in self.precisions), next(iter(self.precisions)))
        if name not in self.precisions:
            raise BundleError(f"{self.path}: no precision {name!r}; available: {', '.join(self.precisions)}")
        return self.precisions[name]

    def verify(self, precision: str | None = None) -> None:
        """Check the sha256 of every file, or of the files that one precision needs.

        Raises:
            BundleError: a file was modified.
        """
        self.check(self.files_of(precision) if precision is not None else self._files)

    def files_of(self, precision: str) -> list[str]:
        """Names of the files that one precision needs."""
        others: set[str] = set()
        for info in self.precisions.values():
            others.update(_graph_files(info.model, info.format))
        wanted = self.precisions[precision]
        others.difference_update(_graph_files(wanted.model, wanted.format))
        return [name for name in self._files if name not in others]

    def size(self, name: str) -> int:
        """Size of a file in bytes."""
        return int(self._files[name]["size"])

    def check(self, names: Iterable[str], *, cached: bool = False) -> None:
        """Check the sha256 of some files; raises BundleError for one that was modified.

        Args:
            names: of the files.
            cached: use the checksum that an earlier process computed if the file has not changed since.
        """
        checksum = cached_sha256 if cached else file_sha256
        for name in names:
            path = inside(self.path, name)
            try:
                digest = checksum(path)
            except OSError as error:
                raise BundleError(f"{path} cannot be read ({error.strerror}): export the bundle again") from error
            if digest != self._files[name].get("sha256"):
                raise BundleError(f"{path} does not match its checksum: it was modified, export the bundle again")

    def _shape(self, entry: Mapping[str, Any]) -> ModelShape:
        def count(key: str) -> int:
            return _count(entry, key, high=_MAX_DIMENSIONS[key])

        vocab_size, layers, context = map(count, ("vocab_size", "num_hidden_layers", "max_position_embeddings"))
        if "caches" not in entry:
            caches = key_value_caches(layers, count("num_key_value_heads"), count("head_dim"))
        else:
            given = _field(entry, "caches", list)
            if not 0 < len(given) <= _MAX_CACHES:
                raise self._refused(f"model.caches has {len(given)} entries")
            caches = tuple(map(self._cache, given))
            if len({cache.name for cache in caches}) < len(caches):
                raise self._refused("model.caches has the same name twice")
        windows = _field(entry, "windows", list) if "windows" in entry else []
        if not all(type(size) is int and 0 <= size <= context for size in windows) or len(windows) not in (0, layers):
            raise self._refused(f"model.windows is {reprlib.repr(windows)}, not a window of each of {layers} layers")
        return ModelShape(vocab_size, layers, context, caches, tuple(windows))

    def _cache(self, entry: Any) -> CacheTensor:
        name, shape, grows = _field(entry, "name", str), _field(entry, "shape", list), _field(entry, "grows", bool)
        numbers = [size for size in shape if isinstance(size, int) and not isinstance(size, bool)]
        valid = len(numbers) == len(shape) and all(0 < size <= _MAX_CACHE_SIDE for size in numbers)
        valid = valid and (len(shape) == 2 if grows else 0 < len(shape) <= _MAX_CACHE_AXES)
        if not valid or math.prod(numbers) > _MAX_CACHE_NUMBERS:
            raise self._refused(f"model.caches: {reprlib.repr(name)} has the shape {reprlib.repr(shape)}")
        if not _CACHE_NAME.fullmatch(name):
            raise self._refused(f"model.caches: {reprlib.repr(name)} is not the name of a cache")
        return CacheTensor(name, tuple(numbers), grows)

    def _precision(self, name: str, entry: Any) -> PrecisionInfo:
        if not isinstance(entry, dict):
            raise self._refused(f"precisions.{name} is not an object")
        model = _field(entry, "model", str)
        kind = entry.get("format", ONNX)
        if kind not in FORMATS:
            supported = " and ".join(FORMATS)
            raise self._refused(f"precisions.{name} has format {kind!r}, but this runtime supports {supported}")
        if not model.endswith(_SUFFIXES[kind]):  # onnxruntime reads files with other names in other formats
            raise self._refused(f"precisions.{name}.model is {reprlib.repr(model)}, not a name with {_SUFFIXES[kind]}")
        share_buffer = _field(entry, "share_buffer", bool)
        if self.shape.has_states and not (share_buffer and kind == ONNX):
            raise self._refused(f"precisions.{name} is not a fused ONNX graph, but model.caches has states")
        hidden_size = None
        if "hidden_size" in entry:
            hidden_size = _count(entry, "hidden_size", high=_MAX_HIDDEN, where=f"precisions.{name}.")
            if kind != ONNX:
                raise self._refused(f"precisions.{name} has a hidden_size, which {kind} does not support")
        return PrecisionInfo(
            name=name,
            format=kind,
            model=model,
            recipe=_field(entry, "recipe", str),
            share_buffer=share_buffer,
            size=sum(_count(_field(self._files, file, dict), "size", low=0) for file in _graph_files(model, kind)),
            parity=_field(entry, "parity", dict),
            quality=_field(entry, "quality", dict),
            hidden_size=hidden_size,
        )

    def _reasoning(self) -> ReasoningTokens:
        entry, high = _field(self.manifest, "reasoning", dict), self.shape.vocab_size - 1
        tokens = ReasoningTokens(*(_count(entry, key, 0, high, "reasoning.") for key in ReasoningTokens.__slots__))
        if tokens.start == tokens.end:
            raise self._refused("reasoning starts and ends with the same token")
        return tokens

    def _reasoning_tags(self) -> ReasoningTags:
        entry = _field(self.manifest, "reasoning_tags", dict)
        tags = ReasoningTags(*(_field(entry, key, str) for key in ReasoningTags.__slots__))
        for key, tag in (("start", tags.start), ("end", tags.end)):
            if not _MIN_TAG <= len(tag) <= _MAX_TAG or not tag.isprintable() or tag != tag.strip():
                raise self._refused(
                    f"reasoning_tags.{key} is {reprlib.repr(tag)}, not {_MIN_TAG} to {_MAX_TAG} printable characters "
                    "without surrounding white space"
                )
        if tags.start in tags.end or tags.end in tags.start:
            raise self._refused("one of reasoning_tags contains the other")
        return tags

    def _guards(self) -> Guards:
        entry = _field(self.manifest, "guards", dict)
        newlines = None
        if entry.get("max_newlines", 0) is not None:  # the key is required
            newlines = _count(entry, "max_newlines", 1, MAX_NEWLINES, "guards.")
        guards = Guards(newlines, _field(entry, "single_think_end", bool))
        if guards.single_think_end and self.reasoning is None:
            raise self._refused("guards.single_think_end without 'reasoning'")
        return guards

    def _refused(self, reason: str) -> BundleError:
        return BundleError(f"{self.path / MANIFEST}: {reason}: export the bundle again")


def _graph_files(model: str, kind: str) -> Iterable[str]:
    return (model, f"{model}_data") if kind == ONNX else (model,)


def manifest_entry(path: Path) -> dict[str, Any]:
    """A file's entry in the manifest: its size in bytes and its sha256."""
    return {"size": path.stat().st_size, "sha256": file_sha256(path)}


def _is(kind: Callable[[int], bool], path: Path) -> bool:
    """Whether a path exists and is of this kind; False also for names that no file system allows."""
    try:
        return kind(path.stat().st_mode)
    except (OSError, ValueError):
        return False


def _field(mapping: Mapping[str, Any], key: str, kind: type[T]) -> T:
    value = mapping.get(key) if isinstance(mapping, Mapping) else None
    if not isinstance(value, kind):
        raise BundleError(f"{MANIFEST}: {key!r} is missing or not of type {kind.__name__}: export the bundle again")
    return value


def _count(mapping: Mapping[str, Any], key: str, low: int = 1, high: int = 1 << 48, where: str = "") -> int:
    value = _field(mapping, key, int)
    if isinstance(value, bool) or not low <= value <= high:
        raise BundleError(
            f"{MANIFEST}: {where}{key} is {value!r}, not from {low:,} to {high:,}: export the bundle again"
        )
    return value
