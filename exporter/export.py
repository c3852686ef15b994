"""`export`: converts a source to a bundle."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import math
from collections.abc import Callable
from pathlib import Path

from llm_edge.checkpoint.base import Checkpoint
from llm_edge.checkpoint.meta.config import StateDictOptions
from llm_edge.checkpoint.source import SMOLLM2, SourceOptions, bundle_name, open_checkpoint
from llm_edge.exporter.bundle.interrupted import check_interrupted, identity_of, kept_journal, remove_interrupted
from llm_edge.exporter.bundle.manifest import write_manifest
from llm_edge.exporter.bundle.onnx_writer import OnnxWriter
from llm_edge.exporter.bundle.side_files import write_side_files
from llm_edge.exporter.bundle.staging import check_disk_space, check_target, recover, staging
from llm_edge.exporter.bundle.torchscript_writer import TorchScriptWriter
from llm_edge.exporter.bundle.writer import BundleWriter
from llm_edge.exporter.graph.attention import FUSED_HEAD_MULTIPLE, can_fuse
from llm_edge.exporter.graph.passes.int8_cache import check_cache
from llm_edge.exporter.graph.trace import GraphStyle
from llm_edge.exporter.options import ExportOptions, FileFormat, GraphChoice
from llm_edge.exporter.progress import Progress
from llm_edge.exporter.quantization.goals import Goal, MaxBitsPerWeight, MaxDivergence, MaxSize, SizeGoal
from llm_edge.exporter.quantization.recipes import Recipe, mixed, parse_precisions
from llm_edge.exporter.quantization.refine import can_refine
from llm_edge.exporter.results import Report, precision_reports
from llm_edge.exporter.texts import Texts, load_texts
from llm_edge.exporter.validation.parity import model_shape, verify_parity
from llm_edge.exporter.validation.windows import logits_bytes, select_windows
from llm_edge.model.block_weights import BLOCK_TYPES
from llm_edge.model.config import ModelConfig
from llm_edge.model.decoder import count_parameters
from llm_edge.model.weights import Weights
from llm_edge.runtime.errors import (
    CheckpointError,
    ParameterError,
    ParityError,
    UnknownFamilyError,
    UnsupportedArchitectureError,
    UnsupportedSettingError,
)

LARGE = 1_000_000_000
"""Parameters of a model whose export can be resumed."""
_DEFAULT_PRECISIONS = {FileFormat.ONNX: "fp32,int8,int4", FileFormat.TORCHSCRIPT: "fp32"}
_QUANTIZED_DEFAULT = "source"  # of a GGUF whose projections are all quantized


def export(
    source: str, options: ExportOptions | None = None, progress: Progress = lambda *_: None, *, resumable: bool = False
) -> Report:
    """Export a checkpoint, given as `open_checkpoint` takes it.

    `resumable` keeps the completed layers of a large model beside the target if the export is interrupted.

    Raises:
        InputError: the source cannot be read, or the output folder cannot be created or replaced.
        ParityError: an fp32 model exceeds the bounds of validation; nothing was written.
        MachineError: disk or memory is full; nothing was written.
    """
    options = options or ExportOptions()
    recipes = _recipes(options, _DEFAULT_PRECISIONS[options.file_format])
    target = _prepare_target(source, options, progress)
    _check_file_format(options, recipes)
    try:
        checkpoint = _open(source, options, progress)
    except UnsupportedArchitectureError as error:
        return _export_through_transformers(error, target, options, progress)
    if options.file_format is FileFormat.ONNX and _keeps_source(source, checkpoint):
        recipes = _recipes(options, _QUANTIZED_DEFAULT)
    _check_source_blocks(source, checkpoint, recipes)
    _check_targets(recipes, checkpoint.config)
    if options.refine and not any(can_refine(recipe) for recipe in recipes):
        raise ParameterError("--refine applies to 4-bit weights: add int4 or int4-mixed to --precision, or omit it")
    writer = _choose_writer(source, checkpoint, options, recipes)
    texts = load_texts(checkpoint, sampled=any(recipe.calibrated for recipe in recipes))
    resumable = options.resume or (resumable and _is_large(checkpoint, recipes))
    kept = kept_journal(target, identity_of(checkpoint, recipes, texts), resume=options.resume, progress=progress)
    with staging(target, options.force) as folder, kept if resumable else contextlib.nullcontext() as journal:
        models = folder / writer.name
        models.mkdir()
        required = _required_bytes(checkpoint, recipes, texts if options.validate else None)
        check_disk_space(folder, required - (journal.size if journal is not None else 0))
        stored = writer.write(models, checkpoint, recipes, texts, progress, journal)
        validation = None
        if options.validate:
            validation = verify_parity(models, checkpoint, recipes, writer, texts.validation, progress)
        progress("writing", 0.0, "tokenizer and configs")
        shape = model_shape(checkpoint.config)
        write_side_files(folder, checkpoint, shape, recipes, writer.style)
        report = Report(
            path=target,
            source=checkpoint.source,
            parameters=count_parameters(checkpoint.config),
            style=writer.style,
            precisions=precision_reports(models, writer, recipes, stored),
            layers=checkpoint.config.num_hidden_layers,
            validation=validation,
            notes=checkpoint.notes,
        )
        write_manifest(folder, checkpoint, shape, report, writer, progress)
    remove_interrupted(target)
    progress("writing", 1.0, str(target))
    return report


def _open(source: str, options: ExportOptions, progress: Progress) -> Checkpoint:
    progress("reading", None, source)
    return open_checkpoint(source, _source_options(options), lambda text: progress("reading", None, text))


def _export_through_transformers(
    error: UnsupportedArchitectureError, target: Path, options: ExportOptions, progress: Progress
) -> Report:
    """Export a model that our decoder does not compute, if transformers is installed and its own model is supported."""
    if error.path is None:
        raise error
    if importlib.util.find_spec("transformers") is None:
        raise type(error)(
            f"{error}; install transformers to export it through that: pip install 'llm-edge[general]'"
        ) from error
    from llm_edge.exporter.general.export import export_general

    recipes = _recipes(options, _DEFAULT_PRECISIONS[FileFormat.ONNX])
    try:
        if isinstance(error, UnknownFamilyError):
            return export_general(error.path, target, options, recipes, progress)
        note = f"exported through transformers, because our decoder does not support a setting: {error}"
        progress("reading", None, note)
        return export_general(error.path, target, options, recipes, progress, (note,))
    except (CheckpointError, ParityError) as other:
        if isinstance(error, UnknownFamilyError):
            raise
        raise UnsupportedSettingError(f"{error}; nor is it exported through transformers: {other}") from other


def _prepare_target(source: str, options: ExportOptions, progress: Progress) -> Path:
    """Return the folder to write, after tidying up what killed exports left; raise InputError if it cannot be used."""
    target = options.output if options.output is not None else Path("artifacts") / bundle_name(source)
    if target.name in ("", ".."):
        target = target.resolve()  # "." and the like: the temporary sibling folder requires a name
    if recovered := recover(target):
        progress("recovering", None, "; ".join(recovered))
    check_target(target, options.force)
    check_interrupted(target, resume=options.resume, force=options.force)
    return target


def _is_large(checkpoint: Checkpoint, recipes: tuple[Recipe, ...]) -> bool:
    """Whether a calibration takes so long that its completed layers are kept when it is interrupted."""
    return count_parameters(checkpoint.config) >= LARGE and any(recipe.calibrated for recipe in recipes)


def _recipes(options: ExportOptions, default: str) -> tuple[Recipe, ...]:
    """Return the recipes of an export: the named ones, those of a target, or the default."""
    goals: dict[str, tuple[float | None, Callable[[float], Goal]]] = {
        "--target-size": (options.target_size, lambda megabytes: MaxSize(round(megabytes * 1e6))),
        "--target-bpw": (options.target_bpw, MaxBitsPerWeight),
        "--target-kl": (options.target_kl, MaxDivergence),
    }
    given = {name: (value, goal) for name, (value, goal) in goals.items() if value is not None}
    if len(given) > 1:
        raise ParameterError(f"{' and '.join(given)} exclude each other: give one of them")
    for name, (value, goal) in given.items():
        if not 0 < value < math.inf:
            raise ParameterError(f"{name} {value:g} is not a positive number")
        named = () if options.precision is None else parse_precisions(options.precision)
        return (*named, mixed(goal(value)))
    return parse_precisions(default if options.precision is None else options.precision)


def _check_targets(recipes: tuple[Recipe, ...], config: ModelConfig) -> None:
    """Raise ParameterError for a size that is too small for any formats, before they are measured."""
    for recipe in recipes:
        if isinstance(recipe.goal, SizeGoal):
            least = min(each.bytes_per_weight for formats in recipe.choices.values() for each in formats)
            recipe.goal.check(config, least * count_parameters(config))


def _check_file_format(options: ExportOptions, recipes: tuple[Recipe, ...]) -> None:
    """Raise ParameterError for options that TorchScript does not support."""
    if options.file_format is FileFormat.TORCHSCRIPT:
        if options.graph is not GraphChoice.AUTO:
            raise ParameterError("--graph applies to ONNX only: omit it with --format torchscript")
        if options.hidden_states:
            raise ParameterError("--hidden-states applies to ONNX only: omit it with --format torchscript")
        if options.refine:
            raise ParameterError("--refine applies to ONNX only: omit it with --format torchscript")
        TorchScriptWriter(recipes)


def _source_options(options: ExportOptions) -> SourceOptions:
    names = [field.name for field in dataclasses.fields(StateDictOptions)]
    return SourceOptions(StateDictOptions(**{name: getattr(options, name) for name in names}), options.adapter)


def _keeps_source(source: str, checkpoint: Checkpoint) -> bool:
    """Return whether an export keeps the numbers of the source by default: any other precision would round them again.

    SmolLM2, the model to try, is exported in precisions to compare.
    """
    weights = checkpoint.weights
    return source != SMOLLM2 and all(weights.block_kind(name) is not None for name in _projections(weights))


def _projections(weights: Weights) -> list[str]:
    """Return the names of the projections of all layers."""
    return [name for name in weights if name.startswith("layers.") and name.endswith(".weight") and "norm" not in name]


def _check_source_blocks(source: str, checkpoint: Checkpoint, recipes: tuple[Recipe, ...]) -> None:
    """Raise CheckpointError if a recipe keeps the blocks of the source, which has none."""
    weights = checkpoint.weights
    has_blocks = any(weights.block_kind(name) is not None for name in weights if name.startswith("layers."))
    for recipe in recipes:
        if recipe.projections.needs_source_blocks and not has_blocks:
            raise CheckpointError(
                f"{source} stores weights as {checkpoint.source.weight_types}; --precision {recipe.name} requires a "
                f"GGUF with quantized weights ({', '.join(BLOCK_TYPES)}), or GPTQ, AWQ or packed integers in groups of "
                "16 or more: choose int8 or int4"
            )


def _choose_writer(
    source: str, checkpoint: Checkpoint, options: ExportOptions, recipes: tuple[Recipe, ...]
) -> BundleWriter:
    if options.file_format is FileFormat.TORCHSCRIPT:
        return TorchScriptWriter(recipes)
    head_dim = checkpoint.config.head_dim
    fusable = can_fuse(head_dim, head_dim)
    if options.graph is GraphChoice.FUSED and not fusable:
        raise CheckpointError(
            f"{source}: the head size is {head_dim}, but fused graphs require a multiple of {FUSED_HEAD_MULTIPLE}: "
            "use --graph portable"
        )
    fused = fusable and options.graph is not GraphChoice.PORTABLE
    style = GraphStyle.FUSED if fused else GraphStyle.PORTABLE
    for recipe in recipes:
        check_cache(recipe, style)
    return OnnxWriter(style, checkpoint.config.hidden_size if options.hidden_states else None, options.refine)


def _required_bytes(checkpoint: Checkpoint, recipes: tuple[Recipe, ...], texts: Texts | None) -> int:
    """Return the approximate disk space for the graphs, and for the logits of a validation on `texts`."""
    parameters, weights = count_parameters(checkpoint.config), checkpoint.weights
    vocab_size = checkpoint.config.vocab_size
    windows = [] if texts is None else select_windows(texts.validation, vocab_size, parameters)
    # All formats that recipes choose from are stored until the graphs are written.
    candidates = {each for recipe in recipes for formats in recipe.choices.values() for each in formats}
    per_weight = sum(each.bytes_per_weight for each in candidates)
    per_weight += sum(_bytes_per_weight(recipe, weights) for recipe in recipes)
    return logits_bytes(windows, vocab_size) + int(parameters * per_weight)


def _bytes_per_weight(recipe: Recipe, weights: Weights) -> float:
    """Return the approximate mean size of a weight on disk."""
    if recipe.calibrated:
        return max(each.bytes_per_weight for formats in recipe.choices.values() for each in formats)
    sizes = [recipe.projections.for_source(weights.block_kind(name)).bytes_per_weight for name in _projections(weights)]
    return sum(sizes) / len(sizes)
