"""`export_general`: converts a checkpoint whose architecture only transformers knows to a bundle."""

from __future__ import annotations

import dataclasses
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path

import transformers
from torch import nn

from llm_edge.checkpoint.reasoning import find_reasoning
from llm_edge.checkpoint.vocabulary import fit_to_embedding
from llm_edge.exporter.bundle.manifest import write_manifest
from llm_edge.exporter.bundle.side_files import write_side_files
from llm_edge.exporter.bundle.staging import check_disk_space, staging
from llm_edge.exporter.families import GENERAL
from llm_edge.exporter.general.architecture import Architecture
from llm_edge.exporter.general.calibrate import calibrate_general
from llm_edge.exporter.general.checkpoint import GeneralCheckpoint, read_general_folder
from llm_edge.exporter.general.decoder import AttentionMode
from llm_edge.exporter.general.functions import UnsupportedModelError
from llm_edge.exporter.general.gguf import read_general_gguf
from llm_edge.exporter.general.recipes import general_recipes
from llm_edge.exporter.general.reference import LongText, record_general_reference
from llm_edge.exporter.general.writer import GeneralWriter
from llm_edge.exporter.options import ExportOptions, FileFormat, GraphChoice
from llm_edge.exporter.progress import Progress
from llm_edge.exporter.quantization.calibrate import CalibratedWeights
from llm_edge.exporter.quantization.recipes import Recipe
from llm_edge.exporter.results import Report, precision_reports
from llm_edge.exporter.texts import Window, load_calibration, load_validation
from llm_edge.exporter.validation.compare import Difference, Parity, Quality
from llm_edge.exporter.validation.graph_parts import PartwiseGraph
from llm_edge.exporter.validation.independent import IndependentCheck
from llm_edge.exporter.validation.parity import (
    UNQUANTIZED,
    Exported,
    Validation,
    check_parity,
    forward_of,
    open_exported,
    score_exported,
)
from llm_edge.exporter.validation.reference import ReferenceLogits
from llm_edge.exporter.validation.windows import Forward, Run, logits_bytes, select_windows, step_rows
from llm_edge.runtime.errors import CheckpointError, ParameterError
from llm_edge.runtime.safe_io import short_repr

_REFERENCE_FRACTION = 0.5  # of the validation time
_DEVIATION_TOKENS = 256  # of whose logits the standard deviation is taken


def export_general(
    source: Path,
    target: Path,
    options: ExportOptions,
    recipes: tuple[Recipe, ...],
    progress: Progress,
    notes: tuple[str, ...] = (),
) -> Report:
    """Export a Hugging Face folder or GGUF file; see `exporter.export.export`. The report begins with `notes`.

    Raises:
        CheckpointError: transformers does not know the architecture, or it does something that has no form here.
        ParameterError: an option does not apply to such models.
    """
    _check(options)
    recipes = general_recipes(recipes)
    checkpoint = fit_to_embedding(read_general_gguf(source) if source.is_file() else read_general_folder(source))
    checkpoint = _with_reasoning(checkpoint)
    checkpoint = dataclasses.replace(checkpoint, notes=(*notes, *checkpoint.notes))
    architecture, writer = checkpoint.config, GeneralWriter()
    _check_batches(architecture)
    windows = select_windows(load_validation(checkpoint), architecture.vocab_size, architecture.parameters)
    with staging(target, options.force) as folder:
        models = folder / writer.name
        models.mkdir()
        check_disk_space(folder, _required_bytes(architecture, recipes, windows))
        try:
            calibrated = _calibrate(checkpoint, recipes, folder / "calibration", progress)
        except UnsupportedModelError as problem:
            note = f"quantized weights are rounded to nearest, without calibration: {problem}"
            calibrated, checkpoint = {}, dataclasses.replace(checkpoint, notes=(*checkpoint.notes, note))
        stored = writer.write(models, checkpoint, recipes, progress, calibrated)
        shutil.rmtree(folder / "calibration", ignore_errors=True)
        validation = _validate(models, checkpoint, recipes, writer, windows, progress)
        progress("writing", 0.0, "tokenizer and configs")
        write_side_files(folder, checkpoint, architecture.shape, recipes, writer.style)
        report = Report(
            path=target,
            source=checkpoint.source,
            parameters=architecture.parameters,
            style=writer.style,
            precisions=precision_reports(models, writer, recipes, stored),
            layers=len(architecture.decoder.caches),
            validation=validation,
            notes=checkpoint.notes,
        )
        write_manifest(folder, checkpoint, architecture.shape, report, writer, progress)
    progress("writing", 1.0, str(target))
    return report


def _calibrate(
    checkpoint: GeneralCheckpoint, recipes: tuple[Recipe, ...], folder: Path, progress: Progress
) -> Mapping[str, CalibratedWeights]:
    """Quantize for the inputs on a text, if a recipe quantizes."""
    quantized = [recipe for recipe in recipes if not recipe.lossless]
    if not quantized:
        return {}
    model = checkpoint.config.decoder.model
    width = max((module.in_features for module in model.modules() if isinstance(module, nn.Linear)), default=0)
    windows = load_calibration(checkpoint, width)
    return calibrate_general(
        checkpoint, quantized, windows, folder, lambda done, item: progress("calibrating", done, item)
    )


def _required_bytes(architecture: Architecture, recipes: tuple[Recipe, ...], windows: list[Window]) -> int:
    """Return the approximate disk space for the graphs, and for what is temporary."""
    # Calibrated weights are stored until the graphs are written.
    per_weight = [(1 if recipe.lossless else 2) * recipe.projections.bytes_per_weight for recipe in recipes]
    return int(architecture.parameters * sum(per_weight)) + logits_bytes(windows, architecture.vocab_size)


def _check(options: ExportOptions) -> None:
    """Raise ParameterError for options that do not apply."""
    refused = {
        "--format torchscript": options.file_format is FileFormat.TORCHSCRIPT,
        "--graph portable": options.graph is GraphChoice.PORTABLE,
        "--hidden-states": options.hidden_states,
        "--refine": options.refine,
        "--adapter": options.adapter is not None,
        "--no-validate": not options.validate,
        "--max-seq-len": options.max_seq_len is not None,
    }
    for name, given in refused.items():
        if given:
            raise ParameterError(f"{name} does not apply to models that are exported through transformers: omit it")


def _check_batches(architecture: Architecture) -> None:
    """Raise CheckpointError for attention that may be the model's own code, unless batches of it are known to be right.

    Validation runs one sequence at a time; how such code masks rows of unequal length is not checked by it.
    """
    kind = str(architecture.config.model_type)
    if architecture.decoder.mode is not AttentionMode.OPERATOR and kind not in GENERAL:
        raise CheckpointError(
            f"{architecture.where}: model_type {short_repr(kind)} is not supported: its attention is code of its own, "
            "and not verified for batches; see llm-export --families"
        )


def _with_reasoning(checkpoint: GeneralCheckpoint) -> GeneralCheckpoint:
    reasoning = find_reasoning(checkpoint.tokenizer.tokenizer_json, checkpoint.tokenizer.chat_template)
    return dataclasses.replace(checkpoint, reasoning=reasoning, notes=(*checkpoint.notes, *checkpoint.tokenizer.notes))


def _compare(
    name: str,
    model: Exported,
    expected: ReferenceLogits,
    long_text: LongText | None,
    progress: Callable[[float], None] = lambda _: None,
    *,
    exact: bool,
) -> tuple[Parity, Quality]:
    """Compare a precision; raise ParityError if it is to be `exact` and exceeds the bounds."""
    parity, quality = score_exported(expected, model, progress)
    if long_text is not None:
        difference = _compare_long_text(forward_of(model), long_text, step_rows(expected.vocab_size))
        parity = dataclasses.replace(parity, beyond_windows=difference)
    check_parity(name, parity, exact=exact)
    return parity, quality


def _compare_long_text(forward: Forward, text: LongText, rows: int) -> Difference:
    """Return the difference of the logits at the end of a text, which is run in steps of `rows`; see `Parity`."""
    body = len(text.tokens) - len(text.logits)
    chunks = [text.tokens[start : min(start + rows, body)] for start in range(0, body, rows)]
    for logits in forward([Run((*chunks, text.tokens[body:]), 0)]):
        found = logits  # of the last step, finally
    difference = (found - text.logits).abs()
    return Difference(difference.max().item(), difference.mean().item())


def _validate(
    folder: Path,
    checkpoint: GeneralCheckpoint,
    recipes: tuple[Recipe, ...],
    writer: GeneralWriter,
    windows: list[Window],
    progress: Progress,
) -> Validation:
    """Compare all precisions with transformers' own model."""

    def update(fraction: float, item: str) -> None:
        progress("validating", _REFERENCE_FRACTION * fraction, f"transformers: {item}")

    expected, long_text = record_general_reference(checkpoint, windows, folder.parent / "logits", update)
    parities, qualities = {}, {}
    if not any(recipe.lossless for recipe in recipes):
        progress("validating", _REFERENCE_FRACTION, UNQUANTIZED)
        graph = PartwiseGraph(writer.unquantized(checkpoint), checkpoint.config.shape)
        parities[UNQUANTIZED] = _compare(UNQUANTIZED, graph, expected, long_text, exact=True)[0]
    for number, recipe in enumerate(recipes):

        def update_recipe(fraction: float, number: int = number, name: str = recipe.name) -> None:
            done = (number + fraction) / len(recipes)
            progress("validating", _REFERENCE_FRACTION + (1 - _REFERENCE_FRACTION) * done, name)

        update_recipe(0.0)
        model = open_exported(folder, checkpoint.config.shape, recipe, writer)
        compared = _compare(recipe.name, model, expected, long_text, update_recipe, exact=recipe.lossless)
        parities[recipe.name], qualities[recipe.name] = compared
        del model  # only one model in memory at a time
    proven = next((recipe.name for recipe in recipes if recipe.lossless), UNQUANTIZED)
    check = _independent_check(checkpoint, expected, parities[proven].worst)
    expected.path.unlink()
    return Validation(parities, qualities, check)


def _independent_check(
    checkpoint: GeneralCheckpoint, expected: ReferenceLogits, difference: Difference
) -> IndependentCheck:
    """Return the difference of the unquantized graph: the reference of this route is transformers' own model."""
    tokens = len(expected.targets)
    deviation = expected.logits(0, min(tokens, _DEVIATION_TOKENS)).std().item()
    relative = Difference(difference.max / deviation, difference.mean / deviation)
    return IndependentCheck(transformers.__version__, len(checkpoint.config.decoder.caches), tokens, relative)
