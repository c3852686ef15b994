"""The whole way from a source to a committed bundle. Knows nothing of terminals: `progress` tells what goes on."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import tokenizers

from llm_edge.checkpoint.base import Checkpoint, Source
from llm_edge.checkpoint.source import SourceOptions, bundle_name, open_checkpoint
from llm_edge.exporter.bundle.formats import Form, OnnxForm
from llm_edge.exporter.bundle.side_files import runtimes, write_json, write_side_files
from llm_edge.exporter.bundle.staging import check_target, make_room, staging
from llm_edge.exporter.bundle.torchscript import TorchScriptForm
from llm_edge.exporter.explain.graph import explained
from llm_edge.exporter.graph.passes.int8_cache import check_cache
from llm_edge.exporter.graph.trace import GraphStyle
from llm_edge.exporter.progress import Progress
from llm_edge.exporter.quantization.calibrate import Choice
from llm_edge.exporter.quantization.recipes import RECIPES, Recipe
from llm_edge.exporter.quantization.recipes import Source as SourceFormat
from llm_edge.exporter.validation.compare import Parity, Quality
from llm_edge.exporter.validation.parity import WHOLE_GB, Texts, model_shape, prove
from llm_edge.model.decoder import count_parameters
from llm_edge.model.weights import Weights
from llm_edge.runtime.bundle import FORMAT_VERSION, MANIFEST, ONNX, TORCHSCRIPT, ReasoningTags, manifest_entry
from llm_edge.runtime.errors import CheckpointError, ParameterError

_FUSED_HEAD = 8  # onnxruntime's GroupQueryAttention takes heads of a multiple of this size only
_TOOLS = ("llm-edge", "torch", "onnx", "onnx-ir", "onnxscript", "onnxruntime")


@dataclass(frozen=True, slots=True)
class PrecisionReport:
    """What came out for a precision.

    Attributes:
        recipe: the precision.
        size: bytes of graph and weights.
        parity: None without validation.
        quality: None without validation.
        choices: how each projection came out that calibration rounded, by module path.
    """

    recipe: Recipe
    size: int
    parity: Parity | None
    quality: Quality | None
    choices: Mapping[str, Choice]


@dataclass(frozen=True, slots=True)
class Report:
    """What an export made.

    Attributes:
        path: the bundle.
        source: where it came from.
        parameters: number of weights.
        style: of its graphs; None for TorchScript.
        precisions: what it holds.
        layers: of the model.
        validated_layers: how many of them were compared with PyTorch; 0 without validation.
        validation_bytes: memory that comparing all of them takes, about.
    """

    path: Path
    source: Source
    parameters: int
    style: GraphStyle | None
    precisions: tuple[PrecisionReport, ...]
    layers: int
    validated_layers: int
    validation_bytes: float


def export(
    source: str,
    output: Path | None,
    recipes: tuple[Recipe, ...],
    style: GraphStyle | None,
    *,
    validate: bool,
    force: bool,
    progress: Progress,
    options: SourceOptions | None = None,
    file_format: str = ONNX,
    validation_memory: float = WHOLE_GB * 1e9,
    hidden_states: bool = False,
) -> Report:
    """Export a checkpoint.

    Args:
        source: see `open_checkpoint`.
        output: the bundle's folder; None takes `artifacts/<name>`.
        recipes: the precisions to make.
        style: see `GraphStyle`; None takes the fused one where the heads allow it.
        validate: compare with the reference and score the validation text.
        force: replace a bundle that is already there, once the new one is complete.
        progress: see `Progress`.
        options: what the user says beside the source.
        file_format: `onnx`, or `torchscript` for fp32 as a TorchScript module, which takes no style.
        validation_memory: bytes that validation may take; of larger models the first layers are compared.
        hidden_states: the graphs have those as an output, too; ONNX alone.

    Raises:
        InputError: the source cannot be read, or the output is in the way.
        ParityError: an fp32 graph misses its bound; nothing was written.
        MachineError: disk or memory failed; nothing was left behind.
    """
    target = output if output is not None else Path("artifacts") / bundle_name(source)
    if target.name in ("", ".."):
        target = target.resolve()  # "." and the like: the bundle and its temporary sibling need a name
    check_target(target, force)
    if file_format == TORCHSCRIPT and style is not None:
        raise ParameterError("--graph is about ONNX: leave it out with --format torchscript")
    if file_format == TORCHSCRIPT and hidden_states:
        raise ParameterError("--hidden-states is about ONNX: leave it out with --format torchscript")
    script = TorchScriptForm(recipes) if file_format == TORCHSCRIPT else None
    progress("reading", None, source)
    options = options if options is not None else SourceOptions()
    checkpoint = open_checkpoint(source, options, lambda text: progress("reading", None, text))
    _check_blocks(source, checkpoint, recipes)
    form: Form
    if script is None:
        style = _choose_style(source, checkpoint, style)
        for recipe in recipes:
            check_cache(recipe, style)
        form = OnnxForm(style, checkpoint.config.hidden_size if hidden_states else None)
    else:
        form = script
    texts = _texts(checkpoint)
    parameters = count_parameters(checkpoint.config)
    proof = None
    with staging(target, force) as folder:
        graphs = folder / form.name
        graphs.mkdir()
        make_room(folder, _bytes_needed(parameters, recipes, validate, checkpoint.weights))
        roundings = form.write(graphs, checkpoint.config, checkpoint.weights, recipes, texts.calibration, progress)
        if validate:
            proof = prove(graphs, checkpoint, recipes, form, texts, validation_memory, progress)
        progress("writing", 0.0, "tokenizer and configs")
        write_side_files(folder, checkpoint, recipes, style is GraphStyle.FUSED, script is None)
        report = Report(
            path=target,
            source=checkpoint.source,
            parameters=parameters,
            style=style,
            precisions=tuple(
                PrecisionReport(
                    recipe,
                    sum(path.stat().st_size for path in form.files(graphs, recipe)),
                    proof.parities[recipe.name] if proof else None,
                    proof.qualities[recipe.name] if proof else None,
                    roundings[recipe.name].choices if recipe.name in roundings else {},
                )
                for recipe in recipes
            ),
            layers=checkpoint.config.num_hidden_layers,
            validated_layers=proof.layers if proof else 0,
            validation_bytes=proof.needed if proof else 0.0,
        )
        _commit_manifest(folder, checkpoint, report, form, proof.extra if proof else {}, progress)
    progress("writing", 1.0, str(target))
    return report


def _check_blocks(source: str, checkpoint: Checkpoint, recipes: tuple[Recipe, ...]) -> None:
    """See that there are blocks where a recipe keeps the source's own."""
    weights = checkpoint.weights
    held = any(weights.block_kind(name) is not None for name in weights if name.startswith("layers."))
    for recipe in recipes:
        if isinstance(recipe.projections, SourceFormat) and not held:
            raise CheckpointError(
                f"{source} holds weights as {checkpoint.source.weight_types}; --precision {recipe.name} keeps those "
                "of a GGUF in Q4_0, Q4_1 or Q8_0: choose int8 or int4"
            )


def _choose_style(source: str, checkpoint: Checkpoint, style: GraphStyle | None) -> GraphStyle:
    fused = checkpoint.config.head_dim % _FUSED_HEAD == 0
    if style is GraphStyle.FUSED and not fused:
        raise CheckpointError(
            f"{source}: heads of {checkpoint.config.head_dim}, the fused graph needs a multiple of {_FUSED_HEAD}: "
            "export it with --graph portable"
        )
    return style if style is not None else GraphStyle.FUSED if fused else GraphStyle.PORTABLE


def _texts(checkpoint: Checkpoint) -> Texts:
    """Both texts in the model's own tokens; proves on the way that tokenizer and weights belong together."""
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
    texts = []
    for name in ("validation.txt", "calibration.txt"):
        text = (Path(__file__).parent / "data" / name).read_text(encoding="utf-8")
        tokens = list(tokenizer.encode(text, add_special_tokens=False).ids)
        if len(tokens) < 2:
            raise CheckpointError("tokenizer.json makes nothing of an English text: replace it by the model's own")
        texts.append(tokens)
    return Texts(*texts)


def _bytes_needed(parameters: int, recipes: tuple[Recipe, ...], validate: bool, weights: Weights) -> int:
    """About how much disk the graphs take, the one of the proof included."""
    made = recipes if not validate or any(recipe.lossless for recipe in recipes) else (*recipes, RECIPES["fp32"])
    rounded = [recipe for recipe in recipes if recipe.calibrated]  # waits on disk until it is written
    return sum(int(parameters * _bytes_per_weight(recipe, weights)) for recipe in (*made, *rounded))


def _bytes_per_weight(recipe: Recipe, weights: Weights) -> float:
    """About how much disk a weight takes; of a recipe that keeps the source's blocks, by how many weights have some."""
    form = recipe.projections
    if not isinstance(form, SourceFormat):
        return recipe.bytes_per_weight
    names = [name for name in weights if name.startswith("layers.") and name.endswith(".weight") and "norm" not in name]
    held = sum(weights.block_kind(name) is not None for name in names) / len(names)
    return held * form.bytes_per_weight + (1 - held) * form.otherwise.bytes_per_weight


def _commit_manifest(
    folder: Path,
    checkpoint: Checkpoint,
    report: Report,
    form: Form,
    proofs: Mapping[str, Parity],
    progress: Progress,
) -> None:
    """Write the manifest, last of all files. It holds no time and no path: equal sources make equal bundles."""
    files = {}
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())
    for number, name in enumerate(names):
        progress("writing", number / len(names), name)
        files[name] = manifest_entry(folder / name)
    marks = "reasoning_tags" if isinstance(checkpoint.reasoning, ReasoningTags) else "reasoning"
    chat = {
        key: asdict(value)
        for key, value in ((marks, checkpoint.reasoning), ("guards", checkpoint.guards))
        if value is not None
    }
    write_json(
        folder / MANIFEST,
        {
            "format_version": FORMAT_VERSION,
            "name": checkpoint.source.name,
            "model": {**asdict(model_shape(checkpoint.config)), "parameters": report.parameters},
            "graph": form.name if report.style is None else report.style.value,
            **chat,
            "source": asdict(checkpoint.source),
            "tools": {
                "python": platform.python_version(),
                **{name: importlib.metadata.version(name) for name in _TOOLS},
            },
            "precisions": {
                made.recipe.name: {
                    **({} if form.name == ONNX else {"format": form.name}),
                    "model": f"{form.name}/{form.file(made.recipe)}",
                    "recipe": str(made.recipe),
                    "share_buffer": report.style is GraphStyle.FUSED,
                    **({"hidden_size": form.hidden_size} if form.hidden_size is not None else {}),
                    "parity": made.parity.told if made.parity else {},
                    "quality": asdict(made.quality) if made.quality else {},
                    **({"runtimes": runtimes(made.recipe)} if form.name == ONNX else {}),
                    **(
                        explained(folder / ONNX / form.file(made.recipe), made.size, made.choices)
                        if form.name == ONNX
                        else {}
                    ),
                }
                for made in report.precisions
            },
            "validation": {"layers": report.validated_layers, "of": report.layers},
            "proof": {name: parity.told for name, parity in proofs.items()},
            "files": files,
        },
    )
