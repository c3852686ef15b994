"""The whole way from a source to a committed bundle. Knows nothing of terminals: `progress` tells what goes on."""

from __future__ import annotations

import contextlib
import datetime
import errno
import importlib.metadata
import math
import os
import platform
import secrets
import shutil
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir
import tokenizers
import torch

from llm_edge.exporter.bundle_files import write_json, write_side_files
from llm_edge.exporter.checkpoint.base import Checkpoint, Source
from llm_edge.exporter.checkpoint.source import bundle_name, open_checkpoint
from llm_edge.exporter.graph import GraphStyle, trace
from llm_edge.exporter.lower import apply_recipe
from llm_edge.exporter.model import Decoder
from llm_edge.exporter.recipes import RECIPES, Recipe
from llm_edge.exporter.validate import MAX_BOUND, MEAN_BOUND, Parity, Quality, Reference, compare, score
from llm_edge.runtime.bundle import FORMAT_VERSION, MANIFEST, ModelShape, manifest_entry
from llm_edge.runtime.errors import CheckpointError, InputError, MachineError, ParityError
from llm_edge.runtime.session import Session

Progress = Callable[[str, float | None, str], None]
"""Told a stage (one of `STAGES`), its share done (None: unknown) and what is at work."""

STAGES = ("reading", "tracing", "quantizing", "validating", "writing")

_FUSED_HEAD = 16  # onnxruntime's GroupQueryAttention rotates heads of a multiple of this size only
_INLINE_LIMIT = 1024  # bytes; larger tensors go to the data file
_TOOLS = ("llm-edge", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime")


@dataclass(frozen=True, slots=True)
class PrecisionReport:
    """What came out for a precision; `size` in bytes of graph and weights; no figures without validation."""

    recipe: Recipe
    size: int
    parity: Parity | None
    quality: Quality | None


@dataclass(frozen=True, slots=True)
class Report:
    """What an export made."""

    path: Path
    source: Source
    parameters: int
    precisions: tuple[PrecisionReport, ...]


def export(
    source: str,
    output: Path | None,
    recipes: tuple[Recipe, ...],
    style: GraphStyle,
    *,
    validate: bool,
    force: bool,
    progress: Progress,
) -> Report:
    """Export a checkpoint.

    Args:
        source: see `open_checkpoint`.
        output: the bundle's folder; None takes `artifacts/<name>`.
        recipes: the precisions to make.
        style: see `GraphStyle`.
        validate: compare with the reference and score the validation text.
        force: replace a bundle that is already there, once the new one is complete.
        progress: see `Progress`.

    Raises:
        InputError: the source cannot be read, or the output is in the way.
        ParityError: an fp32 graph misses its bound; nothing was written.
        MachineError: disk or memory failed; nothing was left behind.
    """
    target = output if output is not None else Path("artifacts") / bundle_name(source)
    if target.name in ("", ".."):
        target = target.resolve()  # "." and the like: the bundle and its temporary sibling need a name
    _check_target(target, force)
    progress("reading", None, source)
    checkpoint = open_checkpoint(source, lambda text: progress("reading", None, text))
    if style is GraphStyle.FUSED and checkpoint.config.head_dim % _FUSED_HEAD:
        raise CheckpointError(
            f"{source}: heads of {checkpoint.config.head_dim}, the fused graph needs a multiple of {_FUSED_HEAD}: "
            "export it with --graph portable"
        )
    tokens = _validation_tokens(checkpoint)
    # What is rounded cannot be held to a bound: without fp32 in the bundle, fp32 is made and proven for this alone.
    proof = (RECIPES["fp32"],) if validate and not any(recipe.lossless for recipe in recipes) else ()
    with _staging(target, force) as folder:
        _make_room(folder, checkpoint, (*proof, *recipes))
        _write_graphs(folder, checkpoint, (*proof, *recipes), style, progress)
        parities: Mapping[str, Parity] = {}
        qualities: Mapping[str, Quality] = {}
        if validate:
            parities, qualities = _validate(folder, checkpoint, recipes, proof, style, tokens, progress)
        for recipe in proof:
            for path in _graph_files(folder, recipe):
                path.unlink()
        progress("writing", 0.0, "tokenizer and configs")
        write_side_files(folder, checkpoint, recipes, style is GraphStyle.FUSED)
        reports = tuple(
            PrecisionReport(
                recipe,
                sum(path.stat().st_size for path in _graph_files(folder, recipe)),
                parities.get(recipe.name),
                qualities.get(recipe.name),
            )
            for recipe in recipes
        )
        proofs = {recipe.name: parities[recipe.name] for recipe in proof}
        _commit_manifest(folder, target, checkpoint, style, reports, proofs, progress)
    progress("writing", 1.0, str(target))
    return Report(target, checkpoint.source, checkpoint.config.num_parameters, reports)


def _graph_files(folder: Path, recipe: Recipe) -> list[Path]:
    return sorted((folder / "onnx").glob(f"{recipe.stem}.onnx*"))


def _check_target(target: Path, force: bool) -> None:
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise InputError(f"{target} exists and is not a folder: choose another one with -o")
    if not target.exists():
        return
    if not force:
        raise InputError(f"{target} exists: choose another folder with -o, or replace it with --force")
    if any(target.iterdir()) and not (target / MANIFEST).is_file():
        raise InputError(f"{target} holds something that is no bundle, --force does not replace that: choose another")


def _validation_tokens(checkpoint: Checkpoint) -> list[int]:
    """The validation text in the model's own tokens; proves on the way that tokenizer and weights belong together."""
    try:
        tokenizer = tokenizers.Tokenizer.from_str(checkpoint.tokenizer.tokenizer_json)
    except Exception as error:
        raise CheckpointError(f"tokenizer.json cannot be used ({error}): replace it by the model's own") from error
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= checkpoint.config.vocab_size:
        raise CheckpointError(
            f"the tokenizer has a token {largest}, the model's vocabulary {checkpoint.config.vocab_size} tokens: "
            "tokenizer and weights do not belong together"
        )
    text = (Path(__file__).parent / "data" / "validation.txt").read_text(encoding="utf-8")
    return list(tokenizer.encode(text, add_special_tokens=False).ids)


@contextlib.contextmanager
def _staging(target: Path, force: bool) -> Iterator[Path]:
    """A temporary sibling folder that becomes the target when the block ends well, and vanishes when not."""
    folder = target.with_name(f".{target.name}.partial-{secrets.token_hex(4)}")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir()
        (folder / "onnx").mkdir()
        yield folder
        for path in folder.rglob("*"):
            _fsync(path)
        _fsync(folder)
        if force and target.exists():
            old = target.with_name(f".{target.name}.old-{secrets.token_hex(4)}")
            target.rename(old)
            try:
                folder.rename(target)
            except BaseException:
                old.rename(target)
                raise
            shutil.rmtree(old, ignore_errors=True)
        else:
            folder.rename(target)
        _fsync(target.parent)
    except MemoryError as error:
        raise MachineError(f"not enough memory to export to {target}") from error
    except OSError as error:
        where = error.filename if error.filename is not None and error.errno != errno.ENOSPC else target.parent
        why = error.strerror or f"{error}; is the disk full?"  # a short write has a text alone
        raise MachineError(f"{where}: cannot write the bundle ({why}); nothing was left") from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_room(folder: Path, checkpoint: Checkpoint, recipes: tuple[Recipe, ...]) -> None:
    """Refuse before the work begins where the disk cannot hold the result."""
    needed = sum(int(checkpoint.config.num_parameters * recipe.bytes_per_weight) for recipe in recipes)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise MachineError(
            f"{folder.parent}: the bundle needs about {needed / 1e6:,.0f} MB, {free / 1e6:,.0f} MB are free: make room"
        )


def _write_graphs(
    folder: Path, checkpoint: Checkpoint, recipes: tuple[Recipe, ...], style: GraphStyle, progress: Progress
) -> None:
    progress("tracing", None, f"{checkpoint.config.num_hidden_layers} layers, {style.value} graph")
    traced = trace(checkpoint.config, style)
    for number, recipe in enumerate(recipes):
        model = traced.clone()
        apply_recipe(model, checkpoint.config, checkpoint.weights, recipe, style)

        def saved(_: ir.TensorProtocol, info: Any, number: int = number, recipe: Recipe = recipe) -> None:
            progress("quantizing", (number + (info.index + 1) / info.total) / len(recipes), recipe.name)

        ir.save(
            model,
            folder / "onnx" / f"{recipe.stem}.onnx",
            external_data=f"{recipe.stem}.onnx_data",
            size_threshold_bytes=_INLINE_LIMIT,
            callback=saved,
        )


def _validate(
    folder: Path,
    checkpoint: Checkpoint,
    recipes: tuple[Recipe, ...],
    proof: tuple[Recipe, ...],
    style: GraphStyle,
    tokens: list[int],
    progress: Progress,
) -> tuple[dict[str, Parity], dict[str, Quality]]:
    """Parity of all, and quality of those that the bundle is to hold (not of those made as proof alone)."""
    progress("validating", 0.0, "loading")
    with torch.device("meta"):
        decoder = Decoder(checkpoint.config).eval()
    decoder.load_weights(checkpoint.weights)
    reference = Reference(decoder)
    parities, qualities = {}, {}
    total = len(proof) + len(recipes)
    for number, recipe in enumerate((*proof, *recipes)):

        def scored(share: float, name: str = recipe.name, number: int = number) -> None:
            progress("validating", (number + 0.2 + 0.8 * share) / total, name)

        progress("validating", number / total, recipe.name)
        path = folder / "onnx" / f"{recipe.stem}.onnx"
        share_buffer = style is GraphStyle.FUSED
        session = Session(path, _shape(checkpoint), share_buffer, provider="cpu", spinning=False)
        parities[recipe.name] = parity = compare(reference, session, tokens)
        if not math.isfinite(parity.worst.max):
            raise ParityError(
                f"{recipe.name}: logits are not numbers: the weights are damaged, or they overflow. Nothing was written"
            )
        if recipe.lossless and not parity.within_bounds:
            worst = parity.worst
            raise ParityError(
                f"{recipe.name}: logits differ from PyTorch by up to {worst.max:.2g}, {worst.mean:.2g} on average; "
                f"{MAX_BOUND:g} and {MEAN_BOUND:g} are allowed. Nothing was written"
            )
        if recipe in recipes:
            qualities[recipe.name] = score(reference, session, tokens, scored)
        del session  # one at a time: memory
    return parities, qualities


def _shape(checkpoint: Checkpoint) -> ModelShape:
    return ModelShape(**{key: getattr(checkpoint.config, key) for key in ModelShape.__slots__})


def _commit_manifest(
    folder: Path,
    target: Path,
    checkpoint: Checkpoint,
    style: GraphStyle,
    reports: tuple[PrecisionReport, ...],
    proofs: Mapping[str, Parity],
    progress: Progress,
) -> None:
    """Write the manifest, last of all files."""
    files = {}
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    for number, name in enumerate(names):
        progress("writing", number / len(names), name)
        files[name] = manifest_entry(folder / name)
    write_json(
        folder / MANIFEST,
        {
            "format_version": FORMAT_VERSION,
            "name": target.name,
            "created": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            "model": {**asdict(_shape(checkpoint)), "parameters": checkpoint.config.num_parameters},
            "graph": style.value,
            "source": asdict(checkpoint.source),
            "tools": {
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in _TOOLS},
            },
            "precisions": {
                report.recipe.name: {
                    "model": f"onnx/{report.recipe.stem}.onnx",
                    "recipe": str(report.recipe),
                    "share_buffer": style is GraphStyle.FUSED,
                    "parity": asdict(report.parity) if report.parity else {},
                    "quality": asdict(report.quality) if report.quality else {},
                }
                for report in reports
            },
            "proof": {name: asdict(parity) for name, parity in proofs.items()},
            "files": files,
        },
    )
